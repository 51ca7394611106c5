"""Every field of every configuration class, with values that nobody can mean: one line that names it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dualroute.cli import STAGES
from dualroute.errors import UserError
from dualroute.settings import Range, above, at_least, check_fields, note_given

#: what is needed of a class whose fields have no default, or have to fit together
NEEDED = {
    "EvaluateConfig": {"checkpoint": "run", "data": "data"},
    "GenerateConfig": {"checkpoint": "run"},
    "InspectConfig": {"checkpoint": "run", "text": "text", "output": "page.html"},
    "ReportConfig": {"run": "run"},
    "ConvertConfig": {"source": "run", "output": "out"},
    "PruneConfig": {"checkpoint": "run", "output": "out", "data": "data", "keep": 0.5},
    "SparsifyConfig": {"checkpoint": "run", "output": "out", "data": "data"},
    "QuantizeConfig": {"checkpoint": "run", "output": "out"},
    "VerifyDataConfig": {"data": "data"},
    "ShowDataConfig": {"data": "data"},
    "StatsDataConfig": {"data": "data"},
    "SampleDataConfig": {"data": "data"},
    "DiffDataConfig": {"first": "a", "second": "b"},
    "ChatConfig": {"checkpoint": "run"},
    "GenerateDataConfig": {"server": "http://h", "model": "m", "prompts": "p", "output": "o"},
    "ServeConfig": {"checkpoint": "run"},
    "CompareRunsConfig": {"first": "one", "second": "two"},
    "PredictConfig": {"checkpoint": "run", "input": "rows.csv", "output": "out"},
    "ExportConfig": {"checkpoint": "run", "output": "out", "format": "hf"},
}
#: checked with what they belong to
ELSEWHERE = {"prepare", "pipeline"}
BAD = [
    None,
    "text",
    "",
    [],
    {},
    object(),
    True,
    -1,
    -1.5,
    0,
    0.0,
    1e30,
    10**30,
    math.nan,
    math.inf,
    -math.inf,
]


def classes() -> list[type]:
    """The configuration classes of all stages, and those of their sections."""
    found: dict[str, type] = {}

    def add(cls: type) -> None:
        found[cls.__name__] = cls
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(
                default := field.default_factory()
            ):
                add(type(default))

    for name, stage in STAGES.items():
        if name not in ELSEWHERE:
            add(stage.config_class())
    return list(found.values())


def accepted(cls: type, name: str, value: Any) -> bool:
    """Whether the class takes the value; a refusal is one line that names the field."""
    try:
        cls(**{**NEEDED.get(cls.__name__, {}), name: value})
    except UserError as error:
        line = str(error)
        assert name in line, f"{cls.__name__}({name}={value!r}): {line}"
        assert "\n" not in line
        return False
    return True


FIELDS = [(cls, field) for cls in classes() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(
    ("cls", "field"), FIELDS, ids=lambda p: getattr(p, "__name__", getattr(p, "name", ""))
)
def test_no_value_gets_through_that_nobody_can_mean(cls: type, field: dataclasses.Field[Any]) -> None:
    """Field by field: wrong types, null, negative, zero, NaN, infinite and huge ones."""
    kind = str(field.type)
    numeric = kind.split(" |")[0] in ("int", "float")
    taken = [value for value in BAD if accepted(cls, field.name, value)]
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in taken), taken
    assert not any(type(value) is object for value in taken)
    if numeric:
        assert not any(isinstance(value, bool | str | list | dict) for value in taken), taken
        assert not any(abs(value) >= 1e30 for value in taken if value is not None), taken
        # what may be negative: seeds, penalties, and layers that have no partner
        may = field.name in ("seed", "presence_penalty", "frequency_penalty")
        assert may or not any(value < 0 for value in taken if value is not None), taken
    if kind == "bool":
        assert all(value is True for value in taken), taken
    if kind.split(" |")[0] in ("str", "LocalPath", "ConfigFile", "ResumePath") or kind.startswith("Literal"):
        assert all(isinstance(value, str) for value in taken if value is not None), taken
        assert field.name in ("prompt", "system") or "" not in taken
    if "None" not in kind:
        assert None not in taken


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        ("ModelConfig", {"rope_theta": 0.0}, "model.rope_theta is 0.0: it must be above 0"),
        ("ModelConfig", {"rope_theta": -5.0}, "model.rope_theta is -5.0: it must be above 0"),
        ("ModelConfig", {"rope_scaling": {"factor": math.nan}}, "model.rope_scaling"),
        ("ParallelConfig", {"zero_stage": 4}, "parallel.zero_stage is 4: it must be in [0, 3], or null"),
        ("ParallelConfig", {"strategy": "fsdp"}, "choose auto, single, ddp or deepspeed"),
        ("TrainConfig", {"quantization_aware": "int3"}, "train.quantization_aware is 'int3': choose"),
        ("QuantizeConfig", {"scheme": "int3"}, "scheme is 'int3': choose int8_weight_only"),
        ("OptimConfig", {"betas": (0.9, 1.0)}, "optim.betas is (0.9, 1.0): of 1.0, it must be in [0, 1)"),
        ("OptimConfig", {"betas": (0.9,)}, "optim.betas is (0.9,): give 2 values"),
        ("OptimConfig", {"lr": 1e30}, "optim.lr is 1e+30: it must be at most 1000"),
        ("PretrainConfig", {"output": " "}, "output is ' ': it must not be empty"),
        ("PretrainConfig", {"train": 5}, "train is 5: it must be a table of keys and values"),
        ("DataConfig", {"path": "a\0b"}, "must not hold a zero byte"),
        ("WatchdogConfig", {"limit_minutes": 1e9}, "it must be at most 1e+06"),
    ],
)
def test_the_line_says_what_is_wrong(cls: str, values: dict[str, Any], message: str) -> None:
    found = {one.__name__: one for one in classes()}[cls]
    with pytest.raises(UserError) as error:
        found(**{**NEEDED.get(cls, {}), **values})
    assert message in str(error.value)


@dataclasses.dataclass
class Inner:
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_ranges_have_their_ends() -> None:
    for allowed, inside, outside in (
        (at_least(2), (2, 10**15), (1, 10**15 + 1)),
        (above(0, 5), (1, 5), (0, 6)),
        (Range(0, 4, without_most=True), (0, 3), (-1, 4)),
    ):
        for value in inside:
            check_fields(Inner(value), "", {"width": allowed})
        for value in outside:
            with pytest.raises(UserError, match="width is"):
                check_fields(Inner(value), "", {"width": allowed})


def test_each_part_knows_what_was_given_of_it() -> None:
    outer: Any = Outer()
    note_given(outer, iter(["inner.width", "name", "config"]))
    assert outer.given == {"inner.width", "name"}
    assert outer.inner.given == {"width"}
