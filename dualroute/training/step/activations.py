"""Memory against time: what a training step keeps for its backward pass.

- In: a model whose layers hold an attention and a feed-forward.
- Here: :func:`keep_fewer_activations` makes chosen parts forget their insides and compute them again in the
  backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174), or moves what is kept to the host.
- Next: ``training/initial_model.py`` builds the model so; its losses and gradients are the plain model's, to
  the bit.

The attention is the cheap part to keep.  It holds its inputs, its output and one number
a row, at any length; the feed-forward holds three times its own width.  So ``feed_forward`` frees most of a
layer's memory and never searches for blocks twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualroute.training.step.offload import Offload

__all__ = ["keep_fewer_activations"]


def keep_fewer_activations(
    model: nn.Module, what: str, *, every: int = 1, offload: bool | Offload = False
) -> None:
    """Change ``model.layers`` in place; parameters and their names stay.

    Args:
        model: With ``layers``, each of which has a ``ffn``.
        what: ``none``, ``full`` (whole layers) or ``feed_forward``.
        every: Only layers 0, k, 2k, ...
        offload: Keep what is kept of every layer but the last in the memory of the host until the backward
            pass (:mod:`dualroute.training.step.offload`); true, or the traffic to use.
    """
    traffic = Offload() if offload is True else offload
    last = len(model.layers) - 1  # type: ignore[arg-type]
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        if number % every == 0:
            if what == "full":
                layer.forward = _recomputed(layer.forward)
            elif what == "feed_forward":
                layer.ffn.forward = _recomputed(layer.ffn.forward)
        if traffic:
            layer.forward = traffic.around(layer.forward, layer, stays=number == last)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
