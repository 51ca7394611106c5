"""dualroute from Python: what the commands do, as a few functions and one class.

    import dualroute as dr

    run = dr.train("pretrain/quickstart", data="data/mine", output="runs/x", train={"max_steps": 200})
    model = dr.load("runs/x")
    print(model.generate("It was a dark", max_new_tokens=50))
    print(model.evaluate(data="data/mine").bits_per_byte)

    options.py    a configuration, or words for one → the object that the command would be given
    trainings.py  prepare, train, distill, finetune; prune, quantize, convert
    model.py      load a model; generate, evaluate, predict, export

Nothing is done here that a command does not do: the same classes hold the options, the same functions work,
and what a person can mend is raised as :class:`dualroute.UserError` with the line that the command would
print.  ``import dualroute`` alone loads none of this.
"""

from dualroute.library.model import Model, load
from dualroute.library.trainings import Run, convert, distill, finetune, prepare, prune, quantize, train

__all__ = [
    "Model",
    "Run",
    "convert",
    "distill",
    "finetune",
    "load",
    "prepare",
    "prune",
    "quantize",
    "train",
]
