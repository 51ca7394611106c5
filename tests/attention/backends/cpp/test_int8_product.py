"""One row times an int8 weight by the C++ kernels: the product of the widened numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention.backends.cpp import C_FUNCTIONS, int8_panels, int8_product
from dualroute.attention.backends.cpp.build import load


def _weight(columns: int, inner: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(columns + inner)
    return torch.randint(-128, 128, (columns, inner), dtype=torch.int8), torch.rand(columns, 1) + 0.5


@pytest.fixture(autouse=True)
def _loaded() -> None:
    load()


@pytest.mark.parametrize("inner", [1, 2, 63, 256, 705])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 300])
def test_the_product(columns: int, inner: int) -> None:
    weight, scale = _weight(columns, inner)
    row = torch.randn(1, inner)
    expected = (row.double() @ weight.double().t() * scale[:, 0].double()).float()
    out = int8_product(row, int8_panels(weight, scale), columns)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_bfloat16_is_rounded_once() -> None:
    """Sums are float32; only the result is bfloat16."""
    weight, scale = _weight(130, 500)
    row, panels = torch.randn(1, 500).bfloat16(), int8_panels(weight, scale)
    assert torch.equal(int8_product(row, panels, 130), int8_product(row.float(), panels, 130).bfloat16())


def test_threads_change_nothing() -> None:
    weight, scale = _weight(2000, 300)
    row, panels, threads = torch.randn(1, 300), int8_panels(weight, scale), torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(int8_product(row, panels, 2000))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


def test_a_row_that_is_not_contiguous() -> None:
    weight, scale = _weight(70, 40)
    panels, rows = int8_panels(weight, scale), torch.randn(40, 3)
    assert torch.equal(
        int8_product(rows.t()[1:2], panels, 70), int8_product(rows[:, 1].clone()[None], panels, 70)
    )


@pytest.mark.parametrize(("inner", "columns"), [(39, 70), (40, 129)])
def test_panels_of_another_shape_are_refused(inner: int, columns: int) -> None:
    weight, scale = _weight(70, 40)
    with pytest.raises(ValueError, match=f"a row of {inner} numbers or {columns} columns do not fit"):
        int8_product(torch.randn(1, inner), int8_panels(weight, scale), columns)


def test_panels_hold_the_weight_and_its_scales() -> None:
    weight, scale = _weight(70, 5)
    panels = int8_panels(weight, scale)
    assert panels.shape == (2, 9, 64)
    numbers = panels[:, :5].transpose(1, 2).flatten(0, 1)
    scales = panels[:, 5:].flatten(1).contiguous().view(torch.float32).flatten()
    assert torch.equal(numbers[:70], weight)
    assert torch.equal(scales[:70], scale[:, 0])
    assert not numbers[70:].any()


def test_the_operator_is_one_that_compilers_may_call() -> None:
    weight, scale = _weight(70, 40)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.dualroute.int8_product.default,
            (torch.randn(1, 40, dtype=dtype), int8_panels(weight, scale), 70),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiled_programs_find_its_functions() -> None:
    """By the names that they are told, with as many arguments as the operators have."""
    for operator, (declared,) in C_FUNCTIONS.items():
        name, arguments = declared.removeprefix("AOTITorchError ").rstrip(")").split("(")
        assert hasattr(load(), name)
        assert len(arguments.split(", ")) == len(operator._schema.arguments) + 1
