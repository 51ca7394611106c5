"""A suite: the parts that its YAML file names, with their settings.  No torch is imported here.

In: the name of a shipped suite (``configs/suite/NAME.yaml``) or a file of the user's.  Out: :class:`Suite`.
Next: :mod:`dualroute.evaluate.suite.run` asks each part for its cells.

    parts:
      - part: perplexity
        text: [$DUALROUTE_DATA/wikitext/wt2.test.txt.gz]
      - part: ruler
        lengths: [4096, 16384]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from dualroute.configuration.names import unknown
from dualroute.configuration.shipped import shipped_configs
from dualroute.configuration.table import from_table
from dualroute.configuration.yaml_file import Node, read_file
from dualroute.errors import UserError
from dualroute.paths import DataPath, LocalPath
from dualroute.settings import SEEDS, above, at_least, check_fields

#: The longest text that a long-context task is made for.
MOST_TOKENS = 1 << 20


@dataclass
class PartSettings:
    """What all parts have.

    Args:
        name: What its scores are called by; must differ between two parts of one kind.
    """

    kind: ClassVar[str] = ""
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.kind
        self.check()

    def check(self) -> None:
        """Ranges."""
        check_fields(self, "")


@dataclass
class PerplexitySettings(PartSettings):
    """How well text is predicted.

    Args:
        text: Text files (also .gz, .xz, .bz2), each a source of its own.
        data: A folder of shards besides, or instead.
        split: Of the shards.
        context: Tokens the model sees at once; null takes the context it was trained with.
        stride: Tokens between two windows of a document; null is context.
        max_tokens: Of each source, from its start; null takes all.
        convention: How words are counted, and whether the text is changed first.  none: words between white
            space.  wikitext: words of the tokenised file with one for each line end (Merity et al. 2017),
            detokenised before the model reads it.  lm_eval: as the task wikitext of lm-evaluation-harness,
            page by page.
    """

    kind: ClassVar[str] = "perplexity"
    text: list[LocalPath] = field(default_factory=list)
    data: DataPath | None = None
    split: Literal["train", "val"] = "val"
    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    convention: Literal["none", "wikitext", "lm_eval"] = "none"

    def check(self) -> None:
        check_fields(self, "", dict.fromkeys(("context", "stride", "max_tokens"), at_least(1)))


@dataclass
class TaskSettings(PartSettings):
    """The metrics of a checkpoint that was trained for a task, on rows.

    Args:
        data: Rows; null takes those that the training kept for it.
        samples: Of the rows, the first so many; null takes all.
    """

    kind: ClassVar[str] = "task"
    data: DataPath | None = None
    samples: int | None = None

    def check(self) -> None:
        check_fields(self, "", {"samples": at_least(1)})


@dataclass
class HarnessSettings(PartSettings):
    """Tasks of lm-evaluation-harness.

    Args:
        tasks: Their names; local_wikitext, local_sst2, local_xquad, local_crows_pairs and local_bbq come with
            dualroute and read files.
        num_fewshot: Examples before each question; null is the task's own.
        samples: Documents of each task; null takes all.
        include: A folder of task YAMLs of your own.
        files: {task: file} for the local tasks; null looks in $DUALROUTE_DATA.
        seed: Of the few-shot examples.
        add_bos: Put a <bos> before each context; null as the model's tokenizer does for transformers.
    """

    kind: ClassVar[str] = "lm_eval"
    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    samples: int | None = None
    include: LocalPath | None = None
    files: dict[str, LocalPath] = field(default_factory=dict)
    seed: int = 1234
    add_bos: bool | None = None

    def check(self) -> None:
        check_fields(self, "", {"samples": at_least(1), "num_fewshot": at_least(0, 1000), "seed": SEEDS})
        if not self.tasks:
            raise UserError("tasks is empty: name at least one, as in [local_sst2]")


@dataclass
class RulerSettings(PartSettings):
    """Long context: RULER's thirteen configurations, passkey, facts in books, loss by position.

    Args:
        tasks: Their names; null takes all that there is data for.
        lengths: Tokens of a text with its answer, in the model's own tokens; null takes powers of two from
            1,024 to the model's context.
        samples: Texts for each task and length.
        seed: Of the texts.
        haystack: A text file that needles are hidden in; null is the repeated sentence of RULER's first
            configuration.
        paragraphs: SQuAD-like JSON for qa_1 and qa_2; null looks for XQuAD in $DUALROUTE_DATA.
        hotpot: HotpotQA's JSON for qa_2, whose questions are else made from the paragraphs.
        book: A text file that facts_1 to facts_3 are hidden in and positions is measured on.
    """

    kind: ClassVar[str] = "ruler"
    tasks: list[str] | None = None
    lengths: list[int] | None = None
    samples: int = 20
    seed: int = 0
    haystack: LocalPath | None = None
    paragraphs: LocalPath | None = None
    hotpot: LocalPath | None = None
    book: LocalPath | None = None

    def check(self) -> None:
        ranges = {"lengths": at_least(64, MOST_TOKENS), "samples": at_least(1, 10_000), "seed": SEEDS}
        check_fields(self, "", ranges)
        for name in ("tasks", "lengths"):
            if getattr(self, name) == []:
                raise UserError(f"{name} is an empty list: leave it out, or name at least one")


@dataclass
class FairnessSettings(PartSettings):
    """Preferences among texts that differ in whom they speak of.

    Args:
        sets: crows_pairs, winobias, bbq; null takes those that there is data for.
        files: {set: file or folder}; what is not given is looked for in $DUALROUTE_DATA.
        samples: Pairs or questions of each set; null takes all.
        confidence: Of the bootstrap interval.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    kind: ClassVar[str] = "fairness"
    sets: list[str] | None = None
    files: dict[str, LocalPath] = field(default_factory=dict)
    samples: int | None = None
    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def check(self) -> None:
        ranges = {
            "samples": at_least(1),
            "confidence": above(0, 0.9999),
            "resamples": at_least(100, 1_000_000),
            "seed": SEEDS,
        }
        check_fields(self, "", ranges)


KINDS: dict[str, type[PartSettings]] = {
    cls.kind: cls
    for cls in (PerplexitySettings, TaskSettings, HarnessSettings, RulerSettings, FairnessSettings)
}


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
        name: Of the file.
        parts: In the order of the file.
    """

    name: str
    parts: list[PartSettings]


def shipped_suites() -> dict[str, Path]:
    """{name: file} of the suites that come with dualroute."""
    return {
        name.removeprefix("suite/"): path
        for name, path in shipped_configs().items()
        if name.startswith("suite/")
    }


def read_suite(name: str) -> Suite:
    """The suite of a name or a file.

    Raises:
        UserError: There is none of that name (the nearest is named), or its file cannot be used.
    """
    shipped = shipped_suites()
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name.removeprefix("suite/") in shipped:
        path = shipped[name.removeprefix("suite/")]
    else:
        raise UserError(f"{unknown('suite', name, shipped)}; a file of your own ends in .yaml")
    table = read_file(path)
    for key in table.content:
        if key != "parts":
            raise UserError(f"unknown key '{key}' in {table.key_places[key]}; a suite has the key parts")
    listed = table.content.get("parts")
    if listed is None or listed.kind != "list" or not listed.content:
        raise UserError(f"{path}: parts must be a list of at least one part, as in - part: perplexity")
    parts = [_part(node) for node in listed.content]
    for number, one in enumerate(parts):
        if any((one.kind, one.name) == (other.kind, other.name) for other in parts[:number]):
            raise UserError(
                f"{listed.content[number].place}: two parts {one.kind} are called {one.name}: give name"
            )
    return Suite(path.stem, parts)


def _part(node: Node) -> PartSettings:
    if node.kind != "table" or "part" not in node.content:
        raise UserError(f"{node.place}: a part is a table with the key part ({', '.join(KINDS)})")
    kind = node.content["part"]
    if kind.kind != "text" or kind.content not in KINDS:
        raise UserError(f"{kind.place}: {unknown('part', str(kind.content), KINDS)}")
    return from_table(KINDS[kind.content], node, leave=("part",))


def with_flags(suite: Suite, flags: dict[str, Any]) -> Suite:
    """The suite with what was given on the command line, in every part that has such a setting.

    Args:
        suite: As its file says.
        flags: {setting: value}; null where none was given.

    Raises:
        UserError: No part has the setting, or a part refuses the value.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        if not any(name in _names(part) for part in suite.parts):
            raise UserError(f"--{name} says nothing to the suite {suite.name}: none of its parts has it")
    parts = []
    for part in suite.parts:
        own = {name: value for name, value in given.items() if name in _names(part)}
        # one source for another: what the file names is not measured besides
        if isinstance(part, PerplexitySettings) and {"text", "data"} & own.keys():
            own = {"text": [], "data": None, "convention": "none", **own}
        parts.append(dataclasses.replace(part, **own))
    return Suite(suite.name, parts)


def _names(part: PartSettings) -> set[str]:
    return {field.name for field in dataclasses.fields(part)}
