"""Every key of every command with every kind of wrong value in a file: it means something, or one line names
the key; never a traceback."""

import math
import os

import pytest
import yaml

from dualroute.cli import STAGES, parse_stage
from dualroute.cli.schema import schema_of, takes_text
from dualroute.errors import UserError, one_line
from dualroute.training.config import PretrainConfig

#: Stages with an option that has no default, or options of which one must be given.
NEEDED = {
    "evaluate": {"checkpoint": "c", "data": "d"},
    "generate": {"checkpoint": "c"},
    "chat": {"checkpoint": "c"},
    "data generate": {"server": "http://h", "model": "m", "prompts": "p", "output": "o"},
    "serve": {"checkpoint": "c"},
    "inspect": {"checkpoint": "c", "text": "t", "output": "o.html"},
    "runs compare": {"first": "a", "second": "b"},
    "report": {"run": "r"},
    "predict": {"checkpoint": "c", "input": "i", "output": "o"},
    "convert": {"source": "s", "output": "o"},
    "prune": {"checkpoint": "c", "output": "o", "data": "d", "keep": 0.5},
    "sparsify": {"checkpoint": "c", "output": "o", "data": "d"},
    "quantize": {"checkpoint": "c", "output": "o"},
    "export": {"checkpoint": "c", "output": "o", "format": "hf"},
    "data verify": {"data": "d"},
    "data show": {"data": "d"},
    "data inspect": {"data": "d"},
    "data stats": {"data": "d"},
    "data sample": {"data": "d"},
    "data diff": {"first": "d", "second": "e"},
}
WRONG = {
    "word": "wrong",
    "null": None,
    "negative": -3,
    "fraction": -0.5,
    "huge": 10**30,
    "very large": 10**17,
    "nan": float("nan"),
    "infinite": float("inf"),
    "bool": True,
    "empty": "",
    "list": [1, "a"],
    "deep list": [[["x"]]],
    "table": {"a": {"b": 1}},
    "control": "a\nb\x1b[31m",
    "digits": "9" * 5000,
}
#: Sections whose own checks say what they accept; their ranges are held by tests/test_settings.py.
TRAINING = (
    "model",
    "data",
    "train",
    "optim",
    "finetune",
    "spike_guard",
    "checkpoint",
    "monitor",
    "parallel",
    "watchdog",
)
MAY_BE_NEGATIVE = {"layer_map", "seed", "presence_penalty", "frequency_penalty"}


def keys_of(stage):
    schema = schema_of(STAGES[stage].config_class())
    keys = [key for key in [*schema.options, *schema.groups] if key]
    inherited = schema_of(PretrainConfig).options if stage in ("distill", "estimate", "finetune") else {}
    return [key for key in keys if key not in inherited]


def nested(key, value):
    for word in reversed(key.split(".")):
        value = {word: value}
    return value


def overlaid(base, more):
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            overlaid(base[key], value)
        else:
            base[key] = value
    return base


def parsed(stage, path, key, value):
    """The configuration, or the line that refuses it."""
    path.write_text(yaml.safe_dump(overlaid(dict(NEEDED.get(stage, {})), nested(key, value))))
    try:
        config = parse_stage(stage, ["--config", str(path)])
        if stage == "prepare":
            config.check()
        return config
    except UserError as error:
        return one_line(str(error))


def value_of(config, key):
    for word in key.split("."):
        config = config.get(word) if isinstance(config, dict) else getattr(config, word)
    return config


def numbers_in(value):
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers_in(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.parametrize(
    "stage",  # slow are those of the most keys
    [pytest.param(s, marks=pytest.mark.slow if s in ("pretrain", "pipeline") else []) for s in STAGES],
)
def test_wrong_values_are_refused_by_name_or_mean_something(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    for key in keys_of(stage):
        in_section = stage == "pipeline" and "." in key  # the commands themselves are tried too
        for kind, value in WRONG.items():
            if in_section and kind not in ("word", "nan", "table", "control"):
                continue
            result = parsed(stage, path, key, value)
            if isinstance(result, str):
                assert result.isprintable(), (key, kind, result)
                # what contradicts another key of its section may be told by the other's name
                named = key.split(".")[0] if key.startswith(TRAINING) else key.rsplit(".", 1)[-1]
                assert named in result, (key, kind, result)
            elif not key.startswith(TRAINING) and not in_section and stage != "prepare":
                numbers = numbers_in(value_of(result, key))
                assert all(math.isfinite(number) and abs(number) < 1e18 for number in numbers), (key, kind)
                may = key.rsplit(".", 1)[-1] in MAY_BE_NEGATIVE
                assert may or all(number >= 0 for number in numbers), (key, kind, numbers)
    assert os.listdir(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_path_is_refused_where_it_is_empty(stage, tmp_path):
    from dualroute.paths import path_field

    schema = schema_of(STAGES[stage].config_class())
    paths = [key for key, option in schema.options.items() if path_field(option.hint) is not None]
    assert paths
    for key in paths:
        empty = "" if takes_text(schema.options[key].hint) else [""]
        refused = parsed(stage, tmp_path / "run.yaml", key, empty)
        assert isinstance(refused, str)
        assert f"{key} in {tmp_path / 'run.yaml'}:" in refused
        assert "a path may not be empty" in refused
