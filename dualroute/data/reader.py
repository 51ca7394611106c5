"""From sample ids to tensors: memory maps of the shards, cut into windows.

In: `Request`s from `plan` (sample ids with the number of targets in their whole global batch), and the
dataset folder through its `Manifest`. Out: batches, through a torch DataLoader that `module` builds. In a
worker:

1. `WindowDataset` answers a request with a window: the plan says which pieces of which documents,
2. `ShardReader` copies their ids out of the tars, at the places that the index gives, and inputs, labels,
   segments and positions are made of them;
3. `collate` stacks windows into the batch, and works out what the model wants to know of its documents.

Workers hold no state. Which sample comes when is settled before a worker is asked, so
their number and speed cannot change the order, and there is nothing of theirs to save.
"""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.index import IndexRows
from dualroute.data.manifest import Manifest
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.plan import Request, WindowPlan
from dualroute.data.remote.config import BadDataPolicy
from dualroute.data.remote.disk_cache import CacheFull
from dualroute.data.remote.mirror import UnusableData
from dualroute.errors import UserError, other_remedy

#: Labels that no loss counts (torch's default ``ignore_index``).
IGNORE_INDEX = -100
_log = logging.getLogger(__name__)
_REMEDY = "copy it again or prepare the data again"


def open_stream(manifest: Manifest, split: str) -> DocumentStream:
    """The document stream of a split, from its index, every row of which is checked first.

    Raises:
        UserError: the split or its index is missing, or the index contradicts the manifest.
    """
    manifest.check_index(split)
    return DocumentStream(IndexedLengths(manifest.index_rows(split)))


class IndexedLengths:
    """Tokens of the documents of a split, read from its index when they are asked for."""

    def __init__(self, rows: IndexRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.documents

    def blocks(self, numbers: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """See `Lengths.blocks`."""
        return self.rows.blocks(numbers, size)[:, :, 2]


class ShardReader:
    """Token ids of a split's documents, out of memory-mapped tars.

    Shards are opened when first read; at most ``max_open`` stay open, the least recently used is closed
    first. May be pickled: the copy opens its own files.

    Args:
        manifest, split: what to read.
        max_open: open shards per process (a DataLoader worker is a process); at most 2
            of a set elsewhere that is larger than the cache, for those may not go from it.
    """

    def __init__(self, manifest: Manifest, split: str, max_open: int = 16) -> None:
        if manifest.mirror is not None and not manifest.mirror.holds_all:
            max_open = min(max_open, 2)
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, not {max_open}")
        self.manifest = manifest
        self.split = manifest.split(split)
        self.max_open = max_open
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._rows: IndexRows | None = None
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_open": OrderedDict()}

    @property
    def open_shards(self) -> tuple[int, ...]:
        """Numbers of the shards that are open, least recently used first."""
        return tuple(self._open)

    def read(self, document: int, start: int, count: int) -> NDArray[np.int64]:
        """Ids (count,) of ``document`` from its token ``start`` on.

        Raises:
            UnusableData: the shard is missing, of another size than the manifest says, not where the index
                points, or holds ids outside the vocabulary; the message names shard and document.
        """
        if self._rows is None:
            self._rows = self.manifest.index_rows(self.split.name)
        shard, offset = (int(value) for value in self._rows[document][:2])
        data = self._shard(shard, document)
        first = offset + start * self.dtype.itemsize
        if offset < 0 or first + count * self.dtype.itemsize > len(data):
            raise UnusableData(
                f"{self._path(shard)}: {self._name(document)} lies beyond the end of the shard; {_REMEDY}"
            )
        # copied, so that nothing points into the map when the shard is closed
        ids = np.frombuffer(data, dtype=self.dtype, count=count, offset=first).astype(np.int64)
        vocab_size = self.manifest.tokenizer.vocab_size
        if count and int(ids.max()) >= vocab_size:
            raise UnusableData(
                f"{self._path(shard)}: {self._name(document)} holds id {int(ids.max())}, but the "
                f"vocabulary has {vocab_size}; the shard is damaged, {_REMEDY}"
            )
        return ids

    def close(self) -> None:
        """Close all shards; reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def _name(self, document: int) -> str:
        return f"document {document} of split {self.split.name!r}"

    def _path(self, shard: int) -> str:
        return f"{self.manifest.place}/{self.split.shards[shard].file}"

    def _shard(self, number: int, document: int) -> mmap.mmap:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if not 0 <= number < len(self.split.shards):
            raise UserError(
                f"{self.manifest.folder / self.split.index_file}: document {document} is in shard {number}, "
                f"but there are {len(self.split.shards)}; {_REMEDY}"
            )
        while len(self._open) >= self.max_open:
            self._open.popitem(last=False)[1].close()
        data = self._map(number)
        self._open[number] = data
        return data

    def _map(self, number: int) -> mmap.mmap:
        """A shard as a memory map, which keeps the lock on a copy of what lies elsewhere."""
        path, size = self._path(number), self.split.shards[number].size
        try:
            with self._stream(number) as stream:
                # checked before mapping: reading past the end of a mapped file kills the process (SIGBUS)
                found = stream.seek(0, 2)
                if found != size:
                    raise UnusableData(f"{path}: {found} bytes, but the manifest says {size}; {_REMEDY}")
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UnusableData(f"{path}: cannot open the shard ({error.strerror}); {_REMEDY}") from error

    def _stream(self, number: int) -> IO[bytes]:
        shard = self.split.shards[number]
        try:
            return self.manifest.open_shard(shard)
        except CacheFull:
            self.close()  # what is mapped here may go first
            return self.manifest.open_shard(shard, wait=True)
        except UserError as error:
            if self.manifest.mirror is not None:
                raise
            raise UnusableData(str(other_remedy(error, _REMEDY))) from error


class WindowDataset(Dataset[dict[str, NDArray[np.int64]]]):
    """Map-style: request → window, a dict of int64 arrays (context,) and the 0-dim ``num_targets``.

    - ``input_ids``: the window's tokens; the tokenizer's pad id (0 if it has none) where there are none
    - ``labels``: the next token of the same document, which may lie one past the window; `IGNORE_INDEX` for
      the last token of a document and for padding
    - ``segment_ids``: 1, 2, ... for the pieces of documents in the window; 0 for padding
    - ``positions``: 0, 1, ... within each piece

    A plain sample id will do as request; ``num_targets`` is then that of the window alone.

    Under a ``policy`` that skips, a window whose shard cannot be read is padding; there is a 0-dim
    ``skipped`` then, 1 in such a window. All else stays as it is, the number of targets included.
    """

    def __init__(self, reader: ShardReader, plan: WindowPlan, policy: BadDataPolicy | None = None) -> None:
        self.reader = reader
        self.plan = plan
        self.policy = policy or BadDataPolicy()

    def __getitem__(self, request: Request | int) -> dict[str, NDArray[np.int64]]:
        if not isinstance(request, Request):
            request = Request(request, self.plan.num_targets([request]))
        if self.policy.on_bad_data == "fail":
            return self._window(self.plan.pieces(request.sample).tolist(), request.num_targets)
        try:
            window = self._window(self.plan.pieces(request.sample).tolist(), request.num_targets)
        except UnusableData as error:
            _log.warning("sample %d is skipped: %s", request.sample, error)
            return {**self._window([], request.num_targets), "skipped": np.array(1)}
        return {**window, "skipped": np.array(0)}

    def _window(self, pieces: Sequence[Sequence[int]], num_targets: int) -> dict[str, NDArray[np.int64]]:
        context = self.plan.context
        input_ids = np.full(context, max(self.reader.manifest.tokenizer.pad_id, 0), dtype=np.int64)
        labels = np.full(context, IGNORE_INDEX, dtype=np.int64)
        segment_ids = np.zeros(context, dtype=np.int64)
        positions = np.zeros(context, dtype=np.int64)
        at, segment = 0, 1
        for document, start, tokens, targets in pieces:
            # one past the piece where the document goes on, to the document's end where it does not
            ids = self.reader.read(document, start, targets + 1)
            input_ids[at : at + tokens] = ids[:tokens]
            labels[at : at + targets] = ids[1:]
            segment_ids[at : at + tokens] = segment
            positions[at : at + tokens] = np.arange(tokens)
            at, segment = at + tokens, segment + 1
        return {
            "input_ids": input_ids,
            "labels": labels,
            "segment_ids": segment_ids,
            "positions": positions,
            "num_targets": np.array(num_targets, dtype=np.int64),
        }


#: Batch on the host → what else it is to hold.
Addition = Callable[[dict[str, Any]], dict[str, Any]]


def label_rows(labels: NDArray[Any], part: tuple[int, int] = (0, 1)) -> Tensor:
    """(r,) places of the labels that count in labels (b, n), flattened.

    Args:
        part: (rank, ranks) of those that share each row: the places are those in this rank's part
            (b, ceil(n / ranks)), as `DualRoutingTransformer.local_shard` cuts it.
    """
    counts = labels != IGNORE_INDEX
    rank, ranks = part
    if ranks > 1:
        width = -(-counts.shape[1] // ranks)
        filled = np.pad(counts, ((0, 0), (0, width * ranks - counts.shape[1])))
        counts = filled[:, rank * width : (rank + 1) * width]
    return torch.from_numpy(np.flatnonzero(counts))


def collate(
    windows: Sequence[dict[str, NDArray[np.int64]]],
    *,
    layout: LayoutPlan | None = None,
    part: tuple[int, int] = (0, 1),
    additions: Sequence[Addition] = (),
) -> dict[str, Any]:
    """Windows → batch: int64 tensors (b, context), and the 0-dim ``num_targets`` that they have in common.

    With a ``layout``, also what a training step would have to ask a GPU for, and wait: ``layout``, the
    `Layout` of the documents, and ``label_rows`` (r,), the places of the labels that count in (b · context,);
    with a ``part``, those in this rank's share of each row.  ``additions`` add what else they find in it.
    """
    batch: dict[str, Any] = {
        key: torch.from_numpy(np.stack([w[key] for w in windows]))
        for key in windows[0]
        if key != "num_targets"
    }
    batch["num_targets"] = torch.tensor(int(windows[0]["num_targets"]))
    if layout is not None:
        batch["layout"] = layout.build(batch["segment_ids"])
        batch["label_rows"] = label_rows(batch["labels"].numpy(), part)
    for addition in additions:
        batch |= addition(batch)
    return batch
