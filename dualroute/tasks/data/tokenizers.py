"""The tokenizer of a task: the checkpoint's, one that is named, or one that is trained on the rows."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model.checkpoint.folder import TOKENIZER, TOKENIZER_SETTINGS
from dualroute.tasks.config import TaskDataConfig
from dualroute.training.prepare import Begun

#: Ids of a tokenizer that is trained, and of what may be added to the characters of a script with many.
USUAL_IDS = 4096
#: Bytes of text that it is trained on.
SAMPLE_BYTES = 16 << 20


def tokenizer_of(data: TaskDataConfig, begun: Begun, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        data: What is configured.
        begun: With the checkpoint that the run goes on from, or begins with.
        texts: Of the training rows; read only where a tokenizer is trained.

    Raises:
        UserError: The file that is named is none, or another than the checkpoint's.
    """
    if begun.initial is not None:
        theirs = Tokenizer(_own_copy(begun.initial.folder))
        if data.tokenizer is not None and not theirs.same_ids(Tokenizer(data.tokenizer)):
            raise UserError(
                f"data.tokenizer {data.tokenizer} is another than that of {begun.initial.folder}: leave it "
                f"out, the ids of the weights are the checkpoint's"
            )
        return theirs
    if data.tokenizer is not None:
        return Tokenizer(data.tokenizer)
    path = _own_folder() / TOKENIZER
    path.write_bytes(trained(texts, data.vocab_size))
    return Tokenizer(path)


def _own_folder() -> Path:
    """A folder that is there as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="dualroute-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _own_copy(checkpoint: Path) -> Path:
    """The tokenizer of a checkpoint, where it stays.

    The run writes it into each of its checkpoints, and by then the first one may have been removed
    (checkpoint.keep_last).
    """
    folder = _own_folder()
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        try:
            shutil.copyfile(checkpoint / name, folder / name)
        except FileNotFoundError:
            if name == TOKENIZER:
                raise UserError(
                    f"{checkpoint / name} is not there: the checkpoint is damaged, name another"
                ) from None
    return folder / TOKENIZER


def trained(texts: Iterable[str], vocab_size: int | None) -> bytes:
    """A sentencepiece model of ``texts``, equal for equal texts, on every rank.

    ``vocab_size`` null takes `USUAL_IDS`, fewer where the texts do not have so many pieces, more where they
    have more characters.

    Raises:
        UserError: There is no text, or ``vocab_size`` does not fit it.
    """
    from data_prep.train_tokenizer import Sample, train_tokenizer

    sample = Sample(SAMPLE_BYTES)
    for text in texts:
        data = text.encode("utf-8", "replace")
        sample.add(hashlib.sha256(data).digest(), data.decode())
    held = sample.texts()
    if not held:
        raise UserError(
            "the training rows have no text that a tokenizer could be trained on: give data.tokenizer"
        )
    if vocab_size is not None:
        return train_tokenizer(held, vocab_size)
    size = USUAL_IDS
    for _ in range(3):
        try:
            return train_tokenizer(held, size)
        except UserError as error:
            fitting = re.search(r"largest possible is (\d+)|need at least (\d+)", str(error))
            if fitting is None:
                raise
            size = int(fitting[1]) if fitting[1] else int(fitting[2]) + USUAL_IDS // 2
    return train_tokenizer(held, size)
