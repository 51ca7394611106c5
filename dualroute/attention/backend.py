"""Which back end computes the routes: plain torch, C++ kernels on a CPU, flash attention or Triton on a GPU.

In: the queries of a route; `set_backend`, as a configuration gives it, and DUALROUTE_KERNELS from the
environment, which overrides it. Out: `choose` gives the `Backend` that takes the call.

    auto      on a CPU cpp where it can be compiled, else torch; on a GPU what `decide` was told, which is the
              fastest one that was found right there (see `verification`), until then torch (the default)
    torch     plain torch
    cpp       the C++ kernels on a CPU; an error where they cannot be compiled
    flash     flash attention's operators on a CUDA device
    triton    the Triton kernels on a GPU

What the chosen back end cannot take (`supports`; `why_not` gives the reason) runs in plain torch, which takes
everything: the same numbers but for rounding. On a GPU, where that back end was named, a warning says so,
once for each reason.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dualroute.attention.backends.torch import TorchBackend
from dualroute.attention.core.cache import GlobalCache
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.options import check_name
from dualroute.attention.core.routing import Routing

if TYPE_CHECKING:
    from dualroute.attention.backends.flash.backend import FlashBackend

VARIABLE = "DUALROUTE_KERNELS"
CHOICES = ("auto", "torch", "cpp", "flash", "triton")
_default = "auto"
_decided: dict[str, tuple[str, str]] = {}  # by type of device: what auto stands for there, and why
_only_torch = ContextVar("only_torch", default=False)


class Backend(Protocol):
    """One way to compute the routes on a stream.

    H query heads, H_kv key heads, S slots, d head_dim; queries are (H, S, d), keys and values (H_kv, S, d)
    and 0 in slots without a token, results (H, S, d). All but the choice of blocks is differentiable.
    """

    #: whether streams may hold copies of past spans, see `core.clusters`
    takes_copies: bool

    #: what one new token of a text goes through, see `token_kernels`; None where there is nothing of its own
    tokens: ModuleType | None

    def description(self) -> str:
        """What it is, in a few words, for a log."""

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        """Whether it can take queries (..., d). `block` is that of the global route; None: the local one."""

    def why_not(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> str | None:
        """Why it cannot take them, as a sentence; None where it can."""

    def similar_order(self, keys: Tensor, cells: int) -> Tensor:
        """See `core.clusters`: the same for all back ends."""

    def select_blocks(
        self,
        query: Tensor,
        key: Tensor,
        stream: Stream,
        *,
        top_k: int,
        router: str = "minmax",
        sub_block: int = 16,
        causal: bool = True,
    ) -> Tensor:
        """(H_kv, S, 1 + top_k) int32 blocks that each token reads besides its own: the sink, then the chosen
        ones in no order; -1 = none."""

    def routed_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stream: Stream,
        routing: Routing,
        *,
        selected: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """Own block, selected blocks and the summaries of the others in one softmax."""

    def local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
    ) -> Tensor:
        """`window` keys, the token's own included."""

    def full_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
    ) -> Tensor:
        """Every key of the document."""

    def decode_step(self, query: Tensor, cache: GlobalCache, top_k: int) -> Tensor:
        """The routed global route of the newest token, (R, group, 1, d) with R = batch * H_kv, whose key the
        cache holds; no gradients."""


_TORCH: Backend = TorchBackend()


def set_backend(name: str) -> None:
    """Choose the back end of this process: one of `CHOICES`. DUALROUTE_KERNELS overrides it.

    Raises:
        ValueError: an unknown name. Whether what it names can be had is seen by `describe`, or in use.
    """
    global _default
    check_name("attention back end", name, CHOICES)
    _default = name
    _decided.clear()


def decide(device_type: str, name: str, why: str) -> None:
    """From now on auto stands for `name` on devices of this type; `why` is what `describe` says of it.

    Raises:
        ValueError: an unknown name, or what it names cannot be had here.
    """
    check_name("attention back end", name, CHOICES[1:])
    load(name)
    _decided[device_type] = name, why


def wanted() -> str:
    """The name that was asked for, in the configuration or the environment."""
    return _wanted()[0]


def is_open(device: torch.device) -> bool:
    """Whether auto was asked for, and nothing has decided yet what it stands for on such a device."""
    return _wanted()[0] == "auto" and device.type not in _decided


def load(name: str) -> Backend:
    """The back end of this name, other than auto.

    Raises:
        ValueError: it cannot be had here, with the reason.
    """
    reason = _why_not_compiled() if name == "cpp" else None
    if reason is not None:
        raise ValueError(f"the C++ kernels cannot be compiled: {reason}")
    return _of_name(name)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Plain torch inside, whatever was asked for: for comparisons with what has no other kernels."""
    token = _only_torch.set(True)
    try:
        yield
    finally:
        _only_torch.reset(token)


def choose(query: Tensor, *, causal: bool = True, block: int | None = None, copies: bool = False) -> Backend:
    """The back end for these queries (..., d): the one that was asked for, if it can take them.

    `block` is that of the global route; None asks for the local one. `copies`: of a stream that holds copies
    of past spans.

    Raises:
        ValueError: DUALROUTE_KERNELS is no known name, or a back end was named that cannot be had here.
    """
    backend = _wanted_for(query)
    reason = None
    if copies and not backend.takes_copies:
        reason = f"{backend.description()} have no blocks of similar keys (cluster_span)"
    elif _takes(backend, query, causal=causal, block=block):
        return backend
    if query.device.type == "cuda" and _wanted()[0] != "auto" and not torch.compiler.is_compiling():
        _warn_once(reason or str(backend.why_not(query, causal=causal, block=block)))
    return _TORCH


def _takes(backend: Backend, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
    """Whether it can be had here, and takes these queries."""
    return backend.supports(query, causal=causal, block=block) and (
        backend is not _cpp() or _compiled() is None
    )


def _wanted_for(rows: Tensor) -> Backend:
    """The back end that was asked for, on the device of these rows."""
    name, _ = _wanted()
    if name == "auto":
        kind = rows.device.type
        name, _ = _decided.get(kind, ("cpp" if kind == "cpu" else "torch", ""))
    return _of_name(name)


def _of_name(name: str) -> Backend:
    """A back end other than auto."""
    loaders: dict[str, Callable[[], Backend]] = {"cpp": _cpp, "flash": _flash, "triton": _triton}
    return loaders[name]() if name in loaders else _TORCH


def plain() -> Backend:
    """Plain torch, which takes everything."""
    return _TORCH


def token_kernels(rows: Tensor) -> ModuleType | None:
    """Kernels that take one new token of each text, like `rows` (B, ...), through both routes at once.

    They write the caches on the way, and have no gradients. None: there are none here.
    """
    backend = _wanted_for(rows)
    return backend.tokens if _takes(backend, rows) else None


def describe(device: torch.device | str) -> str:
    """The line to log: what the attention runs on, and why, on `device`.

    Raises:
        ValueError: as `choose`.
    """
    device = torch.device(device)
    name, asker = _wanted()
    if name == "torch":
        return f"attention: plain torch, as {asker} asks for"
    if name == "auto" and device.type in _decided:
        return f"attention: {_decided[device.type][1]}"
    if name == "flash":
        reason = _flash().why_not(torch.empty(0, 16, dtype=torch.bfloat16, device=device))
        return f"attention: {f'plain torch: {reason}' if reason else _flash().description()}"
    if device.type == "cpu" and name != "triton":
        reason = _compiled()
        return f"attention: plain torch, slower: {reason}" if reason else f"attention: {_cpp().description()}"
    if name == "triton":
        like = torch.empty(0, 16, dtype=torch.float32, device=device)
        if _triton().supports(like, block=1):
            return f"attention: {_triton().description()}"
        return f"attention: plain torch: the Triton kernels that {asker} asks for do not run on {device}"
    return f"attention: plain torch on {device.type}, where no other kernels were compared with it"


def _wanted() -> tuple[str, str]:
    """The name that was asked for, and who asks."""
    if _only_torch.get():
        return "torch", "plain_torch()"
    given = os.environ.get(VARIABLE)
    if not given:
        return _default, "the configuration"
    if given not in CHOICES:
        raise ValueError(f"{VARIABLE}={given} is unknown: set it to {', '.join(CHOICES)}")
    return given, VARIABLE


def _cpp() -> Backend:
    from dualroute.attention.backends.cpp.backend import CPP

    return CPP


def _flash() -> FlashBackend:
    from dualroute.attention.backends.flash.backend import FLASH

    return FLASH


def _triton() -> Backend:
    try:
        from dualroute.attention.backends.triton.backend import TRITON
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            f"{_asked('triton')}, but Triton is not installed: pip install triton, or ask for another one"
        ) from error
    return TRITON


def _compiled() -> str | None:
    """None if the C++ kernels work, else the reason why plain torch takes their place; it warns once.

    Raises:
        ValueError: they do not work and were asked for by name.
    """
    reason = _why_not_compiled()
    if reason is None:
        return None
    if _wanted()[0] == "cpp":
        raise ValueError(f"{_asked('cpp')}, but the kernels cannot be compiled: {reason}")
    _warn_once(reason)
    return reason


def _asked(name: str) -> str:
    asker = _wanted()[1]
    return f"{VARIABLE}={name}" if asker == VARIABLE else f"the attention back end is {name}"


@functools.cache
def _why_not_compiled() -> str | None:
    """None if the C++ kernels work, else the reason; tried once."""
    from dualroute.attention.backends.cpp import build

    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attention runs on plain torch, which is slower: {reason}", stacklevel=3)
