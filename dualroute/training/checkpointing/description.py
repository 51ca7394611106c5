"""What ``checkpoint.json`` says of the run that wrote it, beside the step and its losses.

In: a run that was found sound.  Next: :mod:`~dualroute.training.checkpointing.publishing.publisher` writes it
into every checkpoint; a resume compares ``settings``, retention compares ``validation``, and what is made of
the weights hands ``lineage`` on.
"""

from __future__ import annotations

from typing import Any

from dualroute.data.window_module import WindowDataModule
from dualroute.model.checkpoint import lineage
from dualroute.model.checkpoint.folder import Checkpoint, find_checkpoint
from dualroute.training.checkpointing.resumed_settings import settings_of
from dualroute.training.config import PretrainConfig


def describe_run(
    config: PretrainConfig,
    data: WindowDataModule,
    resumed: Checkpoint | None,
    operation: str,
    teacher: dict[str, Any] | None,
) -> dict[str, Any]:
    """Metadata that all checkpoints of this start have in common.

    Args:
        config: Of this start.
        data: What is trained and validated on.
        resumed: The checkpoint that the run goes on from; its history is then the run's, because the weights
            that the run once began with may be gone.
        operation: ``pretrain``, ``distill`` or ``finetune``.
        teacher: What is known of the teacher, in a distillation.
    """
    if resumed is not None and "lineage" in resumed.metadata:
        before = lineage.lineage_of(resumed.metadata)
    else:
        before = [] if config.init_from is None else lineage.continued(find_checkpoint(config.init_from))
    return {
        "operation": operation,
        "lineage": before,
        **({"teacher": teacher} if teacher else {}),
        "settings": settings_of(config),
        **data.describe_order(),
        "validation": {
            "data_fingerprint": data.val_fingerprint,
            "tokens": data.val_plan.tokens,
            "context": config.data.context,
            "rounded": _rounding(config),
            **({} if config.data.objective == "next_token" else {"masked": config.data.mask_share}),
        },
    }


def _rounding(config: PretrainConfig) -> str | None:
    """How weights are rounded in a validation, because it changes the loss."""
    scheme = config.train.quantization_aware
    return (
        f"{scheme}, groups of {config.train.quantization_group_size}"
        if scheme == "int4_weight_only"
        else scheme
    )
