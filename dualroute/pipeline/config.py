"""The configuration of a pipeline: one section of options for each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data_prep.config import PrepareConfig
from dualroute.compress.config import PruneConfig, QuantizeConfig
from dualroute.distillation.config import DistillConfig
from dualroute.errors import UserError
from dualroute.evaluate.config import EvaluateConfig
from dualroute.export.config import ExportConfig
from dualroute.paths import DataPath, LocalPath, SuiteName
from dualroute.pipeline.section import SectionOf
from dualroute.settings import at_least, check_fields
from dualroute.training.config import PretrainConfig

Section = dict[str, Any]
Control = Literal["parent", "cross_entropy", "random"]


@dataclass
class PipelineConfig:
    """All stages from text to a compressed model that ships, each done once: prepare → pretrain → distil →
    prune → recover → quantise → evaluate → export.

    A stage's section holds options of its command, and `config`, a file (or a list of files) of them, which
    starts in the folder of the file that names it.  The inputs and the output of each stage are filled in.

    Args:
        output: Folder of the pipeline; each stage has its own in it.
        data: Folder of prepared shards, where prepare is null.
        parent: A checkpoint or run folder to compress, where pretrain is null.
        prepare: Of dualroute prepare; null where data is given.
        pretrain: Of dualroute pretrain; null where parent is given.
        distill: Of dualroute distill, from a teacher into the pretrained model; null leaves the stage out.
        prune: Of dualroute prune; null leaves out pruning and recovery.
        recover: Of dualroute distill, from the unpruned model into the pruned one.
        rounds: Prune and recover so many times; prune.keep is what all rounds keep together.
        quantize: Of dualroute quantize; null leaves it out.
        evaluate: Of dualroute evaluate, for every model on the way.
        suite: What every model on the way is measured by besides, and compared with the parent in the report:
            the name of a suite of dualroute evaluate, or a YAML file; null leaves it out.
        export: Of dualroute export; null leaves it out.
        controls: What to compare the recovered model with: the parent trained the same further steps,
            recovery by cross-entropy alone (cross_entropy), and recovery after random pruning.
        prompts: Beginnings that every model continues in the report.
        sample_tokens: Length of each continuation.
        decode_tokens: Tokens generated to measure the speed of decoding.
        compile: Also measure decoding compiled (needs a C++ compiler on a CPU).
        launcher: Command that starts several processes for the training stages, as in
            "torchrun --nproc_per_node 8 -m dualroute"; null trains in one.
        from_stage: Do this stage and all after it again (--from).
        only: Do these stages alone, divided by commas ("report" is the last); their inputs must be there.
        dry_run: Show what would be done.
    """

    output: LocalPath = "runs/pipeline"
    data: DataPath | None = None
    parent: LocalPath | None = None
    prepare: Annotated[Section | None, SectionOf(PrepareConfig)] = field(default_factory=dict)
    pretrain: Annotated[Section | None, SectionOf(PretrainConfig)] = field(default_factory=dict)
    distill: Annotated[Section | None, SectionOf(DistillConfig)] = None
    prune: Annotated[Section | None, SectionOf(PruneConfig)] = field(default_factory=dict)
    recover: Annotated[Section | None, SectionOf(DistillConfig)] = field(default_factory=dict)
    rounds: int = 1
    quantize: Annotated[Section | None, SectionOf(QuantizeConfig)] = field(default_factory=dict)
    evaluate: Annotated[Section, SectionOf(EvaluateConfig)] = field(default_factory=dict)
    suite: SuiteName | None = None
    export: Annotated[Section | None, SectionOf(ExportConfig)] = field(
        default_factory=lambda: {"format": "hf"}
    )
    controls: list[Control] = field(default_factory=list)
    prompts: list[str] = field(default_factory=lambda: ["The"])
    sample_tokens: int = 60
    decode_tokens: int = 128
    compile: bool = True
    launcher: str | None = None
    from_stage: str | None = None
    only: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        names = ("rounds", "sample_tokens", "decode_tokens")
        check_fields(self, "", dict.fromkeys(names, at_least(1, 10**6)))
        if not self.prompts:
            raise UserError("prompts is empty: give at least one beginning, as in [The]")
        for name, value in (("data", "prepare"), ("parent", "pretrain")):
            if (getattr(self, name) is None) == (getattr(self, value) is None):
                raise UserError(f"give either {name} or the section {value}, and set the other to null")
        if (self.prune is None) != (self.recover is None):
            raise UserError("prune and recover belong together: give both sections, or set both to null")
        if self.rounds > 1 and "keep" not in (self.prune or {}):
            raise UserError(f"rounds is {self.rounds}: give prune.keep, which the rounds divide among them")
        if self.controls and self.prune is None:
            raise UserError("controls compare with the recovered model: there is none without prune")
        if self.evaluate.get("suite") is not None:
            raise UserError("evaluate.suite: a pipeline names its suite by suite, beside its sections")
        if self.from_stage is not None and self.only is not None:
            raise UserError("--from and --only are both given: keep one of them")
