"""DUALROUTE_KERNELS decides what a layer runs on; the numbers stay."""

from __future__ import annotations

import sys

import pytest
import torch

from dualroute.attention import DualRouting, Layout, backend
from dualroute.attention.backends.triton.backend import TRITON
from dualroute.attention.verification import check, decide, left_to_torch
from dualroute.attention.verification.correctness import reference
from tests.attention.backends.triton.helpers import DEVICE
from tests.attention.verification.test_correctness import problem

KERNELS = ("routed_attention", "local_attention", "decode_step")


@pytest.fixture
def layer() -> DualRouting:
    torch.manual_seed(0)
    return DualRouting(
        32, 4, num_kv_heads=2, window=6, block=8, sub_block=4, top_k=1, global_mode="routed"
    ).to(DEVICE)


def run(layer: DualRouting) -> list[torch.Tensor]:
    """Output and gradients of a batch, and two steps of decoding."""
    hidden = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    output = layer(hidden)
    gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    with torch.no_grad():
        cache = layer.new_cache(1, 64)
        steps = [layer(hidden[:, part], cache=cache) for part in (slice(38), slice(38, 39), slice(39, 40))]
    return [output.detach(), *gradients, *steps[1:]]


@pytest.mark.slow
def test_a_compiled_layer_runs_on_them_too(layer: DualRouting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "triton")
    torch._dynamo.reset()
    hidden = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    layout = Layout.build(1, 40, 8, segment_ids=torch.arange(40)[None] // 30, device=DEVICE)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output = run(hidden, layout=layout)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        results.append([output.detach(), *gradients])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_gives_the_same_on_both(layer: DualRouting, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(layer)
    used = set()
    for name in KERNELS:
        function = getattr(TRITON, name)

        def noted(*args: object, _name: str = name, _function: object = function, **kwargs: object) -> object:
            used.add(_name)
            return _function(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(TRITON, name, noted)
    assert not used
    monkeypatch.setenv(backend.VARIABLE, "triton")
    for got, wanted in zip(run(layer), plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert used == set(KERNELS)


def test_what_they_cannot_take_runs_in_torch(layer: DualRouting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "triton")
    plain, rows = backend._TORCH, torch.zeros(1, 1, 8, device=DEVICE)
    assert backend.choose(rows) is TRITON
    assert backend.choose(rows.double()) is plain
    assert backend.choose(rows, causal=False, block=8) is TRITON
    assert backend.choose(rows, block=512) is plain
    assert backend.choose(rows, causal=False) is TRITON  # the local route


def test_the_line_of_the_choice_names_what_they_cannot_take() -> None:
    """Of each kind: blocks and heads that the kernels have not; both directions they have."""
    device = torch.device(DEVICE)
    for given, said in (
        ({"block": 512}, ("the global route: block 512 is more than the 256 that the Triton kernels take",)),
        ({"block": 256, "head_dim": 256, "causal": False}, ()),
        ({}, ()),
    ):
        assert left_to_torch(TRITON, [problem(**given)], device) == said  # type: ignore[arg-type]
    wide = problem(head_dim=320)
    assert left_to_torch(TRITON, [wide], device) is None
    (finding,) = decide([wide], device, ("triton",)).findings[1:]
    assert finding.why_not == "head_dim 320 is more than the 256 that the Triton kernels take"


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_values_gradients_blocks_and_a_step_are_right(causal: bool) -> None:
    asked = problem(context=60, causal=causal)
    errors = check(TRITON, asked, reference(asked, torch.device(DEVICE)))
    assert errors.values < 1e-5
    assert errors.gradients < 1e-5


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cutlass")
    with pytest.raises(ValueError, match="DUALROUTE_KERNELS=cutlass is unknown"):
        backend.choose(torch.zeros(1, 1, 8))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.delitem(sys.modules, "dualroute.attention.backends.triton")
    for name in [name for name in sys.modules if name.startswith("dualroute.attention.backends.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="pip install triton"):
        backend.choose(torch.zeros(1, 1, 8))
