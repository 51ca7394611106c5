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
from dualroute.training.optim_config import MuonConfig, OptimConfig
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
    assert values.min() > 0.6
    assert values.max() < 1.3
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
        expected = (
            "muon" if matrix else {"embedding.weight": "embedding", "head.weight": "head"}.get(name, "rest")
        )
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


class Rank:
    """One of several, with its part of all matrices laid end to end; the others answer through ``sums``."""

    def __init__(
        self, number: int, size: int, values: torch.Tensor, matrices: list[Matrix], group: Any
    ) -> None:
        self.begin, self.size = number * size, size
        self.part = nn.Parameter(values[self.begin :][:size].clone())
        pieces, offset = [], 0
        for matrix in matrices:
            first, last = max(offset, self.begin), min(offset + matrix.numel, self.begin + size)
            is_cut = offset // size != (offset + matrix.numel - 1) // size
            if is_cut or last > first:
                pieces.append(Piece(matrix, first - self.begin, first - offset, max(last - first, 0)))
            offset += matrix.numel
        self.shared = [piece.matrix for piece in pieces if not piece.is_whole]
        self.optimizer = MuonWithAdamW([{**group, "params": [self.part]}], torch.optim.AdamW, [])
        self.optimizer.divided({self.part: Flat(pieces)})

    def step(self, answer: Any) -> None:
        with mock.patch("torch.distributed.all_reduce", lambda together, group=None: answer(together)):
            self.optimizer.step()

    def sends(self) -> list[torch.Tensor]:
        """What it sends in the step that comes, which is not taken."""
        sent: list[torch.Tensor] = []
        weights, state = self.part.detach().clone(), copy_of(dict(self.optimizer.state[self.part]))
        self.step(lambda together: sent.append(together.clone()))
        self.part.data.copy_(weights)
        self.optimizer.state[self.part] = state
        return sent


@pytest.mark.parametrize("ranks", [1, 3, 5, 7])
def test_cut_up_over_ranks_the_step_is_that_of_one(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, given the same gradients."""
    monkeypatch.setattr("dualroute.training.step.optim.muon._BYTES_AT_ONCE", 3000)
    model, config = model_of(), OptimConfig(name="muon", lr=0.01)
    muon = matrices_of(model)
    total = sum(matrix.numel for _, matrix in muon)
    size = -(-total // ranks)

    def end_to_end(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(
            [*(tensor.detach().flatten() for tensor in tensors), torch.zeros(size * ranks - total)]
        )

    optimizer = build_optimizer(model, config)
    group = next(group for group in optimizer.param_groups if group["kind"] == "muon")
    values = end_to_end([parameter for parameter, _ in muon])
    all_ranks = [Rank(number, size, values, [m for _, m in muon], group) for number in range(ranks)]
    assert all(rank.shared == all_ranks[0].shared for rank in all_ranks), "they would wait for each other"
    assert bool(all_ranks[0].shared) == (ranks > 1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
        gradient = end_to_end([parameter.grad for parameter, _ in muon if parameter.grad is not None])
        for rank in all_ranks:
            rank.part.grad = gradient[rank.begin :][:size].clone()
        sums = [sum(sent) for sent in zip(*(rank.sends() for rank in all_ranks), strict=True)]
        for rank in all_ranks:
            answers = iter(sums)
            rank.step(lambda together, answers=answers: together.copy_(next(answers)))
    found = torch.cat([rank.part.detach() for rank in all_ranks])
    assert torch.equal(found, end_to_end([parameter for parameter, _ in muon]))


def test_cut_matrices_are_put_together_in_portions() -> None:
    pieces = [Piece(Matrix.of([size], [1024]), 0, 0, 1) for size in (8, 8, 40000, 1)]
    assert [len(portion) for portion in _portions(pieces, 4)] == [2, 1, 1]
    assert list(_portions([], 4)) == []


def test_settings_are_those_of_the_configuration_whatever_a_state_says() -> None:
    model = model_of()
    optimizer = build_optimizer(model, MUON)
    HyperParameters(optimizer, MUON).write(optimizer, MUON.lr)
    drawn(model, 1, optimizer)
    other = OptimConfig(
        name="muon", lr=1e-3, embedding_lr=5e-3, muon=MuonConfig(momentum=0.8, scale="original")
    )
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


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (OptimConfig(lr=1e-3), 1.0),
        (OptimConfig(lr=1e-3, base_dim=4), 0.25),
        (OptimConfig(lr=1e-3, base_dim=64, embedding_lr=2e-3), 4.0),
        (OptimConfig(lr=1e-3, base_dim=4, name="muon", muon=MuonConfig(lr=1e-3)), 0.5),
        (OptimConfig(lr=1e-3, base_dim=4, name="muon", muon=MuonConfig(scale="original")), 1.0),
        (OptimConfig(lr=1e-3, base_dim=16, name="muon"), 1.0),
    ],
)
def test_matrices_of_a_wider_model_are_stepped_less(config: OptimConfig, share: float) -> None:
    """dim 16: by the width with AdamW, by its root with Muon; nothing else is."""
    model = model_of()
    optimizer = build_optimizer(model, config)
    settings = HyperParameters(optimizer, config)
    settings.write(optimizer, 5e-4)  # half way
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {id(weight) for weight, _ in matrices_of(model)}
    for name, parameter in model.named_parameters():
        wanted = share * 5e-4 if id(parameter) in matrices else 5e-4
        if name == "embedding.weight" and config.embedding_lr is not None:
            wanted = 1e-3
        assert math.isclose(of[id(parameter)], wanted), name
