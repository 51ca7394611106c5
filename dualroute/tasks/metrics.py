"""Metrics, by the libraries that the field uses; each names itself where it is not installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from dualroute.errors import UserError

_PACKAGES = {
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
}


def library(module: str, extra: str = "tasks") -> Any:
    """An optional library.

    Raises:
        UserError: It is not installed; names it and the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        name = _PACKAGES.get(package, package)
        raise UserError(
            f"the library {name} is not installed ({error}): pip install 'dualroute[{extra}]' (or pip "
            f"install "
            f"{name})"
        ) from error


def classification_metrics(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """accuracy, macro F1, Matthews' correlation of classes, and F1 of the last class where there are two
    (GLUE's, of MRPC)."""
    metrics = library("sklearn.metrics")
    classes = sorted({*targets, *predictions})
    found = {
        "accuracy": float(metrics.accuracy_score(targets, predictions)),
        "macro_f1": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(targets, predictions)),
    }
    found["f1"] = found["macro_f1"]
    if len(classes) == 2:
        found["f1"] = float(metrics.f1_score(targets, predictions, pos_label=classes[-1], zero_division=0.0))
    return found
