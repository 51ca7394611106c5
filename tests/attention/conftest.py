"""Both kinds of kernels that a CPU has."""

import pytest

from dualroute.attention import backend


@pytest.fixture(params=["cpp", "torch"])
def each_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on the C++ kernels and in plain torch."""
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param
