"""Recordings as frames of log-mel energies; soundfile reads, transformers' numpy functions make the frames.

In: a value of a row: a file, or samples.  Out: an array (steps, stack * mels) of float32, of mean 0 and
deviation 1 in each recording.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.tasks.config import AudioConfig
from dualroute.tasks.data.media_rows import path_in
from dualroute.tasks.kind import BadRow, Row
from dualroute.tasks.metrics import library

Samples = NDArray[np.float32]

#: Seconds of one recording.
MOST_SECONDS = 3600


def frames_of(row: Row, value: Any, config: AudioConfig) -> Samples:
    """(steps, stack * mels) of a row's recording.

    Raises:
        BadRow: It is missing, empty, cannot be read, or is shorter than a frame.
    """
    samples = samples_of(row, value, config.rate)
    if len(samples) < config.frame:
        raise BadRow("a recording that is shorter than one frame")
    library("transformers.audio_utils", "audio")  # names the extra, where it is not installed
    from dualroute.data.media.log_mel import log_mel, stacked

    frames = log_mel(samples, rate=config.rate, mels=config.mels, hop=config.hop, frame=config.frame)
    return stacked(frames, config.stack)


def samples_of(row: Row, value: Any, rate: int) -> Samples:
    """The samples of a row's recording at ``rate`` a second: one channel, the mean of all that there are.

    A row has a file, or samples that are at this rate, or, as the ``datasets`` library decodes them,
    {array, sampling_rate}.

    Raises:
        BadRow: It is missing, empty or cannot be read.
    """
    if value is None:
        raise BadRow("no recording")
    theirs = rate
    if isinstance(value, str):
        samples, theirs = _of_file(row, value)
    else:
        if isinstance(value, dict):
            said, value = value.get("sampling_rate"), value.get("array")
            if not isinstance(said, int) or said < 1:
                raise BadRow("samples without a sampling_rate")
            theirs = said
        try:
            samples = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise BadRow("neither a file nor samples") from error
    if samples.ndim == 2:  # (samples, channels)
        samples = samples.mean(1)
    if samples.ndim != 1 or not len(samples):
        raise BadRow("an empty recording")
    if not np.isfinite(samples).all():
        raise BadRow("a recording with samples that are no numbers")
    return resampled(samples, theirs, rate)


def _of_file(row: Row, value: str) -> tuple[Samples, int]:
    soundfile = library("soundfile", "audio")
    path = path_in(row, value)
    if path is None or not path.is_file():
        raise BadRow("a file that is not there")
    try:
        with soundfile.SoundFile(path) as stream:
            if stream.frames > MOST_SECONDS * stream.samplerate:
                raise BadRow(f"a recording of more than {MOST_SECONDS:,} seconds")
            return stream.read(dtype="float32", always_2d=True), int(stream.samplerate)
    except BadRow:
        raise
    except Exception as error:  # of libsndfile, or of the operating system
        raise BadRow("a file that is no recording, or is damaged") from error


def resampled(samples: Samples, theirs: int, rate: int) -> Samples:
    """Samples at another rate, by a polyphase filter (scipy's ``resample_poly``)."""
    if theirs == rate:
        return samples
    signal = library("scipy.signal", "audio")
    shared = math.gcd(theirs, rate)
    return np.asarray(signal.resample_poly(samples, rate // shared, theirs // shared), dtype=np.float32)
