"""A permutation is a bijection, depends on its keys alone, and looks like chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.order.permutation import permute, seeded_words

quick = settings(max_examples=60, deadline=None)


def keys(*parts: object) -> np.ndarray:
    return seeded_words(*parts, count=8)


class TestPermute:
    @quick
    @given(size=st.integers(1, 3000), seed=st.integers())
    def test_is_a_bijection(self, size: int, seed: int) -> None:
        image = permute(np.arange(size), size, keys(seed))
        assert sorted(image.tolist()) == list(range(size))

    @quick
    @given(size=st.integers(2, 1 << 40), data=st.data())
    def test_depends_on_nothing_but_the_index(self, size: int, data: st.DataObject) -> None:
        indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
        together = permute(indices, size, keys("k"))
        assert together.tolist() == [int(permute([i], size, keys("k"))[0]) for i in indices]
        assert (together >= 0).all()
        assert (together < size).all()
        assert len(set(together.tolist())) == len(set(indices))

    @pytest.mark.parametrize("size", [2, 3, 5, 24])
    def test_every_place_is_equally_likely(self, size: int) -> None:
        counts = np.zeros((size, size))
        draws = 200 * size
        for seed in range(draws):
            counts[np.arange(size), permute(np.arange(size), size, keys("uniform", seed))] += 1
        chi2 = ((counts - 200) ** 2 / 200).sum() / (size - 1) ** 2  # per degree of freedom: about 1
        assert chi2 < 1 + 6 * np.sqrt(2) / (size - 1)

    def test_neighbours_are_torn_apart(self) -> None:
        size = 100_000
        image = permute(np.arange(size), size, keys(1))
        assert (np.abs(np.diff(image)) < 10).mean() < 0.001  # expected: 2 * 9 / size
        assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.02

    @pytest.mark.parametrize("index", [-1, 7, 8])
    def test_refuses_indices_outside(self, index: int) -> None:
        with pytest.raises(ValueError, match=r"outside \[0, 7\)"):
            permute([index], 7, keys(0))
