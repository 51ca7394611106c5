"""Which weights a training changes, how fast by their depth, and when it stops: the section ``finetune``.

In: YAML and flags.  Next: :mod:`~dualroute.training.finetuning.check` compares it with the model and the
other settings.  No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.errors import UserError
from dualroute.settings import above, at_least, check_fields

#: What becomes of a key that is changed on resume (``training/checkpointing/resumed_settings.py``).
RULES: dict[str, Literal["obeyed", "refused", "compared"]] = {
    **{f"finetune.{name}": "refused" for name in ("adapter", "rank", "alpha", "targets", "freeze")},
    **{f"finetune.{name}": "refused" for name in ("unfreeze_share", "layer_lr_decay")},
    **{f"finetune.{name}": "obeyed" for name in ("dropout", "early_stopping", "min_improvement")},
}


@dataclass
class StrategyConfig:
    """Which weights are trained, how fast, and when to stop.

    Args:
        adapter: none trains the weights themselves; lora trains two thin matrices beside each chosen one
            (Hu et al. 2021, https://arxiv.org/abs/2106.09685); dora besides the length of each of its rows
            (Liu et al. 2024, https://arxiv.org/abs/2402.09353).  All else stays as init_from has it, but for
            the head of a task.  Needs the package peft.
        rank: Width of an adapter.
        alpha: An adapter counts alpha / rank times.
        dropout: Share of an adapter's inputs that are zero in a step; the vocabulary's adapter has none.
        targets: What has adapters: all, or names and patterns of linear layers, as they end (global_qkv,
            local_qkv, out_proj, gate, up, down, head) or in full (layers.3.ffn.*).
        freeze: Patterns of parameters, or of modules, that stay as they are: embedding, layers.0.*.
        unfreeze_share: Gradual unfreezing (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146): heads are
            trained from the start, each layer from the top down a little later, and all once this share of
            the run is over; 0 trains all from the start.
        layer_lr_decay: Learning rate of each layer as a share of that above it; heads have all of it.
        early_stopping: Validations in a row without a better one after which the run ends; null never.
        min_improvement: By how much a validation must be better to count.
    """

    adapter: Literal["none", "lora", "dora"] = "none"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all"])
    freeze: list[str] = field(default_factory=list)
    unfreeze_share: float = 0.0
    layer_lr_decay: float = 1.0
    early_stopping: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "rank": at_least(1, 2**16),
            "alpha": above(0, 1e6),
            "dropout": at_least(0, 0.99),
            "unfreeze_share": at_least(0, 1),
            "layer_lr_decay": above(0, 1),
            "early_stopping": at_least(1),
            "min_improvement": at_least(0),
        }
        check_fields(self, "finetune", ranges)
        for name in ("targets", "freeze"):
            if not all(pattern.strip() for pattern in getattr(self, name)):
                raise UserError(f"finetune.{name} holds an empty pattern: leave it out")
        if not self.targets:
            raise UserError("finetune.targets is empty: name layers, or give all")

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers."""
        return self.adapter != "none" and self.dropout > 0

    @property
    def by_depth(self) -> bool:
        """Whether layers differ in how they are stepped, so that each has groups of the optimizer."""
        return self.unfreeze_share > 0 or self.layer_lr_decay != 1
