"""What turns gradients into a step: groups of parameters, AdamW or Muon, and the learning rate's course.

The LightningModule's ``configure_optimizers`` calls :func:`build_optimizer`; before each step it writes
:func:`learning_rate` and the other settings (:class:`HyperParameters`) into the optimizer.  Rooms: ``groups``
(who is stepped how), ``muon`` (the step of a matrix, whole or cut up), ``course`` (the rate by the step),
``build`` (the optimizer and its settings).
"""

from dualroute.training.step.optim.build import HyperParameters, build_optimizer, place_counts
from dualroute.training.step.optim.course import learning_rate, lr_at
from dualroute.training.step.optim.groups import groups_of, parameter_groups

__all__ = [
    "HyperParameters",
    "build_optimizer",
    "groups_of",
    "learning_rate",
    "lr_at",
    "parameter_groups",
    "place_counts",
]
