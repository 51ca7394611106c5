"""A quantised cache: complete blocks are rounded once, the newest block is not, and nothing else differs."""

import itertools

import pytest
import torch

from dualroute.attention import DualRouting, reference
from dualroute.attention.core.storage.quantized_cache import QuantizedGlobalCache, pack, to_grid, unpack
from dualroute.attention.decoding import _global_tokens, decode_global

BLOCK, SUB_BLOCK, TOP_K, DIM = 8, 4, 2, 12


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [2, 3])
def test_numbers_are_rounded_to_half_a_step_of_a_grid_that_holds_them(bits, dim):
    torch.manual_seed(0)
    numbers = torch.randn(2, 3, 8, 6, dtype=torch.float64) * torch.logspace(-6, 3, 6) + torch.linspace(
        -9, 50, 6
    )
    numbers[1, 2] = 5.0 / 3  # no step at all
    grid, codes = to_grid(numbers, dim, bits)
    assert grid.dtype == torch.bfloat16
    low, step = grid.double().split(1, dim=dim)
    error = (low + step * codes - numbers).abs()
    assert (error <= step / 2 * (1 + 1e-12)).all()
    assert (low <= numbers).all()
    assert int(codes.max()) == 2**bits - 1
    width = (numbers.amax(dim) - numbers.amin(dim)).unsqueeze(dim)
    slack = low.abs() / 2**7  # of bfloat16, which low was rounded down to
    assert (step * (2**bits - 1) <= (width + slack) * (1 + 2**-7)).all()
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).shape[-1] == 6 * bits // 8


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_rounded_away(number):
    numbers = torch.randn(1, 1, 8, 6)
    numbers[0, 0, 3, 2] = number
    grid, _ = to_grid(numbers, 2, 4)
    assert grid[..., 2].isnan().all()
    assert grid[..., [0, 1, 3, 4, 5]].isfinite().all()


def _rounded(rows, dim, bits):
    """Complete blocks of rows (R, n, d) as a cache stores them, the rest as it is."""
    complete = rows.shape[1] // BLOCK * BLOCK
    blocks = rows[:, :complete].unflatten(1, (-1, BLOCK))
    grid, codes = to_grid(blocks, dim, bits)
    low, step = grid.double().split(1, dim=dim)
    return torch.cat([(low + step * codes).flatten(1, 2), rows[:, complete:]], dim=1)


def _token(query, key, value, router, far_summary, bits):
    """The newest token (H, d), literally: past blocks rounded, their moments those of exact rows."""
    heads, length, own = query.shape[0], key.shape[1], (key.shape[1] - 1) // BLOCK
    past = own * BLOCK
    keys, values = (
        torch.cat([_rounded(rows[:, :past], dim, bits), rows[:, past:]], dim=1)
        for rows, dim in ((key, 2), (value, 3))
    )
    group = heads // len(key)
    scores = []
    for number in range(1, own):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        scored = keys if router == "minmax" else key
        if router == "minmax":
            scores.append(reference.block_score(query[:, None], scored[:, block], router, SUB_BLOCK)[:, 0])
        else:
            mean = key[:, block].mean(1).bfloat16().double()
            variance = key[:, block].var(1, unbiased=False).bfloat16().double()
            rows = query.unflatten(0, (-1, group))
            first, second = (rows * mean[:, None]).sum(-1), (rows**2 * variance[:, None]).sum(-1)
            scores.append((first if router == "mean" else first / DIM**0.5 + second / 2 / DIM).sum(1))
    out = []
    for head in range(heads):
        row = head // group
        ranking = [float(score[row]) for score in scores]
        chosen = sorted(range(len(ranking)), key=lambda number: -ranking[number])[:TOP_K]
        read = {0, own, *(number + 1 for number in chosen)}
        logits, of = [], []
        for number in range(own + 1):
            block = slice(number * BLOCK, min((number + 1) * BLOCK, length))
            if number in read:
                logits.append(keys[row, block] @ query[head] / DIM**0.5)
                of.append(values[row, block])
            elif far_summary != "none":
                mean = key[row, block].mean(0).bfloat16().double()
                variance = key[row, block].var(0, unbiased=False).bfloat16().double()
                logit = torch.tensor(BLOCK).double().log() + mean @ query[head] / DIM**0.5
                if far_summary == "second_order":
                    logit = logit + query[head] ** 2 @ variance / 2 / DIM
                logits.append(logit[None])
                of.append(value[row, block].mean(0, keepdim=True).bfloat16().double())
        out.append(torch.cat(logits).softmax(0) @ torch.cat(of))
    return torch.stack(out)


def _cache(bits, router="minmax", far_summary="second_order", capacity=9):
    return QuantizedGlobalCache(
        2, capacity, DIM, BLOCK, router, SUB_BLOCK, far_summary, None, torch.float64, bits
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("router", "far_summary"),
    [("minmax", "second_order"), ("minmax", "none"), ("moment", "second_order"), ("mean", "first_order")],
)
def test_every_token_reads_what_the_formulas_say(router, far_summary, bits):
    """In float64; across block edges; in chunks of any size, and one by one; for grouped heads."""
    torch.manual_seed(1)
    length = 61
    query = torch.randn(4, length, DIM, dtype=torch.float64)
    key, value = torch.randn(2, 2, length, DIM, dtype=torch.float64)
    expected = torch.stack(
        [
            _token(query[:, at], key[:, : at + 1], value[:, : at + 1], router, far_summary, bits)
            for at in range(length)
        ],
        dim=1,
    )
    grouped = query.unflatten(0, (2, 2))
    for ends in ([1, 8, 9, 20, 40, 48, 61], range(1, 62)):
        cache = _cache(bits, router, far_summary)
        with torch.no_grad():
            outputs = [
                _global_tokens(
                    grouped[:, :, begin:end], key[:, begin:end], value[:, begin:end], cache, TOP_K, False
                )
                for begin, end in itertools.pairwise((0, *ends))
            ]
        found = torch.cat(outputs, dim=2).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
def test_reading_everything(bits):
    """`exact`, as in a dense model: full attention over rounded blocks and the exact newest one."""
    torch.manual_seed(2)
    query = torch.randn(2, 1, 1, DIM, dtype=torch.float64)
    key, value = torch.randn(2, 2, 29, DIM, dtype=torch.float64)
    cache = _cache(bits)
    with torch.no_grad():
        cache.append(key, value)
        found = decode_global(query, cache, TOP_K, True)[:, :, 0]
    keys, values = (_rounded(rows, dim, bits) for rows, dim in ((key, 2), (value, 3)))
    expected = reference.attend(query[:, 0], keys, values, torch.ones(1, 1, 29, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_a_layer_decodes_close_to_its_forward_pass(cache_dtype):
    torch.manual_seed(0)
    layer = DualRouting(32, 4, num_kv_heads=2, window=6, block=8, sub_block=4, top_k=1, global_mode="routed")
    hidden = torch.randn(2, 60, 32)
    cache = layer.new_cache(2, 60, cache_dtype=cache_dtype)
    with torch.no_grad():
        whole = layer(hidden)
        parts = [layer(hidden[:, :20], cache=cache)]
        parts += [layer(hidden[:, at : at + 1], cache=cache) for at in range(20, 60)]
        error = (torch.cat(parts, 1) - whole).norm() / whole.norm()
        assert 0 < error < {"int8": 0.01, "int4": 0.1}[cache_dtype]
        cache.select(torch.tensor([1, 1]))  # as a beam search goes on
        cache.max_length = 61
        again = layer(hidden[1:, :1].expand(2, 1, 32), cache=cache)
    assert torch.equal(again[0], again[1])


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match="cache_dtype=int5 is unknown: did you mean int"):
        DualRouting(32, 4).new_cache(1, 60, cache_dtype="int5")


@pytest.mark.parametrize("offload", [False, True])
def test_blocks_of_similar_keys(tmp_path, offload):
    """What moves to another block is rounded anew: alike in chunks and one by one, and close to floats."""
    torch.manual_seed(0)
    layer = DualRouting(32, 4, window=6, block=8, sub_block=4, top_k=1, cluster_span=32, global_mode="routed")
    hidden = torch.randn(2, 90, 32)
    options = {"cache_dtype": "int8", "cache_offload": tmp_path if offload else None}
    outputs, caches = [], []
    with torch.no_grad():
        whole = layer(hidden)
        for ends in ([20, 23, 60, 90], [20, *range(21, 91)]):
            caches.append(layer.new_cache(2, 90, capacity=16, **options))
            parts = itertools.pairwise((0, *ends))
            outputs.append(torch.cat([layer(hidden[:, a:b], cache=caches[-1]) for a, b in parts], 1))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    assert 0 < (outputs[1] - whole).norm() / whole.norm() < 0.02
    places = caches[0].global_cache.places
    assert (places.sort(1).values == torch.arange(places.shape[1])).all()
    assert not torch.equal(places[0].sort().values, places[0])
