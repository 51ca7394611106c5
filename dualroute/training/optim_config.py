"""What the optimizer can be told: the section ``optim``.

In: YAML and flags.  Next: ``training/step/optim`` makes the optimizer and steers it.  No torch is
imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.settings import Range, above, at_least, check_fields


@dataclass
class MuonConfig:
    """The step of the layers' matrices with optim.name muon.

    Args:
        lr: Peak learning rate of the matrices; null is optim.lr.
        momentum: Decay of the running mean of the gradient.
        nesterov: Step along the mean with the newest gradient counted once more.
        weight_decay: Of the matrices; null is optim.weight_decay.
        steps: Newton-Schulz iterations that orthogonalise the mean.
        scale: How the rate goes with a matrix's shape: match_rms_adamw (0.2 times the root of its longer
            side: steps as long as AdamW's, so that rates of AdamW serve) or original (the root of rows /
            columns, at least 1).
        precision: Arithmetic of those iterations; auto: bfloat16 on CUDA, float32 elsewhere.
    """

    lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float | None = None
    steps: int = 5
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        ranges = {
            "lr": above(0, 1e3),
            "momentum": Range(0, 1, without_most=True),
            "weight_decay": at_least(0, 1e3),
            "steps": at_least(1, 99),
        }
        check_fields(self, "optim.muon", ranges)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate.

    AdamW is Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101), Muon Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon/).

    Args:
        name: adamw steps all parameters; muon steps the matrices of the layers, queries, keys and values of
            each route for themselves, and leaves embedding, head, norms, biases and gates to AdamW.
        lr: Peak learning rate.
        embedding_lr: Peak learning rate of the token embedding, and with it of a tied output weight; null is
            lr.
        head_lr: That of an output weight of its own; null is lr.
        base_dim: model.dim of the model on which the rates were found. At another one the rate of the layers'
            matrices is multiplied by base_dim / dim with adamw (µP, Yang et al. 2022,
            https://arxiv.org/abs/2203.03466, table 3), by its root with muon, not at all with muon.scale
            original; null leaves it.
        muon: With name muon, how the matrices are stepped.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices, times the learning rate.
        decay_embeddings: Decay the token embedding too (and with it a tied output weight).
        warmup_steps: Optimizer steps of linear warm-up to ``lr``.
        schedule: cosine falls to the minimum over the whole run; wsd (warm-up, stable, decay) stays at
            ``lr`` until the last ``decay_fraction`` of the steps; constant stays.
        min_lr_ratio: Learning rate at the end of the schedule, as a share of ``lr``.
        decay_fraction: Share of all steps that wsd spends falling.
        decay_shape: How wsd falls: sqrt (by 1 minus the root of the progress) or linear.
        grad_clip: Largest norm of the whole gradient; null never clips.
        fused: Step all parameters in one kernel; null: on CUDA.  On a CPU its sums are rounded otherwise in
            the last bit.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    embedding_lr: float | None = None
    head_lr: float | None = None
    base_dim: int | None = None
    muon: MuonConfig = field(default_factory=MuonConfig)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    grad_clip: float | None = 1.0
    fused: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.muon, dict):  # of a checkpoint's settings
            self.muon = MuonConfig(**self.muon)
        ranges = {
            **dict.fromkeys(("lr", "embedding_lr", "head_lr"), above(0, 1e3)),
            "base_dim": at_least(1, 2**31 - 1),
            "betas": Range(0, 1, without_most=True),
            "eps": at_least(0, 1),
            "weight_decay": at_least(0, 1e3),
            "min_lr_ratio": at_least(0, 1),
            "decay_fraction": above(0, 1),
            "grad_clip": above(0),
        }
        check_fields(self, "optim", ranges)
