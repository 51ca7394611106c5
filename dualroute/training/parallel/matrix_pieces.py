"""Which matrices Muon steps in the flat parameters that DeepSpeed makes of a model.

In: DeepSpeed's wrapper of the optimizer, which has put flat partitions in the place of the model's
parameters.  Here: the optimizer is told what lies where.  Next: it puts cut matrices together in each step
(``training/step/optim/muon.py``).

DeepSpeed 0.19 has a Muon of its own for ZeRO.  It orthogonalises before the norm is taken and clips what
comes out, knows one matrix of queries, keys and values, and keeps a state that cannot be cut up for other
ranks, so a run of several ranks would be another one than that of one process.
"""

from __future__ import annotations

from typing import Any

import torch

from dualroute import compat
from dualroute.errors import UserError
from dualroute.training.step.optim.muon import Flat, MuonWithAdamW, Piece


def refuse_copies(stage: int, plain: bool) -> None:
    """Refuse stage 0 over float32 copies: DeepSpeed steps them once before they can be told from others.

    Raises:
        UserError: ``stage`` is 0, and not ``plain``.
    """
    if stage == 0 and not plain:
        raise UserError(
            "optim.name muon cannot be used with train.precision bf16-true at parallel.zero_stage 0: use "
            "stage 1, or parallel.strategy ddp"
        )


def tell_pieces(optimizer: MuonWithAdamW, wrapper: Any, device: torch.device) -> None:
    """Tell ``optimizer`` what its parameters are now.

    Args:
        optimizer: Made over the parameters of the model.
        wrapper: What DeepSpeed steps it through; the optimizer itself at stage 0.
        device: Of this rank; products of a state on the host are done there too.
    """
    if wrapper is optimizer:
        return
    matrices = optimizer.matrices
    flat: dict[torch.Tensor, Flat] = {}
    for parameter, group, inside in compat.divided_parameters(wrapper):
        if not inside or inside[0][0] not in matrices:
            continue
        pieces = [
            Piece(matrices[own], start, first, count)
            for own, first, start, count, is_cut in inside
            if is_cut or count
        ]
        flat[parameter] = Flat(pieces, group, device)
    optimizer.divided(flat)
