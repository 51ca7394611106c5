"""A micro-batch of packed documents asks the device for nothing: the loader worked it out beforehand."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from dualroute.attention import routes
from dualroute.attention.backends.flash import select
from dualroute.attention.backends.flash.backend import FLASH
from dualroute.attention.core import precision
from dualroute.data.reader import IGNORE_INDEX, collate
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.config import TrainConfig
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.module import Pretrain

CONTEXT = 256
CONFIG = ModelConfig(
    dim=32,
    num_layers=2,
    num_heads=4,
    vocab_size=100,
    window=16,
    block=16,
    top_k=1,
    global_mode="routed",
    gate=True,
)


def windows() -> list[dict[str, np.ndarray]]:
    """Two windows of documents of 200, 40 and 7 tokens and some padding."""
    segments = np.repeat([1, 2, 3, 0], [200, 40, 7, 9])
    ids = np.arange(CONTEXT) % 100
    labels = np.where(segments == 0, IGNORE_INDEX, (ids + 1) % 100)
    window = {
        "input_ids": ids,
        "labels": labels,
        "segment_ids": segments,
        "positions": np.arange(CONTEXT),
        "num_targets": np.array(494),
    }
    return [window, window]


def on_device(batch: dict, fake: FakeTensorMode) -> dict:
    """The batch without its numbers, but for what stays on the host: whoever asks for one gets an error."""
    return {
        name: fake.from_tensor(part) if isinstance(part, torch.Tensor) and part.ndim else part
        for name, part in batch.items()
    }


def loss_sums(batch: dict) -> object:
    """Forward and backward of one micro-batch, in the branches that a CUDA device takes."""
    model = DualRoutingTransformer(CONFIG)
    module = Pretrain(model, OptimConfig(), TrainConfig(), None, {})
    sums = module._loss_sums(batch, 1e-4)
    sums.total.backward()
    return sums


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "choose", lambda *args, **kwargs: FLASH)
    monkeypatch.setattr(precision, "has_wide_product", lambda rows: rows.dtype == torch.bfloat16)
    monkeypatch.setattr(select, "takes_first_of_equals", lambda device: True)


def test_a_packed_micro_batch_reads_nothing_back() -> None:
    plan = DualRoutingTransformer(CONFIG).layout_plan()
    batch = collate(windows(), layout=plan)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        sums = loss_sums(on_device(batch, fake))
    assert sums.total.shape == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize("missing", ["layout", "label_rows"])
def test_without_what_the_loader_made_it_would(missing: str) -> None:
    batch = collate(windows(), layout=DualRoutingTransformer(CONFIG).layout_plan())
    del batch[missing]
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        loss_sums(on_device(batch, fake))


def test_what_the_loader_made_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    model = DualRoutingTransformer(CONFIG)
    module = Pretrain(model, OptimConfig(), TrainConfig(), None, {})
    losses = [
        module._loss_sums(batch, 1e-4)
        for batch in (collate(windows(), layout=model.layout_plan()), collate(windows()))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
    assert int(losses[0].count) == 494
