"""Reading a cache of logits: from the number of a sample to what the teacher said of its tokens.

In: a folder that :mod:`~dualroute.distillation.cache_logits` wrote, in the format of
:mod:`~dualroute.distillation.logit_cache`.  Here: :class:`LogitCache` checks and maps it,
:class:`CachedWindows` adds it to the windows that a DataLoader's worker reads.  Next: :func:`told` takes it
out of a batch for :mod:`~dualroute.distillation.module`.

No tar is parsed.  Where a sample lies follows from its number, and the name in front of
it is compared, so a file that is not what it should be is found at the sample concerned.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dualroute.data.manifest import canonical_json
from dualroute.data.plan import SamplePlan
from dualroute.data.reader import IGNORE_INDEX, Request
from dualroute.distillation.logit_cache import (
    FORMAT,
    MANIFEST,
    MEMBERS,
    REMEDY,
    VERSION,
    Identity,
    identity_of,
    read_json,
    shard_name,
)
from dualroute.distillation.losses import INFINITE, TopK
from dualroute.errors import UserError
from dualroute.files import file_sha256, write_bytes_atomically

VERIFIED = ".verified.json"
#: Keys of the batches that `CachedWindows` extends.
BATCH_KEYS = ("teacher_log_probs", "teacher_ids", "teacher_rest")
_BLOCK = tarfile.BLOCKSIZE


class LogitCache:
    """A finished cache.

    Raises:
        UserError: There is none, or its manifest is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is not the manifest of a cache of logits: make one with cache-logits")
        if content.get("version") != VERSION:
            raise UserError(f"{path} has version {content.get('version')}, this program reads {VERSION}")
        self.identity = identity_of(content.get("identity", {}), path)
        self.samples = int(content["samples"])
        self.shards: list[dict[str, Any]] = content["shards"]
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._places = self._layout()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _layout(self) -> dict[str, tuple[int, int]]:
        """(offset of the tar's header, bytes of the member) in a sample; and under "" the sample's own."""
        places, at = {}, 0
        for name, (shape, dtype) in self.identity.shapes().items():
            content = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                content, {"descr": dtype.str, "fortran_order": False, "shape": shape}
            )
            size = content.tell() + int(np.prod(shape)) * dtype.itemsize
            places[name] = (at, size)
            at += _BLOCK + -(-size // _BLOCK) * _BLOCK
        return {**places, "": (0, at)}

    def check(self, wanted: Identity, samples: int) -> None:
        """Refuse a cache of something else, or a shorter one.

        Args:
            wanted: What the run needs.
            samples: How many samples it reads.

        Raises:
            UserError: Naming what differs, or how many tokens are missing.
        """
        differing = self.identity.differences(wanted)
        if differing:
            raise UserError(
                f"{self.folder} does not fit this run (cache and run have {'; '.join(differing)}): use the "
                f"data, seed, context and temperature it was made for, or make another with cache-logits"
            )
        if samples > self.samples:
            raise UserError(
                f"{self.folder} is shorter than this run: it holds {self.samples} samples of {samples}; "
                f"{REMEDY} with --max_tokens {samples * self.identity.context}"
            )

    def verify(self, level: Literal["size", "sha256"]) -> None:
        """Compare the files with the manifest; a sha256 that was found right is remembered.

        Raises:
            UserError: Naming the first file that is missing, truncated or changed.
        """
        stamps: dict[str, list[int]] = {}
        for shard in self.shards:
            path = self.folder / shard["file"]
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
            if stat.st_size != shard["size"]:
                raise UserError(
                    f"{path}: {stat.st_size:,} bytes, the manifest says {shard['size']:,}; remove it and "
                    f"{REMEDY}"
                )
            stamps[shard["sha256"]] = [stat.st_size, stat.st_mtime_ns]
        if level == "size":
            return
        note = self.folder / VERIFIED
        try:
            if json.loads(note.read_bytes()) == stamps:
                return
        except (OSError, ValueError):
            pass  # never verified
        for shard in self.shards:
            path = self.folder / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: contents differ from the manifest (sha256); remove it and {REMEDY}")
        with contextlib.suppress(OSError):  # a read-only folder is a normal place for data
            write_bytes_atomically(note, canonical_json(stamps))

    def read(self, number: int) -> dict[str, NDArray[Any]]:
        """`BATCH_KEYS` of a sample: float32 (context, k), int32 (context, k), float32 (context,).

        Raises:
            UserError: The sample is damaged, or its file is.
            IndexError: The cache does not reach so far.
        """
        if not 0 <= number < self.samples:
            raise IndexError(f"{self.folder} holds {self.samples} samples, number {number} is none of them")
        shard, index = divmod(number, self.identity.shard_samples)
        data, begin = self._shard(shard), index * self._places[""][1]
        found = []
        for name in MEMBERS:
            at, size = self._places[name]
            header = data[begin + at : begin + at + _BLOCK]
            if not header.startswith(f"{number:010d}.{name}.npy\0".encode()):
                raise self._damaged(shard, number)
            shape, dtype = self.identity.shapes()[name]
            content = data[begin + at + _BLOCK : begin + at + _BLOCK + size]
            array = np.frombuffer(content, dtype, offset=size - int(np.prod(shape)) * dtype.itemsize)
            found.append(self._decoded(array.reshape(shape), name))
        log_probs, ids, rest = found
        plausible = np.isfinite(log_probs).all() and not np.isnan(rest).any()
        plausible = plausible and max(log_probs.max(), rest.max()) < 0.1
        if not plausible or not 0 <= int(ids.min()) <= int(ids.max()) < self.identity.vocab_size:
            raise self._damaged(shard, number)
        return dict(zip(BATCH_KEYS, found, strict=True))

    def nothing(self) -> dict[str, NDArray[Any]]:
        """What stands for a sample that the cache does not reach."""
        shapes = [shape for shape, _ in self.identity.shapes().values()]
        log_probs, rest = (np.full(shape, np.nan, dtype=np.float32) for shape in (shapes[0], shapes[2]))
        return dict(zip(BATCH_KEYS, (log_probs, np.zeros(shapes[1], dtype=np.int32), rest), strict=True))

    def _decoded(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        if name == "ids":
            return array.astype(np.int32)
        if self.identity.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def _damaged(self, shard: int, number: int) -> UserError:
        path = self.folder / shard_name(shard)
        return UserError(f"{path}: sample {number} is damaged; remove the file and {REMEDY}")

    def _shard(self, number: int, max_open: int = 8) -> mmap.mmap:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / shard_name(number)
        try:
            with path.open("rb") as stream:
                found = stream.seek(0, 2)
                if found != self.shards[number]["size"]:  # reading past the end of a map kills the process
                    size = self.shards[number]["size"]
                    raise UserError(f"{path}: {found:,} bytes, the manifest says {size:,}; {REMEDY}")
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
        while len(self._open) >= max_open:
            self._open.popitem(last=False)[1].close()
        self._open[number] = data
        return data


class CachedWindows(Dataset[dict[str, NDArray[Any]]]):
    """The windows of a dataset, each with what the teacher said of it.

    Past the end of the cache that is NaN, and :func:`told` refuses it: loaders read ahead of the training.
    """

    def __init__(self, windows: Dataset[Any], cache: LogitCache, plan: SamplePlan) -> None:
        self.windows, self.cache = windows, cache
        ids = plan.ids(np.arange(cache.samples, dtype=np.int64))
        self._order = np.argsort(ids)
        self._ids = ids[self._order]

    def __getitem__(self, request: Request | int) -> dict[str, NDArray[Any]]:
        sample = request.sample if isinstance(request, Request) else request
        place = int(np.searchsorted(self._ids, sample))
        known = place < len(self._ids) and self._ids[place] == sample
        said = self.cache.read(int(self._order[place])) if known else self.cache.nothing()
        return {**self.windows[request], **said}


FAULT = "cache_fault"
_PAST_THE_END, _INFINITE = 1, 2


@dataclass(frozen=True)
class CacheFaults:
    """An addition to batches of `CachedWindows`, made where they are loaded: what :func:`told` refuses.

    Attributes:
        needs_rest: The objective is infinite where the teacher leaves no mass outside its top k.
    """

    needs_rest: bool = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``cache_fault``, a number of the host's: whether, and why, the batch cannot be trained on.

        Batches that no cache speaks of (those of validation) have none.
        """
        if BATCH_KEYS[-1] not in batch:
            return {}
        rest, fault = batch[BATCH_KEYS[-1]], 0
        if bool(rest.isnan().any()):
            fault = _PAST_THE_END
        elif self.needs_rest and bool((rest.isneginf() & (batch["labels"] != IGNORE_INDEX)).any()):
            fault = _INFINITE
        return {FAULT: fault}


def told(batch: dict[str, Any]) -> TopK:
    """What a batch of `CachedWindows`, with `CacheFaults`, holds of the teacher, (B, n, k) as it was read.

    Raises:
        UserError: The batch lies past the end of the cache, or the objective is infinite on it.
    """
    fault: int = batch[FAULT]
    if fault == _INFINITE:
        raise UserError(f"distill.loss {INFINITE}")
    if fault == _PAST_THE_END:
        raise UserError(
            f"distill.cached_logits ends before this run, which has left out some data (see rollbacks.json): "
            f"make it longer; {REMEDY} with more --max_tokens"
        )
    return TopK(*(batch[key] for key in BATCH_KEYS))
