"""A set of digests that is small."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import numpy as np

from data_prep.dedup.digests import DigestSet


def test_it_answers_as_a_set_does() -> None:
    """Digests that end or begin with zeros among them: numpy leaves out the zeros at the end of bytes."""
    rng = random.Random(0)
    odd = [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), b"\xff" * 16, b"a" * 15 + b"\0", b"a" * 16]
    keys = [*odd, *(hashlib.sha256(bytes([i % 256, i // 256])).digest()[:16] for i in range(3000))]
    for gathered in (1, 7, 100, 10_000):
        ours, theirs = DigestSet(gathered), set()
        for _ in range(6000):
            key = rng.choice(keys)
            assert ours.add(key + b"what follows does not count") == (key not in theirs)
            theirs.add(key)
        assert len(ours) == len(theirs)


def test_a_digest_costs_little_more_than_its_own_size() -> None:
    data = np.random.default_rng(0).bytes(16 * 30_000)
    tracemalloc.start()
    ours = DigestSet(1 << 9)
    for start in range(0, len(data), 16):
        ours.add(data[start : start + 16])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ours) == 30_000
    assert kept < 20 * len(ours)
    assert peak < 60 * len(ours)
