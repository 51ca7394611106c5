"""The specification itself: against torch's attention, and against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dualroute.attention import reference
from tests.attention.helpers import heads


def _document(length: int = 21) -> tuple[torch.Tensor, ...]:
    return tuple(rows[0].detach() for rows in heads(1, length))


@pytest.mark.parametrize("causal", [True, False])
def test_full_is_scaled_dot_product_attention(causal: bool) -> None:
    query, key, value = _document()
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(reference.full(query, key, value, causal=causal), wanted)


def test_the_window_counts_the_token_itself() -> None:
    query, key, value = _document()
    torch.testing.assert_close(reference.local(query, key, value, window=1), value.repeat_interleave(2, 0))
    with_one_more = reference.local(query, key, value, window=2)
    token = F.scaled_dot_product_attention(query[:1, 9:10], key[:1, 8:10], value[:1, 8:10])
    torch.testing.assert_close(with_one_more[:1, 9:10], token)


def test_a_row_without_keys_gives_zero() -> None:
    query, key, value = (rows[:2] for rows in _document())
    allowed = torch.ones(21, 21, dtype=torch.bool)
    allowed[4] = False
    assert not reference.attend(query, key, value, allowed)[:, 4].any()


def test_routed_against_a_loop_over_one_token() -> None:
    query, key, value = _document(27)
    block, top_k, token, head = 4, 2, 25, 3
    q, k, v = query[head, token], key[1], value[1]
    group = query[2:4, token]  # the heads that share key head 1
    bounds = {}
    for number in range(1, token // block):
        tokens = k[number * block : (number + 1) * block]
        bounds[number] = max(
            sum(float(torch.maximum(g * half.amin(0), g * half.amax(0)).sum()) for g in group)
            for half in tokens.split(2)
        )
    chosen = sorted(bounds, key=lambda number: -bounds[number])[:top_k]
    logits, values = [], []
    for s in range(token + 1):
        if s // block in (0, token // block, *chosen):
            logits.append(float(q @ k[s]) / 2)
            values.append(v[s])
    for number in set(bounds) - set(chosen):
        tokens = k[number * block : (number + 1) * block]
        variance = tokens.var(0, unbiased=False)
        logits.append(math.log(block) + float(q @ tokens.mean(0)) / 2 + float((q**2) @ variance) / 8)
        values.append(v[number * block : (number + 1) * block].mean(0))
    wanted = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) @ torch.stack(values)
    got = reference.routed(query, key, value, block=block, top_k=top_k, sub_block=2)
    torch.testing.assert_close(got[head, token], wanted)


def test_the_einsum_often_shown_for_local_attention_is_not_local() -> None:
    query, key, value = (rows[:1] for rows in _document(24))
    block = 4
    windows = [rows.view(1, -1, block, 4) for rows in (query, key, value)]
    scores = torch.einsum("bqwd,bkwd->bqwk", *windows[:2]) / 2
    wrong = torch.einsum("bqwk,bkwd->bqwd", scores.softmax(-1), windows[2]).flatten(1, 2)
    distance = torch.arange(24)[:, None] - torch.arange(24)
    torch.testing.assert_close(wrong, reference.attend(query, key, value, distance % block == 0))
    right = reference.block_local(query, key, value, block=block, causal=False)
    same_block = torch.arange(24)[:, None] // block == torch.arange(24) // block
    torch.testing.assert_close(right, reference.attend(query, key, value, same_block))
