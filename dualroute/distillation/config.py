"""What a distillation can be told: the fields of ``dualroute distill`` that pretraining does not have.

In: YAML and flags, through :mod:`dualroute.cli`.  Here: each group of fields is checked by itself.  Next:
:mod:`~dualroute.distillation.run` checks them against the data, the student and the teacher.  No torch is
imported here.

By default half of the objective is still plain cross-entropy.  Whether a teacher helps
at all is measured against ``kl_weight 0`` (or ``dualroute pretrain --init_from``) at the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dualroute.errors import UserError
from dualroute.paths import LocalPath
from dualroute.settings import SEEDS, above, at_least, check_fields
from dualroute.training.config import DataConfig, PretrainConfig

#: What becomes of the keys that pretraining does not have when they are changed on resume; see
#: :mod:`dualroute.training.checkpointing.resumed_settings`.
RESUME_RULES: dict[str, Literal["obeyed", "refused", "compared"]] = {
    "teacher": "compared",
    "distill.hidden_weight": "compared",
    "distill.layer_map": "compared",
    "distill.cached_logits": "compared",
    **{
        f"distill.{name}": "obeyed"
        for name in (
            *("loss", "temperature", "beta", "kl_weight", "ce_weight", "hidden_loss", "attention_weight"),
            *("top_k", "on_policy_fraction", "on_policy_prefix", "on_policy_tokens", "on_policy_temperature"),
            *("teacher_dtype", "teacher_offload", "teacher_sharded", "backend"),
        )
    },
}


@dataclass
class DistillationConfig:
    """What the student learns from the teacher.

    Args:
        loss: Divergence of the next-token distributions: forward_kl, reverse_kl or jsd.
        temperature: Softens both distributions; the divergence is multiplied with its square.
        beta: Weight of the teacher in the mixture of jsd, between 0 and 1.
        kl_weight: Weight of the divergence in the objective.
        ce_weight: Weight of the cross-entropy against the data.
        hidden_weight: Weight of the hidden-state loss; 0 leaves it out.
        hidden_loss: Of hidden states projected to the teacher's width: mse or cosine.
        attention_weight: Weight of the difference of the heads' outputs; 0 leaves it out.
        layer_map: For each layer of the student the teacher's layer (from 0) that these two compare it with,
            -1 for none; null spreads the teacher's layers evenly.
        top_k: Compare only the teacher's likeliest tokens, and the mass of all others as one; null compares
            all.
        cached_logits: Folder that `dualroute cache-logits` wrote for this data, seed and context; no teacher
            is then loaded, and its top_k and temperature are the cache's.
        on_policy_fraction: Share of the steps that train on the student's own continuations (GKD), with the
            divergence alone.
        on_policy_prefix: Tokens of data that such a text begins with.
        on_policy_tokens: Tokens that the student adds.
        on_policy_temperature: Divides the logits that it draws from.
        teacher_dtype: Of the teacher's weights and arithmetic: float32 or bfloat16.
        teacher_offload: Keep the teacher's layers in the memory of the host, one at a time on the device.
        teacher_sharded: Divide each of the teacher's layers among the ranks, as ZeRO-3 does, whatever the
            student's strategy; with teacher_offload the pieces lie in the memory of the host.  One process
            keeps the layers whole.
        backend: Of the loss: chunked is ours; liger needs liger-kernel and CUDA (not tested here on a GPU);
            auto is chunked.
    """

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    kl_weight: float = 0.5
    ce_weight: float = 0.5
    hidden_weight: float = 0.0
    hidden_loss: Literal["mse", "cosine"] = "mse"
    attention_weight: float = 0.0
    layer_map: list[int] | None = None
    top_k: int | None = None
    cached_logits: LocalPath | None = None
    on_policy_fraction: float = 0.0
    on_policy_prefix: int = 64
    on_policy_tokens: int = 64
    on_policy_temperature: float = 1.0
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_offload: bool = False
    teacher_sharded: bool = False
    backend: Literal["auto", "chunked", "liger"] = "auto"

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("temperature", "on_policy_temperature"), above(0, 1e4))
        ranges |= dict.fromkeys(("on_policy_prefix", "on_policy_tokens", "top_k"), at_least(1))
        ranges |= {"layer_map": at_least(-1), "beta": at_least(0, 1), "on_policy_fraction": at_least(0, 1)}
        check_fields(self, "distill", ranges)
        if not self.kl_weight + self.ce_weight + self.hidden_weight + self.attention_weight > 0:
            raise UserError("distill.kl_weight, ce_weight and the others are all 0: nothing would be trained")
        if self.loss == "jsd" and not 0 < self.beta < 1:
            raise UserError(
                f"distill.beta is {self.beta}: jsd needs a number between 0 and 1 (towards 0 and 1 it "
                f"vanishes; use forward_kl or reverse_kl)"
            )
        if self.on_policy_fraction and not self.kl_weight:
            raise UserError("distill.on_policy_fraction needs distill.kl_weight: own texts have no other")
        for name in ("on_policy_fraction", "hidden_weight", "attention_weight"):
            if self.cached_logits is not None and getattr(self, name):
                raise UserError(
                    f"distill.{name} needs the teacher itself, which distill.cached_logits does without: "
                    f"set the one to 0 or leave out the other"
                )

    @property
    def looks_inside(self) -> bool:
        """Whether layers are compared."""
        return self.hidden_weight > 0 or self.attention_weight > 0

    def objective(self, z_loss: float) -> Any:
        """The :class:`~dualroute.distillation.losses.Objective` that a step minimises."""
        from dualroute.distillation.losses import Objective

        return Objective(self.loss, self.temperature, self.beta, self.kl_weight, self.ce_weight, z_loss)


@dataclass
class DistillConfig(PretrainConfig):
    """Train a student on prepared shards to say what its teacher says.

    Args:
        output: Run folder; everything the run writes lies there.
        seed: Seed of the initial weights, of the data's order and of on-policy texts.
        resume: auto continues from the newest finished checkpoint in the run folder, never starts afresh
            (refused where that would overwrite checkpoints), a path continues from that checkpoint.
        init_from: Checkpoint or run folder whose weights the student begins with (pruned or converted, say).
        model: Shape of the student, unless init_from has it; also a file: --model configs/model/5m.yaml.
        data: What is read.
        train: How much is trained, and in what portions.
        optim: Optimizer and learning rate; about a fifth of pretraining's is a good beginning.
        spike_guard: When the step of a bad batch is left out.
        checkpoint: When checkpoints are written and which ones stay.
        monitor: What is logged.
        parallel: How ranks share the work.
        watchdog: When a training that stands still is ended.
        teacher: Checkpoint or run folder of the teacher, of the same tokenizer as data and student.
        distill: What the student learns from it.
    """

    output: LocalPath = "runs/distill"
    teacher: LocalPath | None = None
    distill: DistillationConfig = field(default_factory=DistillationConfig)


@dataclass
class CacheLogitsConfig:
    """Write a teacher's likeliest next tokens for the samples of a run.

    Args:
        teacher: Checkpoint or run folder of the teacher.
        max_tokens: Length of the run to be served: its steps times train.tokens_per_batch.  A finished cache
            is made longer by running again with more.
        output: Folder of the cache; null puts it beside the shards, under a name that says what it is.
        seed: That of the run to be served.
        data: That of the run to be served (val_tokens has no meaning here).
        top_k: Tokens kept of each distribution.
        temperature: That of the run to be served; a truncated distribution cannot change it afterwards.
        dtype: Of the stored logarithms.
        teacher_dtype: Of the teacher's weights and arithmetic.
        micro_batch: Samples in one forward pass.
        shard_samples: Samples of one file.
        device: auto, cpu or cuda; each rank of a host takes its own GPU.
    """

    teacher: LocalPath | None = None
    max_tokens: int | None = None
    output: LocalPath | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    top_k: int = 64
    temperature: float = 1.0
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int = 8
    shard_samples: int = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        counts = ("max_tokens", "top_k", "micro_batch", "shard_samples")
        ranges = {"temperature": above(0, 1e4), "seed": SEEDS}
        check_fields(self, "", {**dict.fromkeys(counts, at_least(1)), **ranges})
