"""What a kind of task is; one is made in one short file, by deriving from :class:`Kind` and registering it.

In: rows, as :mod:`~dualroute.tasks.data.rows` reads them.  Here: what every kind has in common: its columns,
its tokenizer and longest example, the summed loss.  Next: the files of :mod:`dualroute.tasks.kinds`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.examples import Example

Row = dict[str, Any]
PlacedRow = tuple[str, Row]
Floats = NDArray[np.float32]
#: (training rows, rows to answer) → a prediction for each
Baseline = Callable[[Sequence[Row], Sequence[Row]], list[Row]]


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, the same for all rows of the kind of fault."""


class TooLong(BadRow):
    """A row that is left out because it is longer than the model may read."""


@dataclass(frozen=True)
class Role:
    """A column that a kind reads.

    Attributes:
        help: What is in it.
        required: Refuse data without it.
        is_target: What is to be learnt, which rows to be answered do not have.
    """

    help: str
    required: bool = True
    is_target: bool = False


@dataclass
class Setting:
    """Where a kind works.

    Attributes:
        tokenizer: Of the model.
        max_length: Longest example, in tokens.
        causal: The model reads from left to right.
        too_long: What becomes of a longer one: truncate, drop or refuse.
    """

    tokenizer: Tokenizer
    max_length: int
    causal: bool = True
    too_long: str = "truncate"


class LossSums(NamedTuple):
    """Sums over the targets of a micro-batch; ``total`` alone is differentiated."""

    total: Any
    loss_sum: Any
    z_sum: Any
    count: Any


@dataclass
class Part:
    """What is known of one of a row's examples when a row is answered.

    Attributes:
        example: As it was encoded.
        output: What :meth:`Kind.reduce` has kept of the model's outputs.
    """

    example: Example
    output: Any


@dataclass
class Tally:
    """What was done to examples, counted."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str) -> None:
        self.counts[what] += 1

    def lines(self) -> Iterator[str]:
        """A line for each."""
        yield from (f"{what}: {count:,}" for what, count in self.counts.items())


class Kind:
    """A kind of task.

    Args:
        task: What was configured.
        setting: Tokenizer, longest example, direction of reading.

    Attributes:
        labels: Names of the classes, once :meth:`fit` has seen the training rows.
        tally: What was done to rows without leaving them out (truncated, repaired), by name.
    """

    #: set by :func:`register`
    name: ClassVar[str] = ""
    #: columns by what they are called here
    roles: ClassVar[dict[str, Role]] = {}
    #: {metric: whether more of it is better}; the first is the one that the best checkpoint is known by, of
    #: a kind that writes text the loss
    metrics: ClassVar[dict[str, bool]] = {}
    #: {field: value} of empty slots in a window, where that is not 0
    fills: ClassVar[dict[str, Any]] = {}
    #: answers are texts, made token by token
    writes_text: ClassVar[bool] = False
    #: roles that are images or recordings; their column may be called as the role too, as in folders of files
    media: ClassVar[tuple[str, ...]] = ()
    #: what to do where no row is left to validate on
    few_rows: ClassVar[str] = "give data.validation, or more rows (equal rows stay on one side)"
    #: `texts` are read by the model; else it keeps a tokenizer of their characters that nothing reads
    reads_text: ClassVar[bool] = True

    def __init__(self, task: TaskConfig, setting: Setting) -> None:
        self.task, self.setting = task, setting
        self.labels: list[str] = list(task.labels or [])
        self.class_weights: list[float] | None = None
        self.tally = Tally()
        unknown = next((role for role in task.columns if role not in self.roles), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self.roles, 1)
            raise UserError(
                f"task.columns names {unknown!r}, which a task of kind {self.name} does not have: it has "
                f"{', '.join(self.roles)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if task.metric is not None and task.metric not in {**self.metrics, "loss": False}:
            raise UserError(
                f"task.metric is {task.metric}: a task of kind {self.name} has {', '.join(self.metrics)}, "
                f"loss"
            )

    # ------------------------------------------------------------------ what a kind says

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse settings of a run that this kind cannot be trained with.

        Raises:
            UserError: Naming the key and the remedy.
        """

    def fit(self, rows: Iterable[Row]) -> None:
        """Look over the training rows; ``rows`` may be read once."""

    def head(self) -> TaskHeadConfig | None:
        """What leaves the model; null for the next token."""
        return None

    def frontend(self) -> FrontendConfig | None:
        """What enters the model, an example's field ``inputs``; null for token ids."""
        return None

    def num_ids(self) -> int | None:
        """Ids of a model whose ``input_ids`` are no text; null for those of the tokenizer."""
        return None

    def divide(self, rows: Sequence[PlacedRow]) -> dict[str, list[PlacedRow]]:
        """The parts train, validation and test, of a kind that divides rows by itself; with one that does not
        have this of its own, ``data.validation`` and ``data.validation_share`` say it."""
        raise NotImplementedError

    @property
    def divides(self) -> bool:
        """Whether the kind has a :meth:`divide` of its own."""
        return type(self).divide is not Kind.divide

    def encode(self, row: Row, *, with_target: bool = True) -> list[Example]:
        """The examples of a row, each of at most ``setting.max_length`` tokens.

        Raises:
            BadRow: It cannot be used.
        """
        raise NotImplementedError

    def answer_examples(self, row: Row) -> list[Example]:
        """What the perplexity of a text's answer is measured on."""
        return self.encode(row)

    def target(self, row: Row) -> Any:
        """What :meth:`score` compares with: of a row that :meth:`encode` takes."""
        raise NotImplementedError

    def reduce(self, outputs: Floats, example: Example) -> Any:
        """What is kept of an example's outputs (k, head's outputs), in the order of its ``outputs``."""
        return outputs

    def decode(self, row: Row, parts: Sequence[Part]) -> Row:
        """The columns of a prediction."""
        raise NotImplementedError

    def score(self, targets: Sequence[Any], predictions: Sequence[Row]) -> dict[str, float]:
        """The metrics of :attr:`metrics`."""
        raise NotImplementedError

    def baselines(self) -> dict[str, Baseline]:
        """Trivial predictions by name, (training rows, rows) → predictions; the first is the one to beat."""
        return {}

    def state(self) -> dict[str, Any]:
        """What :meth:`fit` has learnt besides labels, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` gave."""

    def loss(self, outputs: Any, batch: dict[str, Any], z_loss: float = 0.0) -> LossSums:
        """Summed loss of a micro-batch.

        Args:
            outputs: (R, head's outputs) float tensor at ``batch["output_rows"]``.
            batch: See :mod:`dualroute.tasks.data.module`.
            z_loss: Factor of the squared log-normalisers in the total.
        """
        from dualroute.tasks.losses import classification

        labels = batch["labels"].flatten()[batch["output_rows"]]
        return classification(
            outputs, labels, smoothing=self.task.label_smoothing, weights=self.class_weights, z_loss=z_loss
        )

    def training(
        self, encoded: Sequence[Any], prepared: Any, arguments: Callable[[], dict[str, Any]]
    ) -> Any | None:
        """The module that trains the model; null: :class:`~dualroute.tasks.module.Finetune`.

        Args:
            encoded: Rows and examples, of training and of validation.
            prepared: The run.
            arguments: Makes what every module is made of, the model among it.
        """
        return None

    def warnings(self, rows: Iterable[Row]) -> Iterator[str]:
        """What of the training rows may not be meant, a line each; ``rows`` may be read once."""
        yield from ()

    def prompt(self, row: Row) -> list[int]:
        """Ids that an answer is written after (``writes_text``)."""
        raise NotImplementedError

    def texts(self, row: Row) -> list[str]:
        """Texts of a row, that a tokenizer may be trained on."""
        return [
            str(row[self.column(role)])
            for role in self.roles
            if isinstance(row.get(self.column(role)), str) and not self.roles[role].is_target
        ]

    # ------------------------------------------------------------------ what all kinds have

    def column(self, role: str) -> str:
        """The data's name of a role."""
        return self.task.columns.get(role, role)

    def check_columns(
        self, present: Iterable[str], *, with_target: bool = True, source: str = "data"
    ) -> None:
        """Refuse data without a column that is read.

        Raises:
            UserError: Naming it, and the columns there are.
        """
        present = list(present)
        for name in self.media:  # files of a folder, asked of what was trained on rows
            if name in present and self.column(name) not in present:
                present.append(self.column(name))
        for name, role in self.roles.items():
            wanted = role.required or name in self.task.columns
            if not wanted or (role.is_target and not with_target) or self.column(name) in present:
                continue
            raise UserError(
                f"{source} has no column {self.column(name)!r} ({role.help}), it has "
                f"{', '.join(map(repr, present[:20]))}: name the right one (task.columns {{{name}: …}})"
            )
        read = [self.column(name) for name in self.roles if self.column(name) in present]
        twice = next((column for column in read if read.count(column) > 1), None)
        if twice is not None:
            roles = [name for name in self.roles if self.column(name) == twice]
            raise UserError(
                f"task.columns: column {twice!r} is read as {' and as '.join(roles)}: the answer would "
                f"stand in "
                f"the question; name different columns"
            )

    def medium(self, row: Row, role: str) -> Any:
        """The image or recording of a row, null for none; see ``media``."""
        return row.get(self.column(role), row.get(role))

    def text(self, row: Row, role: str = "text") -> str:
        """The text of a role.

        Raises:
            BadRow: It is missing, empty or no text.
        """
        value = row.get(self.column(role))
        if value is None:
            raise BadRow(f"no {self.column(role)}")
        if isinstance(value, bool | int | float):
            value = str(value)
        if not isinstance(value, str):
            raise BadRow(f"{self.column(role)} is no text")
        if not value.strip():
            raise BadRow(f"empty {self.column(role)}")
        return value

    def joined(self, *texts: list[int]) -> list[int]:
        """<bos> text <eos> text <eos> …, the longest texts cut until all fit.

        Raises:
            TooLong: They do not fit, and ``too_long`` is drop.
            UserError: They do not fit, and ``too_long`` is refuse.
        """
        tokenizer = self.setting.tokenizer
        bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        end = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else bos
        room = self.setting.max_length - len(bos) - len(end) * len(texts)
        parts = list(texts)
        if sum(map(len, parts)) > room:
            self.too_long(sum(map(len, parts)) + self.setting.max_length - room)
            parts = shortened(parts, room)
        ids = list(bos)
        for part in parts:
            ids += part + end
        return ids

    def too_long(self, length: int) -> None:
        """Note that an example of ``length`` tokens is cut, or leave it out, or refuse it."""
        if self.setting.too_long == "drop":
            raise TooLong(f"longer than {self.setting.max_length} tokens")
        if self.setting.too_long == "refuse":
            raise UserError(
                f"a row has {length} tokens, more than the {self.setting.max_length} that are read: raise "
                f"data.max_length or data.context, or set data.too_long to truncate or drop"
            )
        self.tally.add(
            f"examples truncated to {self.setting.max_length} tokens (data.max_length, data.too_long)"
        )

    def pooling(self) -> Any:
        """Where a text's one output is read."""
        chosen = self.task.pooling
        return ("last" if self.setting.causal else "first") if chosen == "auto" else chosen

    def pooled(self, ids: Sequence[int], label: int | None) -> dict[str, NDArray[Any]]:
        """Fields of a text with one output, and its label where there is one."""
        place = 0 if self.pooling() == "first" else len(ids) - 1
        return {"input_ids": np.array(ids, dtype=np.int32), **at_place(len(ids), place, label)}


def at_place(length: int, place: int, label: int | float | None) -> dict[str, NDArray[Any]]:
    """``outputs`` and ``labels`` (absent for no label) that are set at one token."""
    outputs = np.zeros(length, dtype=bool)
    outputs[place] = True
    if label is None:
        return {"outputs": outputs}
    labels = np.full(length, -100, dtype=np.int32)
    labels[place] = label
    return {"outputs": outputs, "labels": labels}


def shortened(parts: list[list[int]], room: int) -> list[list[int]]:
    """Beginnings of ``parts`` that have ``room`` ids together: the longest are cut, to equal lengths."""
    limit = room
    for count, length in enumerate(sorted(map(len, parts))):
        share = limit // (len(parts) - count)
        if length > share:
            return [part[: max(share, 0)] for part in parts]
        limit -= length
    return parts


# ---------------------------------------------------------------------- finding a kind

_REGISTERED: dict[str, type[Kind]] = {}


def register(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: make a kind known as ``name``."""

    def known(cls: type[Kind]) -> type[Kind]:
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return known


def kind_names() -> list[str]:
    """Kinds that come with dualroute: the files of :mod:`dualroute.tasks.kinds`."""
    from dualroute.tasks import kinds

    return sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))


def find_kind(name: str) -> type[Kind]:
    """The class of a kind: of ``dualroute/tasks/kinds/NAME.py``, or of a Python file of the user's.

    Raises:
        UserError: There is none, or the file registers none.
    """
    if name.endswith(".py"):
        return _of_file(Path(name))
    if name not in _REGISTERED:
        if name not in kind_names():
            near = difflib.get_close_matches(name, kind_names(), 1)
            raise UserError(
                f"task.kind is {name}: choose {', '.join(kind_names())}, or a Python file that registers one"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        importlib.import_module(f"dualroute.tasks.kinds.{name}")
    return _REGISTERED[name]


def _of_file(path: Path) -> type[Kind]:
    if not path.is_file():
        raise UserError(f"task.kind {path} is not there: give a Python file that registers a kind")
    before = dict(_REGISTERED)
    spec = importlib.util.spec_from_file_location(f"dualroute_kind_{path.stem}", os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"task.kind {path} cannot be read as Python ({error!r}): mend it") from error
    found = [cls for name, cls in _REGISTERED.items() if before.get(name) is not cls]
    if len(found) != 1:
        raise UserError(
            f'task.kind {path} registers {len(found)} kinds: put @register("name") above one class in it'
        )
    return found[0]
