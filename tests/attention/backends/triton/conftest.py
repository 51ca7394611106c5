"""The kernels run on a GPU where there is one, else in Triton's interpreter (see the conftest.py above)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

try:
    import triton
except ImportError:
    triton = None


def pytest_ignore_collect(collection_path: object) -> bool | None:
    if triton is None and str(collection_path).endswith(".py"):
        print(f"{collection_path} is skipped: triton is not installed (pip install triton)")
        return True
    return None


def _interpret_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw 16-bit integers and multiplies these: convert them first."""
    from triton.runtime import interpreter

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        a, b = (
            self.cast_impl(x, triton.language.float32) if x.dtype == triton.language.bfloat16 else x
            for x in (a, b)
        )
        return plain_dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if triton is not None and not torch.cuda.is_available():
    _interpret_bfloat16()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
