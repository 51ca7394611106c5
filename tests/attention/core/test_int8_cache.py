"""An int8 cache: rounded once, when a token is written, and nothing else differs from a float one."""

import pytest
import torch

from dualroute.attention import DualRouting
from dualroute.attention.backends.torch.decode import decode_local
from dualroute.attention.core.cache import to_int8
from dualroute.attention.decoding import decode_global


def test_rows_are_rounded_to_half_a_step():
    rows = torch.randn(3, 5, 16) * torch.logspace(-6, 3, 5)[:, None]
    rows[1, 2] = 0
    integers, scales = to_int8(rows)
    assert integers.dtype == torch.int8
    assert ((integers * scales - rows).abs() <= scales / 2 * 1.001).all()
    assert torch.equal(integers[1, 2], torch.zeros(16, dtype=torch.int8))


@pytest.mark.parametrize("global_mode", ["routed", "full"])
@pytest.mark.parametrize("steps", [1, 7])
def test_decoding_reads_the_rounded_rows(global_mode, steps):
    """Over an int8 cache a step gives what it gives over a float cache that holds the rounded rows."""
    torch.manual_seed(0)
    layer = DualRouting(32, 4, window=6, block=8, sub_block=4, top_k=2, global_mode=global_mode)
    stored, wide = layer.new_cache(2, 80, int8=True), layer.new_cache(2, 80)
    assert stored.global_cache.keys.dtype == torch.int8
    assert stored.global_cache.features.dtype == torch.float32
    for _ in range(8):
        keys, values = torch.randn(4, 8, 8), torch.randn(4, 8, 8)
        rounded = [integers * scales for integers, scales in map(to_int8, (keys, values))]
        for part in ("global_cache", "local_cache"):
            getattr(stored, part).append(keys, values)
            getattr(wide, part).append(*rounded)
    query, key = torch.randn(4, 1, steps, 8), torch.randn(4, steps, 8)
    rounded = torch.mul(*to_int8(key))
    stored.global_cache.append(key, key)
    wide.global_cache.append(rounded, rounded)
    with torch.no_grad():
        found = decode_global(query, stored.global_cache, 2, stored.exact)
        expected = decode_global(query, wide.global_cache, 2, wide.exact)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if steps == 1:  # a chunk reads its own keys before they are rounded
            found = decode_local(query, key, key, stored.local_cache)
            expected = decode_local(query, rounded, rounded, wide.local_cache)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_decodes_close_to_its_forward_pass_over_an_int8_cache():
    torch.manual_seed(0)
    layer = DualRouting(32, 4, num_kv_heads=2, window=6, block=8, sub_block=4, top_k=1, global_mode="routed")
    hidden = torch.randn(2, 60, 32)
    cache = layer.new_cache(2, 60, int8=True)
    with torch.no_grad():
        whole = layer(hidden)
        parts = [layer(hidden[:, :20], cache=cache)]
        parts += [layer(hidden[:, at : at + 1], cache=cache) for at in range(20, 60)]
    error = (torch.cat(parts, 1) - whole).norm() / whole.norm()
    assert 0 < error < 0.02
