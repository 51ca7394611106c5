"""Muon for the matrices of the layers, AdamW for all else, in one optimizer.

In: gradients, of whole parameters or, under ZeRO, of the part that is this rank's.  Here: the mean of a
matrix's gradients is *orthogonalised*, its singular values brought near 1 by a few Newton–Schulz products,
and that is the direction of the step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaled
as in Liu et al. 2025, https://arxiv.org/abs/2502.16982, §2.2).  Next: the weights.

``torch.optim.Muon`` steps whole 2-D parameters.  This one is the same step (a test compares them) of what is
less or more than that: each of the matrices that lie side by side in one weight is orthogonalised for itself,
and a matrix that ZeRO has cut up is put together for the one product that needs it whole.  Its running mean
is element by element, so it is divided, saved and cut up anew just as AdamW's are; it has AdamW's name for
it.

A rank sends the direction of the matrices that it has only a part of, in the arithmetic of the products, and
gets their sum with what the others have: zeros, so nothing is rounded, and any number of ranks steps as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# of the quintic polynomial; torch.optim.Muon has the same
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_LEAST_NORM = 1e-7
_BYTES_AT_ONCE = 64 * 2**20  # of cut matrices that are put together


@dataclass(frozen=True)
class Matrix:
    """A weight, and what is orthogonalised for itself in it.

    Attributes:
        rows: Of the weight.
        columns: Of the weight.
        parts: (first row, last, first column, last) of each, the last ones excluded.
    """

    rows: int
    columns: int
    parts: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, rows: Sequence[int], columns: Sequence[int]) -> Matrix:
        """One whose parts have these rows and columns; together they are all of it."""
        row_ends, column_ends = ([0, *accumulate(sizes)] for sizes in (rows, columns))
        parts = tuple(
            (top, bottom, left, right)
            for top, bottom in pairwise(row_ends)
            for left, right in pairwise(column_ends)
            if top < bottom and left < right
        )
        return cls(row_ends[-1], column_ends[-1], parts)

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Piece:
    """The elements ``first`` to ``first + count`` of a matrix, from ``start`` on in a flat parameter."""

    matrix: Matrix
    start: int
    first: int
    count: int

    @property
    def is_whole(self) -> bool:
        return self.count == self.matrix.numel


@dataclass(frozen=True)
class Flat:
    """What lies in a flat parameter that ZeRO has made of many.

    Attributes:
        pieces: This rank's, and one of no elements for each matrix that only other ranks share: those that
            are not whole are the same matrices on all ranks, in one order.
        group: The ranks that share them; null: all of them are whole.
        device: Where the products are done, and the ranks meet.
    """

    pieces: list[Piece]
    group: Any = None
    device: torch.device | None = None


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """The matrix with its singular values near 1 (about 0.7 to 1.2), by a Newton–Schulz iteration.

    Args:
        matrix: (rows, columns), in the arithmetic that the products are to have.
        steps: Iterations; 5 serve.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for groups whose ``kind`` is muon, AdamW for the others.

    Args:
        groups: Each with its ``kind``, ``lr`` and ``weight_decay``; those of Muon with ``momentum``,
            ``nesterov``, ``ns_steps`` and ``scale`` besides.
        adamw: Makes the AdamW of the others.
        matrices: What each parameter of Muon is.
        precision: Arithmetic of the products; auto: bfloat16 on CUDA, float32 elsewhere.

    Attributes:
        matrices: Of the parameters as the model has them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: Callable[[list[dict[str, Any]]], torch.optim.AdamW],
        matrices: Sequence[tuple[Tensor, Matrix]],
        precision: str = "auto",
    ) -> None:
        others = [group for group in groups if group["kind"] != "muon"]
        self._adamw = adamw(others) if others else None  # fills in what AdamW's groups have
        super().__init__(groups, {})
        self.matrices: dict[Tensor, Matrix] = dict(matrices)
        self._flat: dict[Tensor, Flat] = {}
        self._precision = precision

    def divided(self, flat: Mapping[Tensor, Flat]) -> None:
        """Its parameters are others now: what lies in each of them."""
        self._flat = dict(flat)

    def is_flat_matrices(self, parameter: Tensor) -> bool:
        """Whether it is one of Muon's that :meth:`divided` has named."""
        return parameter in self._flat

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._adamw is not None:
            # load_state_dict makes both anew, and DeepSpeed steps one group after the other
            self._adamw.param_groups = [group for group in self.param_groups if group["kind"] != "muon"]
            self._adamw.state = self.state
            self._adamw.step()
        for group in self.param_groups:
            if group["kind"] == "muon":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        flat = self._flat.get(parameter)
        if flat is None:
            matrix = self.matrices[parameter]
            whole = direction.to(self._dtype(direction.device))
            parameter.add_(self._change(whole, matrix, group))
            return
        for piece, whole in self._wholes(direction, flat):
            change = self._change(whole, piece.matrix, group).flatten()[piece.first :][: piece.count]
            parameter.narrow(0, piece.start, piece.count).add_(change.to(parameter.device))

    def _dtype(self, device: torch.device) -> torch.dtype:
        narrow = device.type == "cuda" if self._precision == "auto" else self._precision == "bfloat16"
        return torch.bfloat16 if narrow else torch.float32

    def _change(self, whole: Tensor, matrix: Matrix, group: Mapping[str, Any]) -> Tensor:
        """What is added to the weight: float32."""
        change = torch.empty(whole.shape, dtype=torch.float32, device=whole.device)
        for top, bottom, left, right in matrix.parts:
            part = slice(top, bottom), slice(left, right)
            rate = group["lr"] * scale_of(bottom - top, right - left, group["scale"])
            change[part] = orthogonalize(whole[part], group["ns_steps"]).float().mul_(-rate)
        return change

    def _wholes(self, direction: Tensor, flat: Flat) -> Iterator[tuple[Piece, Tensor]]:
        """The pieces of this rank, each with the whole matrix that it is one of.  Collective."""
        device = flat.device or direction.device
        dtype = self._dtype(device)
        for piece in flat.pieces:
            if piece.is_whole:
                own = direction.narrow(0, piece.start, piece.count)
                yield piece, own.view(piece.matrix.rows, -1).to(device=device, dtype=dtype)
        for pieces in _portions([piece for piece in flat.pieces if not piece.is_whole], dtype.itemsize):
            together = torch.zeros(sum(piece.matrix.numel for piece in pieces), dtype=dtype, device=device)
            places = together.split([piece.matrix.numel for piece in pieces])
            for piece, place in zip(pieces, places, strict=True):
                if piece.count:
                    own = direction.narrow(0, piece.start, piece.count)
                    place[piece.first :][: piece.count] = own
            dist.all_reduce(together, group=flat.group)
            for piece, place in zip(pieces, places, strict=True):
                if piece.count:
                    yield piece, place.view(piece.matrix.rows, -1)


def _portions(pieces: list[Piece], itemsize: int) -> Iterator[list[Piece]]:
    portion: list[Piece] = []
    size = 0
    for piece in pieces:
        bytes_of = piece.matrix.numel * itemsize
        if portion and size + bytes_of > _BYTES_AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append(piece)
        size += bytes_of
    if portion:
        yield portion


def scale_of(rows: int, columns: int, scale: str) -> float:
    """Factor of the learning rate for a matrix of this shape.

    match_rms_adamw gives the step the root mean square that AdamW's have, about 0.2 of the rate; original
    gives it a spectral norm that goes with the root of rows / columns.
    """
    if scale == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
