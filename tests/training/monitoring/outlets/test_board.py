"""What TensorBoard shows, in which order, and what it does not show."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch.utils.tensorboard import SummaryWriter

from dualroute.training.monitoring.outlets.board import CHARTS, Board, hparams_of, layout_of
from dualroute.training.monitoring.tensorboard import LastingWriter

SETTINGS = (
    "seed: 3\nmodel: {dim: 64, window: null}\nmonitor: {webhook: secret}\noptim: {lr: 0.1}\noutput: r\n"
)


def board(folder: Path) -> Board:
    return Board(LastingWriter(lambda: SummaryWriter(folder), str(folder)))


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(scalar.step, scalar.value) for scalar in read(folder).Scalars(tag)]


def test_a_curve_that_stands_still_has_no_card_until_it_moves(tmp_path: Path) -> None:
    shown = board(tmp_path)
    for step in range(1, 6):
        values = {"train/loss": 2.0, "optim/lr": 0.5, "train/skipped_steps": 0.0 if step < 5 else 1.0}
        shown.add(step, values | {"a/nan": float("nan")})
    shown.add(6, {"train/skipped_steps": 1.0})
    assert set(read(tmp_path).Tags()["scalars"]) == {"train/loss", "train/skipped_steps"}
    assert points(tmp_path, "train/loss") == [(step, 2.0) for step in range(1, 6)]
    assert points(tmp_path, "train/skipped_steps") == [(1, 0.0), (4, 0.0), (5, 1.0), (6, 1.0)]


def test_charts_stand_in_the_order_of_a_persons_questions() -> None:
    assert list(dict.fromkeys(category for category, *_ in CHARTS)) == [
        *("Loss", "Quality", "Speed", "Routing", "Data", "System"),
    ]
    tags = ["memory/rss_gib", "router/mass_far/mean", "router/mass_own/mean", "val/loss", "train/loss"]
    more = [
        "eval/wikitext/perplexity",
        "eval/wikitext/perplexity_stderr",
        "val/accuracy",
        "val/loss_by_source/books",
    ]
    layout = layout_of([*tags, *more])
    assert list(layout) == ["Loss", "Quality", "Routing", "System"]
    assert list(layout["Loss"]) == ["loss", "loss by source"]
    assert layout["Loss"]["loss"] == ["Multiline", ["^train/loss$", "^val/loss$"]]
    assert list(layout["Quality"]) == ["val/accuracy", "eval/wikitext"]
    assert layout_of([]) == {}


def test_the_newest_layout_counts_and_knows_what_came_later(tmp_path: Path) -> None:
    shown = board(tmp_path)
    shown.add(1, {"train/loss": 2.0})
    shown.add(2, {"train/loss": 2.0})
    shown.add(3, {"eval/x/accuracy": 0.5})
    layouts = []
    for event in read(tmp_path).Tensors("custom_scalars__config__"):
        layout = layout_pb2.Layout()
        layout.ParseFromString(event.tensor_proto.string_val[0])
        layouts.append([category.title for category in layout.category])
    assert layouts == [["Loss"], ["Loss", "Quality"]]


def test_settings_by_which_runs_are_compared() -> None:
    chosen = hparams_of(SETTINGS, ["optim.lr", "monitor.webhook", "model.window", "model.unknown"])
    assert chosen == {"model.dim": 64, "optim.lr": 0.1}
    assert hparams_of(SETTINGS, ["seed"])["seed"] == 3
    assert hparams_of("dim: 8") == {}
    assert hparams_of("a: [") == {}


@pytest.mark.parametrize("well", [True, False])
def test_the_run_is_in_hparams_with_how_it_ended(tmp_path: Path, well: bool) -> None:
    shown = board(tmp_path)
    shown.settings(SETTINGS)
    shown.ended(well=well)
    shown.writer.flush()
    content = read(tmp_path).summary_metadata
    start = content[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
    assert (
        hparams_metadata.parse_session_start_info_plugin_data(start).hparams["model.dim"].number_value == 64
    )
    end = hparams_metadata.parse_session_end_info_plugin_data(
        content[hparams_metadata.SESSION_END_INFO_TAG].plugin_data.content
    )
    assert end.status == (1 if well else 2)
    assert end.end_time_secs > 0
