"""Which back ends compute the routes of a model rightly on this device, and which of those is the fastest.

In: the layers of a model, or a `Problem` each. Out: a `Decision`, which `backend.decide` is then told.

    problem.py      what a layer asks of its back end, and rows of that shape
    correctness.py  values and gradients of a back end against plain torch in float64
    decision.py     every back end checked and timed; the fastest that is right, and the line that says so

The rows are drawn from a generator of their own: to verify changes no random number of a run.
"""

from dualroute.attention.verification.correctness import Errors, check
from dualroute.attention.verification.decision import Decision, DeviceLost, Finding, decide, left_to_torch
from dualroute.attention.verification.problem import Problem, problems_of

__all__ = [
    "Decision",
    "DeviceLost",
    "Errors",
    "Finding",
    "Problem",
    "check",
    "decide",
    "left_to_torch",
    "problems_of",
]
