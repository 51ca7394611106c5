"""The kernels run on a GPU where there is one, else in Triton's interpreter (see the conftest.py above)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def _interpret_faster() -> None:
    """The interpreter looks through the whole language at every call of a function, and makes a table of
    types for every type: a third of its time.  Here it does so once per launch and module, and once.
    """
    from triton.runtime import interpreter

    plain_patch, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, int]] = set()  # what the functions of this launch see

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return plain_launch(self, *arguments, **options)

    def patch(fn: Callable[..., Any]) -> Any:
        seen = id(fn.__globals__), len(fn.__globals__)  # which grow when a function is rewritten
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return plain_patch(fn)

    plain_dtype, known = interpreter._get_np_dtype, {}

    def np_dtype(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, triton.language.block_type) else kind
        if isinstance(scalar, triton.language.pointer_type):
            return plain_dtype(scalar)
        if scalar not in known:
            known[scalar] = plain_dtype(scalar)
        return known[scalar]

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang, interpreter._get_np_dtype = patch, np_dtype


if triton is not None and not torch.cuda.is_available():
    _interpret_bfloat16()
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # of the versions that undo it after a launch
        _interpret_faster()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
