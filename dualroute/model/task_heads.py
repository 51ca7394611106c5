"""What leaves a model that was trained for a task: classes, numbers or scores instead of the next token.

In: hidden states of :class:`~dualroute.model.transformer.DualRoutingTransformer` after the last norm.  Here:
one projection, at the tokens whose output is wanted.  Next: a loss, or whoever asks for a prediction
(:mod:`dualroute.tasks`).

Every head is one of tokens.  A class for a whole text is read at one of its tokens (the last, which has read
all others; the first in a model that reads both ways), or over the mean of its hidden states, so that texts
are packed into windows as documents are and no head has to know how.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualroute.model.ends_config import TaskHeadConfig


class TaskHead(nn.Module):
    """Projection of hidden states onto a task's outputs.

    Args:
        config: What leaves.
        dim: Width of the hidden states.
    """

    def __init__(self, config: TaskHeadConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(dim, config.outputs)

    def init_weights(self, std: float) -> None:
        """Normal(0, ``std``); no bias."""
        nn.init.normal_(self.project.weight, std=std)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, hidden_states: Tensor, rows: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Outputs of the tokens that are wanted.

        Args:
            hidden_states: (B, n, dim).
            rows: (R,) their places in (B · n,); null wants all.
            segment_ids: (B, n), which pooling ``mean`` needs; null is one text a row.

        Returns:
            (R, outputs), or (B, n, outputs) without ``rows``.
        """
        if self.config.pooling == "mean" and self.config.kind in ("sequence", "number"):
            hidden_states = segment_means(hidden_states, segment_ids, rows)
        elif rows is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, rows)
        outputs: Tensor = self.project(hidden_states)
        return outputs


def segment_means(hidden_states: Tensor, segment_ids: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """The mean of each token's text, (B, n, dim) or, of the tokens ``rows`` of (B · n,), (R, dim)."""
    batch, length, dim = hidden_states.shape
    if segment_ids is None:
        means = hidden_states.mean(1, keepdim=True).expand(-1, length, -1)
        return means if rows is None else means.flatten(0, 1).index_select(0, rows)
    # a text is known by its number and its row; there are at most n in a row, and 0 is padding
    keys = (segment_ids + torch.arange(batch, device=segment_ids.device)[:, None] * (length + 1)).flatten()
    sums = hidden_states.new_zeros(batch * (length + 1), dim).index_add_(0, keys, hidden_states.flatten(0, 1))
    counts = torch.bincount(keys, minlength=batch * (length + 1)).clamp_(min=1)
    means = sums / counts[:, None].to(sums.dtype)
    if rows is not None:
        return means.index_select(0, keys.index_select(0, rows))
    return means.index_select(0, keys).view(batch, length, dim)
