"""What is right passes in every type and shape; what is wrong in any one way is named."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from dualroute.attention import DualRouting
from dualroute.attention.backend import load
from dualroute.attention.verification import Problem, check, problems_of
from dualroute.attention.verification.correctness import Reference, Wrong, reference
from tests.attention.verification.doubles import Double

CPU = torch.device("cpu")


def problem(
    dtype: torch.dtype = torch.float32, *, context: int = 200, packed: bool = True, **given: object
) -> Problem:
    shape = {"num_kv_heads": 2, "window": 24, "block": 8, "top_k": 2, "sub_block": 4, "global_mode": "routed"}
    layer = DualRouting(dim=32, num_heads=4, **{**shape, **given})  # type: ignore[arg-type]
    (found,) = problems_of(layer, dtype, context, packed=packed)
    return found


@functools.cache
def right(asked: Problem) -> Reference:
    return reference(asked, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_our_back_ends_are_right(name: str, dtype: torch.dtype) -> None:
    asked = problem(dtype)
    errors = check(load(name), asked, right(asked))
    exact = dtype == torch.float64
    assert (errors.values < 1e-12) == exact
    assert (errors.gradients < 1e-12) == exact


@pytest.mark.parametrize(
    "given",
    [
        {"global_mode": "full"},
        {"global_mode": "auto", "auto_break_even": 64},
        {"global_heads": 4},
        {"local_heads": 4},
        {"causal": False},
        {"router": "moment", "far_summary": "first_order"},
        {"router": "mean", "far_summary": "none", "top_k": 0},
        {"packed": False, "context": 197},
        {"context": 1},
        {"context": 30, "block": 64, "sub_block": 16},
    ],
    ids=str,
)
def test_every_kind_of_layer_can_be_checked(given: dict[str, object]) -> None:
    asked = problem(**given)  # type: ignore[arg-type]
    for name in ("torch", "cpp"):
        assert check(load(name), asked, right(asked)).values < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "route", "said"),
    [
        ("values", "local", "local values off by"),
        ("values", "global", "global values off by"),
        ("one_row", "local", "local values off by .* in one row"),
        ("gradients", "local", "local gradient of the key off by"),
        ("gradients", "global", "global gradient of the query off by"),
        ("nan", "global", "global values: not a finite number"),
        ("lazy", "", "blocks: a better one was left out"),
        ("twice", "", "blocks: one was chosen twice"),
        ("ahead", "", "blocks: one was chosen that its token may not read"),
        ("step", "", "a step of decoding off by"),
    ],
)
def test_what_is_wrong_is_named(fault: str, route: str, said: str, dtype: torch.dtype) -> None:
    asked = problem(dtype)
    with pytest.raises(Wrong, match=said):
        check(Double(fault, route), asked, right(asked))
    assert check(Double(), asked, right(asked)).values < 8e-3


def test_documents_of_both_kinds_and_ragged_ends_are_among_those_that_are_checked() -> None:
    asked = problem(context=16384, block=64, sub_block=16, global_mode="auto", top_k=16)
    assert asked.max_exact_blocks == 32
    lengths = asked.checked_documents()
    assert sum(lengths) <= 5000
    assert -(-lengths[0] // 64) > 32 >= -(-lengths[1] // 64)
    assert any(length % 64 for length in lengths)
    assert sum(asked.timed_documents()) == 16384
    far = dataclasses.replace(asked, max_exact_blocks=200)
    assert -(-far.checked_documents()[0] // 64) > 200
    assert sum(dataclasses.replace(asked, max_exact_blocks=None).checked_documents()) == 2048
    assert sum(dataclasses.replace(asked, context=10**6).timed_documents()) == 32768


def test_layers_that_differ_are_problems_of_their_own_and_ranks_divide_the_heads() -> None:
    layers = torch.nn.ModuleList(
        DualRouting(dim=32, num_heads=8, num_kv_heads=4, block=8, sub_block=4, window=window)
        for window in (8, 16, 8)
    )
    first, second = problems_of(layers, torch.bfloat16, 64, packed=True, sequence_ranks=2)
    assert (first.window, first.layers, second.window, second.layers) == (8, 2, 16, 1)
    assert (first.global_heads, first.local_heads, first.group, first.dtype) == (2, 2, 2, "bfloat16")


def test_no_random_number_of_a_run_is_drawn() -> None:
    asked = problem(context=64)
    before = torch.get_rng_state()
    check(load("cpp"), asked, reference(asked, CPU))
    assert torch.equal(before, torch.get_rng_state())
