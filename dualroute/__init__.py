"""dualroute: pretrain language models with DualRouting attention, then distil, prune and quantise them.

From Python: :func:`load`, :func:`train` and the others of :mod:`dualroute.library`, which are imported when
they are first used, so that ``import dualroute`` needs no torch.  Their types stand in ``__init__.pyi``.
"""

__version__ = "0.1.0"

_LIBRARY = (
    *("Model", "Run", "load", "prepare", "train", "finetune", "distill", "prune", "quantize", "convert"),
)
__all__ = ["UserError", "__version__", *_LIBRARY]


def __getattr__(name: str) -> object:
    import importlib

    if name in _LIBRARY:
        return getattr(importlib.import_module("dualroute.library"), name)
    if name == "UserError":
        return importlib.import_module("dualroute.errors").UserError
    raise AttributeError(f"module 'dualroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
