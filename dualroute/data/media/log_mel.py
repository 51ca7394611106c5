"""Samples of sound as steps of log-mel energies; transformers' numpy functions compute them.

In: samples at the model's rate.  Out: (steps, stack * mels) of float32, of mean 0 and deviation 1 in each
recording.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

Samples = NDArray[np.float32]


def log_mel(samples: Samples, *, rate: int, mels: int, hop: int, frame: int) -> Samples:
    """(frames, mels): log10 of the energies in bands of the mel scale, mean 0 and deviation 1 over all."""
    window, filters, size = _filters(rate, mels, frame)
    found = spectrogram(
        samples,
        window,
        frame_length=frame,
        hop_length=hop,
        fft_length=size,
        power=2.0,
        mel_filters=filters,
        log_mel="log10",
    ).T
    # what is 80 dB below the loudest is silence, as Whisper has it
    found = np.maximum(found, found.max() - 8.0)
    return np.asarray((found - found.mean()) / max(float(found.std()), 1e-4), dtype=np.float32)


@lru_cache(maxsize=8)
def _filters(rate: int, mels: int, frame: int) -> tuple[Any, Any, int]:
    size = 1 << (frame - 1).bit_length()
    filters = mel_filter_bank(size // 2 + 1, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return window_function(frame, "hann"), filters, size


def stacked(frames: Samples, stack: int) -> Samples:
    """(frames, mels) -> (steps, stack * mels); the last step is filled up with its last frame."""
    missing = -len(frames) % stack
    padded = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    return padded.reshape(len(padded) // stack, -1)
