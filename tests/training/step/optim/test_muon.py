"""Muon's step: torch's own for whole matrices, part by part, and the same however a matrix is cut up."""

from __future__ import annotations

import math
from copy import deepcopy as copy_of
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dualroute.model import DualRoutingTransformer
from dualroute.model.config import ModelConfig
from dualroute.training.config import MuonConfig, OptimConfig
from dualroute.training.step.optim import HyperParameters, build_optimizer, groups_of
from dualroute.training.step.optim.groups import matrices_of
from dualroute.training.step.optim.muon import Flat, Matrix, MuonWithAdamW, Piece, _portions, orthogonalize

MUON = OptimConfig(name="muon", lr=3e-3, muon=MuonConfig(lr=0.02, weight_decay=0.2))


def model_of(**more: Any) -> DualRoutingTransformer:
    torch.manual_seed(0)
    return DualRoutingTransformer(
        ModelConfig(vocab_size=19, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, window=4, **more)
    )


def drawn(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("shape", [(5, 5), (6, 17), (40, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert 0.6 < values.min() and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    likeness = torch.nn.functional.cosine_similarity(
        orthogonalize(matrix, 5).flatten(), (left @ right).flatten(), dim=0
    )
    assert likeness > 0.95
    assert torch.equal(orthogonalize(torch.zeros(shape), 5), torch.zeros(shape))


@pytest.mark.parametrize(
    ("nesterov", "scale"), [(True, "match_rms_adamw"), (False, "original"), (True, "original")]
)
def test_a_matrix_of_one_part_is_stepped_as_by_torch(nesterov: bool, scale: str) -> None:
    theirs = nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)))
    ours = nn.Parameter(theirs.detach().clone())
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scale
    )
    group = {
        "params": [ours], "kind": "muon", "lr": 0.02, "weight_decay": 0.1,
        "momentum": 0.9, "nesterov": nesterov, "ns_steps": 5, "scale": scale,
    }  # fmt: skip
    optimizer = MuonWithAdamW(
        [group], torch.optim.AdamW, [(ours, Matrix.of([12], [20]))], precision="bfloat16"
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        theirs.grad = torch.randn(12, 20, generator=draw)
        ours.grad = theirs.grad.clone()
        reference.step()
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    own, other = optimizer.state[ours]["exp_avg"], reference.state[theirs]["momentum_buffer"]
    assert torch.equal(own, other)


def test_layers_matrices_are_muons_and_all_else_is_adamws() -> None:
    model = model_of(tie_embeddings=False, gate=True, qk_norm=True, qkv_bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {
        names[id(p)]: (group["kind"], group["weight_decay"])
        for group in groups_of(model, MUON)
        for p in group["params"]
    }
    assert kinds.keys() == set(names.values())
    for name, (kind, _) in kinds.items():
        matrix = name.endswith(("qkv.weight", "out_proj.weight", "gate.weight", "up.weight", "down.weight"))
        expected = "muon" if matrix else {"embedding.weight": "embedding", "head.weight": "head"}.get(name, "rest")
        assert kind == expected, name
    assert kinds["head.weight"][1] > 0 == kinds["embedding.weight"][1]
    optimizer = build_optimizer(model, MUON)
    rates = {group["kind"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates["muon"] == (0.02, 0.2)
    assert rates["embedding"][0] == rates["head"][0] == 3e-3


def test_queries_keys_and_values_and_both_routes_are_orthogonalised_for_themselves() -> None:
    model = model_of(global_heads=2, local_heads=2)
    (matrix,) = [m for p, m in matrices_of(model) if p is model.layers[0].attention.global_qkv.weight]
    # two query heads, one of keys, one of values, of 4 channels
    assert matrix.parts == ((0, 8, 0, 16), (8, 12, 0, 16), (12, 16, 0, 16))
    (both,) = [m for p, m in matrices_of(model) if p is model.layers[0].attention.out_proj.weight]
    assert both.parts == ((0, 16, 0, 8), (0, 16, 8, 16))
    weight = model.layers[0].attention.global_qkv.weight
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
    before = weight.detach().clone()
    # values that are a thousandth of the queries take steps as long as theirs
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad[12:] *= 1e-3
    optimizer.step()
    moved = (weight.detach() - before).norm(dim=1)
    assert moved[12:].mean() / moved[:8].mean() > 0.5
    for top, bottom, _, _ in matrix.parts:
        change = (weight.detach() - before)[top:bottom] / (0.2 * 16**0.5)
        torch.testing.assert_close(change, -orthogonalize(weight.grad[top:bottom], 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_cut_up_over_ranks_the_step_is_that_of_one(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, given the same gradients: ranks in turn, and a sum that has what each of them sent."""
    monkeypatch.setattr("dualroute.training.step.optim.muon._BYTES_AT_ONCE", 3000)
    model, whole = model_of(), model_of()
    config = OptimConfig(name="muon", lr=0.01)
    drawn(whole, 3, build_optimizer(whole, config))

    muon = [(p, m) for p, m in matrices_of(model)]
    total = sum(m.numel for _, m in muon)
    size = -(-total // ranks)
    flat = torch.cat([p.detach().flatten() for p, _ in muon] + [torch.zeros(size * ranks - total)])
    parts, optimizers, places = [], [], []
    for rank in range(ranks):
        begin, offset, pieces = rank * size, 0, []
        for _, m in muon:
            first, last = max(offset, begin), min(offset + m.numel, begin + size)
            cut = offset // size != (offset + m.numel - 1) // size
            count = max(last - first, 0)
            if cut or count:
                pieces.append(Piece(m, first - begin, first - offset, count))
            offset += m.numel
        part = nn.Parameter(flat[begin:][:size].clone())
        group = next(g for g in build_optimizer(model, config).param_groups if g["kind"] == "muon")
        optimizer = MuonWithAdamW([{**group, "params": [part]}], torch.optim.AdamW, [])
        optimizer.divided({part: Flat(pieces, device=torch.device("cpu"))}, {})
        parts.append(part), optimizers.append(optimizer), places.append(pieces)
    cut = [[piece for piece in pieces if not piece.is_whole] for pieces in places]
    assert all([p.matrix for p in c] == [p.matrix for p in cut[0]] for c in cut), "the same on all ranks"

    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradients = {id(p): torch.randn(p.shape, generator=draw) for p in model.parameters()}
        gradient = torch.cat([gradients[id(p)].flatten() for p, _ in muon] + [torch.zeros(size * ranks - total)])
        for rank, part in enumerate(parts):
            part.grad = gradient[rank * size :][:size].clone()
        sent: list[list[torch.Tensor]] = []

        def collect(together: torch.Tensor, group: Any = None, sent: Any = sent) -> None:
            sent[-1].append(together.clone())

        before = [(p.detach().clone(), {k: v.clone() for k, v in o.state[p].items()}) for p, o in zip(parts, optimizers)]
        with mock.patch("torch.distributed.all_reduce", collect):
            for optimizer in optimizers:
                sent.append([])
                optimizer.step()
        sums = [sum(of_ranks[1:], of_ranks[0]) for of_ranks in zip(*sent, strict=True)]
        for (part, optimizer), (weights, state) in zip(zip(parts, optimizers), before):
            part.data.copy_(weights)
            for key, value in state.items():
                optimizer.state[part][key].copy_(value)
            if not state:
                optimizer.state[part].clear()
            answers = iter(sums)
            with mock.patch("torch.distributed.all_reduce", lambda t, group=None: t.copy_(next(answers))):
                optimizer.step()
    found = torch.cat([p.detach() for p in parts])
    expected = torch.cat([p.detach().flatten() for p, _ in matrices_of(whole)])
    assert torch.equal(found[:total], expected)
    assert torch.equal(found[total:], torch.zeros(size * ranks - total))


def test_cut_matrices_are_put_together_in_portions() -> None:
    pieces = [Piece(Matrix.of([size], [1024]), 0, 0, 1) for size in (8, 8, 40000, 1)]
    assert [len(portion) for portion in _portions(pieces, 4)] == [2, 1, 1]
    assert list(_portions([], 4)) == []


def test_settings_are_those_of_the_configuration_whatever_a_state_says() -> None:
    model = model_of()
    optimizer = build_optimizer(model, MUON)
    HyperParameters(optimizer, MUON).write(optimizer, MUON.lr)
    drawn(model, 1, optimizer)
    other = OptimConfig(name="muon", lr=1e-3, embedding_lr=5e-3, muon=MuonConfig(momentum=0.8, scale="original"))
    resumed = build_optimizer(model, other)
    settings = HyperParameters(resumed, other)
    resumed.load_state_dict(optimizer.state_dict())
    settings.write(resumed, 5e-4)
    found = {group["kind"]: group for group in resumed.param_groups}
    assert (found["muon"]["momentum"], found["muon"]["scale"], found["muon"]["lr"]) == (0.8, "original", 5e-4)
    assert found["muon"]["weight_decay"] == found["rest"]["weight_decay"] + 0.1
    assert math.isclose(found["embedding"]["lr"], 2.5e-3)
    assert found["rest"]["betas"] == other.betas
    assert "betas" not in found["muon"]


def test_a_loaded_state_steps_on_as_if_never_saved() -> None:
    straight = model_of()
    optimizer = build_optimizer(straight, MUON)
    drawn(straight, 3, optimizer)
    copy = model_of()
    copy.load_state_dict(straight.state_dict())
    other = build_optimizer(copy, MUON)
    other.load_state_dict(copy_of(optimizer.state_dict()))  # torch would share it
    drawn(straight, 3, optimizer)
    drawn(copy, 3, other)
    for ours, theirs in zip(copy.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_has_no_gradient_stays() -> None:
    model = model_of()
    optimizer = build_optimizer(model, MUON)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
