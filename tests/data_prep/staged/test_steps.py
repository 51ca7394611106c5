"""A preparation in tasks: the same bytes, by whatever number of tasks, in whatever order they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="tasks need the extra prepare")
pytest.importorskip("rensa", reason="near duplicates need the extra prepare")

from data_prep.prepare import prepare, prepare_command
from data_prep.staged.staging import Staging
from data_prep.staged.steps import CleanStep, CompareStep, LearnStep, TokeniseStep, steps
from dualroute.errors import UserError
from tests.data_prep.conftest import files, story


@pytest.fixture
def options(corpus, config):
    (corpus / "near.txt").write_text(story(4).replace("Chapter 4", "Chapter four"))
    return config(near_duplicates=True, scrub=["email"])


@pytest.mark.parametrize("tasks", [1, 5])
def test_tasks_make_the_same_bytes(tasks, options, tmp_path) -> None:
    expected = files(prepare(options).folder)
    config = replace(options, output=str(tmp_path / "tasks"), executor="local", tasks=tasks)
    found = steps(config)
    assert [(type(step), number) for step, number in found[:4]] == [
        (CleanStep, tasks),
        (CompareStep, tasks),
        (LearnStep, 1),
        (TokeniseStep, tasks),
    ]
    from data_prep.output_folder import claimed
    from data_prep.prepare import Preparation

    with claimed(Path(config.output)):
        Preparation(config).begin()
    for step, number in found:
        for rank in reversed(range(number)):
            assert list(step(None, rank, number)) == []
    assert files(config.output) == expected


def test_a_step_before_its_turn_says_what_is_missing(options, tmp_path) -> None:
    config = replace(options, output=str(tmp_path / "tasks"), executor="local", tasks=3)
    from data_prep.output_folder import claimed
    from data_prep.prepare import Preparation

    with claimed(Path(config.output)):
        Preparation(config).begin()
    found = {step.name: step for step, _ in steps(config)}
    list(found["clean"](None, 0, 3))
    with pytest.raises(UserError, match=r"lot \d of \d+ is not done; run the tasks that clean again"):
        list(found["compare"](None, 0, 3))


def test_finished_lots_are_not_done_again(options, tmp_path, monkeypatch) -> None:
    config = replace(options, output=str(tmp_path / "tasks"), executor="local", tasks=2)
    from data_prep.output_folder import claimed
    from data_prep.prepare import Preparation

    with claimed(Path(config.output)):
        Preparation(config).begin()
    step = steps(config)[0][0]
    list(step(None, 0, 2))
    monkeypatch.setattr("data_prep.staged.staging.PartWriter", None)
    list(step(None, 0, 2))  # writes nothing, else it would fail
    with pytest.raises(TypeError):
        list(step(None, 1, 2))


@pytest.mark.slow
def test_the_local_executor_of_datatrove(options, tmp_path) -> None:
    expected = files(prepare(options).folder)
    config = replace(options, output=str(tmp_path / "tasks"), executor="local", tasks=2, workers=1)
    manifest = prepare_command(config)
    assert manifest is not None
    assert files(manifest.folder) == expected
    assert prepare_command(config) == manifest
    assert len(list((tmp_path / "tasks.tasks").glob("*/0-clean/completions/*"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "slurm"}, "executor slurm needs a partition"),
        ({"executor": "slurm", "partition": "a b"}, "partition is 'a b', which is no name"),
        ({"executor": "slurm", "partition": "a", "time": "soon"}, "time is 'soon'; write it like"),
        ({"executor": "local", "tasks": 0}, "tasks must be positive"),
        ({"executor": "local", "max_documents": 5}, "max_documents and max_bytes end the reading"),
        ({"executor": "cloud"}, "executor must be one of none, local, slurm"),
    ],
)
def test_options_of_tasks_that_cannot_be_meant(changes, message, options) -> None:
    with pytest.raises(UserError, match=message):
        prepare_command(replace(options, **changes))


def test_what_runs_in_one_process_refuses_tasks(options) -> None:
    with pytest.raises(UserError, match="call prepare_command"):
        prepare(replace(options, executor="local"))
    assert Staging  # imported without torch
