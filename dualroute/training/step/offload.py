"""What layers keep for their backward pass, moved to the host and back beside the computation.

- In: the forward pass of each layer.  The last one's stays: its turn in the backward pass comes first.
- Here: :class:`Offload` copies what autograd saves to (pinned) memory of the host while the next layer runs,
  and brings it back while the backward pass of the layer behind it runs.
- Next: ``training/step/activations.py`` puts it around the layers; gradients are the plain model's to the
  bit.

On the device lies what two layers keep, and the last: one is in use and one on its way.  The copies run on
two streams of their own.  What is copied away is held until the main stream has been told to wait for the
copy, so the allocator never hands out memory that a copy still reads.

Weights, which autograd saves too, are not copied: they are known by their address, and given back as they
lie in the backward pass, which under ZeRO-3 is where they have been gathered anew.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: Bytes below which a tensor stays where it is: one copy costs more than it frees.
LEAST_BYTES = 2**16


class Copies(Protocol):
    """How tensors are copied.  ``start`` may return before the copy is done; ``wait`` orders the work that is
    launched after it behind the copy."""

    def start(self, source: Tensor, *, to_host: bool) -> tuple[Tensor, Any]:
        """A copy of ``source`` on the other side, and what :meth:`wait` wants of it."""

    def wait(self, ticket: Any) -> None:
        """See the class."""


class PlainCopies:
    """At once, within the host: for a device that is the host."""

    def start(self, source: Tensor, *, to_host: bool) -> tuple[Tensor, Any]:
        return source.clone(memory_format=torch.preserve_format), None

    def wait(self, ticket: Any) -> None:
        return None


class StreamCopies:
    """On streams of their own, one for each direction, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def start(self, source: Tensor, *, to_host: bool) -> tuple[Tensor, Any]:
        # torch keeps pinned memory and reuses it; a target on the device belongs to the main stream, which
        # is also the one that frees it
        if to_host:
            target = torch.empty_like(source, device="cpu", pin_memory=True)
        else:
            target = torch.empty_like(source, device=self.device, pin_memory=False)
        side = self._out if to_host else self._back
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
            done = side.record_event()
        if not to_host:
            target.record_stream(side)  # a graph may be thrown away before it has read what was fetched
        return target, done

    def wait(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)


class _Saved:
    """One tensor that autograd keeps, on the host; on the device while it is on its way or in use."""

    def __init__(self, visit: _Visit, tensor: Tensor, copies: Copies) -> None:
        self.visit = visit
        self.on_host, self.ticket = copies.start(tensor, to_host=True)
        self.on_device: Tensor | None = None
        self.fetched: Any = None


class _Kept:
    """One that stays; reading it says where the backward pass is."""

    def __init__(self, visit: _Visit, tensor: Tensor) -> None:
        self.visit, self.tensor = visit, tensor


class _Visit:
    """One forward pass of one layer."""

    def __init__(self, before: _Visit | None) -> None:
        self._before = weakref.ref(before) if before is not None else None
        # the graph holds what was saved, and that holds the visit: all goes when the graph goes
        self.saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
        #: tensors on the device whose copies may be under way, by what tells them apart
        self.leaving: dict[Any, tuple[Tensor, int, _Saved]] = {}

    @property
    def before(self) -> _Visit | None:
        return self._before() if self._before is not None else None


class Offload:
    """The traffic of one model.

    Args:
        copies: How; null chooses by the device of the first tensor.
        least_bytes: Of a tensor that is moved.
    """

    def __init__(self, copies: Copies | None = None, least_bytes: int = LEAST_BYTES) -> None:
        self._copies = copies
        self._least_bytes = least_bytes
        self._newest: weakref.ref[_Visit] | None = None
        self._leaving: list[_Visit] = []
        self._in_use: _Visit | None = None
        self._coming: list[_Visit] = []

    def around(
        self, forward: Callable[..., Any], layer: nn.Module, *, stays: bool = False
    ) -> Callable[..., Any]:
        """``forward`` of ``layer`` with what it keeps moved away, or only watched where it ``stays``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with self._visit(layer, stays):
                return forward(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _visit(self, layer: nn.Module, stays: bool) -> Iterator[None]:
        visit = _Visit(self._newest() if self._newest is not None else None)
        self._newest = weakref.ref(visit)
        self._let_go(but=1)  # of the layer before last: its copies had the last one's time
        self._leaving.append(visit)
        weights = list(layer.parameters())

        def pack(tensor: Tensor) -> Any:
            return _Kept(visit, tensor) if stays else self._pack(tensor, visit, weights)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor, visit: _Visit, weights: list[nn.Parameter]) -> Any:
        for weight in weights:
            if weight.data_ptr() == tensor.data_ptr() and weight.numel() == tensor.numel() > 0:
                offset = tensor.storage_offset() - weight.storage_offset()
                if weight.dtype == tensor.dtype:
                    return weight, tensor.size(), tensor.stride(), offset
        if tensor.nbytes < self._least_bytes:  # among them the handles of a compiled layer, which no copy is
            return tensor
        # each operation that reads a tensor saves it; as long as it is held its address is its own
        name = (tensor.data_ptr(), tensor.size(), tensor.stride(), tensor.dtype)
        if name in visit.leaving:
            return visit.leaving[name][2]
        if self._copies is None:
            self._copies = StreamCopies(tensor.device) if tensor.is_cuda else PlainCopies()
        saved = _Saved(visit, tensor, self._copies)
        visit.saved.add(saved)
        visit.leaving[name] = (tensor, tensor._version, saved)
        return saved

    def _let_go(self, but: int = 0) -> None:
        """Free on the device what all but the newest visits have sent away."""
        while len(self._leaving) > but:
            visit = self._leaving.pop(0)
            for tensor, version, saved in visit.leaving.values():
                if tensor._version != version:
                    raise RuntimeError(
                        "a tensor that a layer keeps for its backward pass was changed in place"
                    )
                self._wait(saved.ticket)
            visit.leaving.clear()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not isinstance(packed, _Saved | _Kept):
            weight, size, stride, offset = packed
            now = weight.detach()
            return now.as_strided(size, stride, now.storage_offset() + offset)
        self._let_go()
        if self._in_use is not packed.visit:
            self._turn_to(packed.visit)
        if isinstance(packed, _Kept):
            return packed.tensor
        if packed.on_device is None:  # once more, as with retain_graph
            self._fetch(packed)
        if packed.fetched is not None:
            self._wait(packed.fetched)
            packed.fetched = None
        assert packed.on_device is not None
        return packed.on_device

    def _wait(self, ticket: Any) -> None:
        assert self._copies is not None
        self._copies.wait(ticket)

    def _turn_to(self, visit: _Visit) -> None:
        """The backward pass has come to ``visit``: what is left of others goes, the one before is fetched."""
        for other in [self._in_use, *self._coming]:
            if other is not None and other is not visit:
                self._drop(other)
        self._in_use = visit
        for saved in list(visit.saved):
            if saved.on_device is None:
                self._fetch(saved)
        before = visit.before
        self._coming = [before] if before is not None else []
        for saved in list(before.saved) if before is not None else []:
            if saved.on_device is None:
                self._fetch(saved)

    def _fetch(self, saved: _Saved) -> None:
        assert self._copies is not None
        saved.on_device, saved.fetched = self._copies.start(saved.on_host, to_host=False)

    @staticmethod
    def _drop(visit: _Visit) -> None:
        for saved in list(visit.saved):
            saved.on_device = saved.fetched = None
