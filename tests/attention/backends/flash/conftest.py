"""Flash attention's operators on a CPU, and the back end that calls them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dualroute.attention.backends.flash.backend import FLASH, FlashBackend
from tests.attention.backends.flash.stand_in import installed


@pytest.fixture(scope="module")
def flash() -> Iterator[FlashBackend]:
    with installed():
        yield FLASH
