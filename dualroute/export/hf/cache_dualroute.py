"""What a DualRouting model remembers of a batch of texts, as a cache of transformers.

In: embeddings of new tokens (B, n, dim), with a mask where some of them are padding.  Here: rows of the batch
    that hold equally many tokens share one set of layer caches, since these know neither padding nor rows of
    unequal length.  Out: for each such group its rows, its tokens and its caches, for the model to run.

A cache that a call returns without having been asked for one is *deferred*: it holds what the call read, and
is filled when somebody goes on from it.  So a call that nobody continues costs no more than one without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from dualroute.attention.core.cache import LayerCache
from dualroute.attention.decoding import share_again

#: (texts, tokens at most, device of the hidden states) → empty caches, one per layer
NewCaches = Callable[[int, int, torch.device], list[LayerCache]]


@dataclass
class Group:
    """Rows of the batch that hold equally many tokens, and their caches, one per layer."""

    rows: Tensor
    caches: list[LayerCache]


@dataclass
class NewTokens:
    """What a call reads: embeddings (B, n, dim), False at padding (B, n), positions (B, n); null = none."""

    embeddings: Tensor
    mask: Tensor | None
    positions: Tensor | None

    def select(self, rows: Tensor) -> NewTokens:
        """The rows (B',) of the batch, in that order."""
        parts = (self.embeddings, self.mask, self.positions)
        return NewTokens(*(None if part is None else part[rows.to(part.device)] for part in parts))  # type: ignore[arg-type]


class DualRoutingCache(Cache):
    """The keys, values and block statistics of a batch: grows with the texts, follows a beam search.

    Args:
        new_caches: Makes the caches of a group.
        num_layers: Layers of the model.
        expected: Tokens of a text when it is finished, which decides, once, whether the global route of
            ``global_mode="auto"`` reads everything or is routed.
        max_length: Tokens at most.
    """

    def __init__(self, new_caches: NewCaches, num_layers: int, expected: int, max_length: int) -> None:
        super().__init__(layers=[])
        self._new_caches, self._num_layers = new_caches, num_layers
        self.expected, self.max_length = expected, max_length
        self.groups: list[Group] = []
        self.deferred: NewTokens | None = None
        self.width = 0  # columns of the batch seen, padding included

    def defer(self, tokens: NewTokens) -> None:
        """Begin with these tokens, when the next ones come."""
        self.deferred, self.width = tokens, tokens.embeddings.shape[1]

    def grow(self, max_length: int) -> None:
        """Let texts become longer than was said at first."""
        self.max_length = max(max_length, self.max_length)
        for group in self.groups:
            self._limit(group.caches)

    def parts(self, tokens: NewTokens) -> Iterator[tuple[Group, Tensor | None]]:
        """The groups that ``tokens`` belong to, and which of these (B, n) are theirs: null = all of them.

        Groups are split where their rows get unequally many tokens, and a row without any waits.

        Raises:
            ValueError: Another number of rows than before.
        """
        hidden, mask = tokens.embeddings, tokens.mask
        batch, count = hidden.shape[:2]
        if self.groups and self.batch_size != batch:
            raise ValueError(f"the cache has {self.batch_size} rows and the call {batch}")
        counts = torch.full((batch,), count) if mask is None else mask.sum(1).cpu()
        if not self.groups:
            self.groups = [self._begin(rows, hidden.device) for rows in _of_equal(counts)]
        elif mask is not None:
            self.groups = [part for group in self.groups for part in _split(group, counts)]
        self.width += count
        if len(self.groups) == 1 and mask is None:
            yield self.groups[0], None
            return
        kept = torch.ones(batch, count, dtype=torch.bool, device=hidden.device) if mask is None else mask
        for group in self.groups:
            if int(counts[group.rows[0].cpu()]):
                chosen = torch.zeros_like(kept)
                chosen[group.rows] = kept[group.rows]
                yield group, chosen

    def _begin(self, rows: Tensor, device: torch.device) -> Group:
        return Group(rows.to(device), self._limit(self._new_caches(len(rows), self.expected, device)))

    def _limit(self, caches: list[LayerCache]) -> list[LayerCache]:
        for cache in caches:
            cache.max_length = self.max_length
        return caches

    # ---------------------------------------------------------------- what transformers asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def __len__(self) -> int:
        return self._num_layers

    @property
    def batch_size(self) -> int:
        if self.deferred is not None:
            return len(self.deferred.embeddings)
        return sum(len(group.rows) for group in self.groups) or -1

    @property
    def is_initialized(self) -> bool:
        return self.deferred is not None or bool(self.groups)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    def reset(self) -> None:
        self.groups, self.width, self.deferred = [], 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r of the batch goes on with the text of row beam_idx[r]."""
        if self.deferred is not None:
            self.deferred = self.deferred.select(beam_idx)
        groups = []
        for group in self.groups:
            found = beam_idx[:, None] == group.rows.to(beam_idx.device)  # (rows, rows of the group)
            rows, texts = found.nonzero(as_tuple=True)
            if len(rows):
                for cache in group.caches:
                    cache.select(texts)
                groups.append(Group(rows, group.caches))
        self.groups = groups

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a DualRouting cache cannot be cut back, its local heads keep only their window: use greedy "
            "search, sampling or beam search, not assisted decoding"
        )


def _of_equal(counts: Tensor) -> Iterator[Tensor]:
    """Indices of equal numbers, the smallest number first."""
    for count in counts.unique():
        yield (counts == count).nonzero()[:, 0]


def _split(group: Group, counts: Tensor) -> list[Group]:
    """The group in parts whose rows get equally many new tokens."""
    parts = list(_of_equal(counts[group.rows.cpu()]))
    if len(parts) == 1:
        return [group]
    return [
        Group(group.rows[texts.to(group.rows.device)], _some_texts(group.caches, texts)) for texts in parts
    ]


def _some_texts(caches: list[LayerCache], texts: Tensor) -> list[LayerCache]:
    """Caches of the texts (B',) only; those of all stay as they are."""
    parts = [_of_some_texts(cache, texts) for cache in caches]
    share_again(parts)
    return parts


def _of_some_texts(cache: LayerCache, texts: Tensor) -> LayerCache:
    part = copy.copy(cache)
    part.global_cache, part.local_cache = copy.copy(cache.global_cache), copy.copy(cache.local_cache)
    part.select(texts)
    return part
