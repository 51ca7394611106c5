"""The precision of float32 products: chosen by the run's precision and device, or as it is given."""

import pytest
import torch

from dualroute.training.config import TrainConfig
from dualroute.training.step.matmul import set_matmul_precision


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("given", "precision", "on_cuda", "chosen"),
    [
        ("auto", "bf16-mixed", True, "high"),
        ("auto", "16-mixed", True, "high"),
        ("auto", "32", True, "highest"),
        ("auto", "bf16-mixed", False, "highest"),
        ("highest", "bf16-mixed", True, "highest"),
        ("medium", "32", False, "medium"),
    ],
)
def test_the_choice_is_made_for_the_process(given, precision, on_cuda, chosen):
    torch.set_float32_matmul_precision("high" if chosen != "high" else "highest")
    train = TrainConfig(precision=precision, float32_matmul_precision=given)
    assert set_matmul_precision(train, on_cuda=on_cuda) == chosen
    assert torch.get_float32_matmul_precision() == chosen
