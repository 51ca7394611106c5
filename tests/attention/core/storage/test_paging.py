"""Keys and values in a file: the same numbers, nothing left behind, and a full disk named."""

import errno
import os

import pytest
import torch

from dualroute.attention import DualRouting
from dualroute.attention.core.storage import paging
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.decoding.compiled_decode import CompiledDecoder


def _layer():
    torch.manual_seed(0)
    layer = DualRouting(32, 4, window=6, block=8, sub_block=4, top_k=1, global_mode="routed")
    return layer.requires_grad_(False)


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("cache_dtype", ["auto", "int4"])
def test_a_paged_cache_gives_the_same_bits(tmp_path, cache_dtype):
    layer, hidden = _layer(), torch.randn(2, 70, 32)
    caches = [
        layer.new_cache(2, 70, cache_dtype=cache_dtype, cache_offload=offload) for offload in (None, tmp_path)
    ]
    assert not any(tmp_path.iterdir())  # a file without a name
    for begin, end in [(0, 20), (20, 45), *((at, at + 1) for at in range(45, 70))]:
        ours, theirs = (layer(hidden[:, begin:end], cache=cache) for cache in caches)
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cache_offload cannot be put in another order"):
        caches[1].select(torch.tensor([0]))


def test_models_page_too(tmp_path):
    torch.manual_seed(0)
    model = DualRoutingTransformer(
        ModelConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, window=8, block=8, sub_block=4, top_k=1,
                    global_mode="routed", max_context=128)
    ).eval()  # fmt: skip
    ids, decoder = torch.randint(50, (1, 60)), CompiledDecoder(model, compile=False)
    caches = model.new_caches(1, 60, cache_dtype="int8", cache_offload=str(tmp_path))
    others = model.new_caches(1, 60, cache_dtype="int8")
    with torch.no_grad():
        for begin, end in [(0, 20), *((at, at + 1) for at in range(20, 60))]:
            expected = model.head(model.hidden_states(ids[:, begin:end], caches=others)[:, -1])
            torch.testing.assert_close(decoder(ids[:, begin:end], caches), expected, rtol=1e-5, atol=1e-5)
    for folder, named in (
        (str(tmp_path / "none"), "there is no such folder"),
        ("host", "on the CPU already"),
    ):
        with pytest.raises(UserError, match=named):
            model.new_caches(1, 60, cache_offload=folder)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(file, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(paging, "_reserve", full)
    with pytest.raises(OSError, match=r"no room for 4,608 bytes of keys or values, .* free") as error:
        _layer().new_cache(1, 70, cache_offload=tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path)


def test_bytes_are_reserved_and_given_back(tmp_path):
    """A released page holds what was written; without a system call for it, zeros are written instead."""
    pages = paging.FilePages(tmp_path)
    rows = pages.zeros(torch.Size((3, 5000)), torch.float64)
    rows[1] = torch.arange(5000)
    pages.release()
    assert torch.equal(rows.sum(1), torch.tensor([0.0, 4999 * 2500, 0.0], dtype=torch.float64))
    path = tmp_path / "reserved"
    with path.open("wb") as file, pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "posix_fallocate", raising=False)
        paging._reserve(file.fileno(), 2_500_000)
    assert path.stat().st_size == 2_500_000


def test_a_cache_of_another_device_lies_in_the_hosts_memory():
    pages = paging.make_pages("host", torch.device("cuda"))
    rows = pages.zeros(torch.Size((2, 3)), torch.uint8)
    assert rows.device.type == "cpu"
    pages.release()
    with pytest.raises(ValueError, match="files are for models on a CPU"):
        paging.make_pages("folder", torch.device("cuda"))
