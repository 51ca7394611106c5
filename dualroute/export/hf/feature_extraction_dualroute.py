"""What an exported model of recordings is given: steps of log-mel energies as in its training.

In: samples.  Out: ``input_features`` (B, n, stack * mels), and ``attention_mask`` (B, n) where recordings of
unequal length are filled up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

from dualroute.data.media.log_mel import log_mel, stacked


class DualRoutingFeatureExtractor(SequenceFeatureExtractor):
    """Frames of log-mel energies, normalised in each recording.

    Args:
        feature_size: Numbers of a step, stack * num_mel_bins.
        sampling_rate: Samples a second.
        padding_value: Of steps behind a recording's end.
        num_mel_bins: Energies of a frame.
        hop_length: Samples from one frame to the next.
        frame_length: Samples of a frame.
        stack: Frames of a step.
        kwargs: As for `SequenceFeatureExtractor`.
    """

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        num_mel_bins: int = 40,
        hop_length: int = 160,
        frame_length: int = 400,
        stack: int = 2,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("return_attention_mask", True)
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.num_mel_bins, self.hop_length = num_mel_bins, hop_length
        self.frame_length, self.stack = frame_length, stack

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Features of one recording or of a list of them.

        Args:
            raw_speech: Samples (n,), or a list of such; of channels (n, channels) the mean is taken.
            sampling_rate: Of these samples; it has to be the model's.
            padding: See `SequenceFeatureExtractor.pad`.
            return_tensors: "pt" or "np".
            kwargs: As for `SequenceFeatureExtractor.pad`.

        Raises:
            ValueError: Samples at another rate, or a recording that is shorter than one frame.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"samples at a rate of {sampling_rate}, and the model was trained at {self.sampling_rate}: "
                f"resample them"
            )
        several = isinstance(raw_speech, list | tuple) and len(raw_speech) and np.ndim(raw_speech[0]) > 0
        found = [self._steps(one) for one in (raw_speech if several else [raw_speech])]
        return self.pad(
            BatchFeature({"input_features": found}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def _steps(self, samples: Any) -> Any:
        array = np.asarray(samples, dtype=np.float32)
        if array.ndim == 2:
            array = array.mean(1)
        if array.ndim != 1 or len(array) < self.frame_length:
            raise ValueError(
                f"a recording of shape {list(array.shape)}: give at least {self.frame_length} samples"
            )
        if not np.isfinite(array).all():
            raise ValueError("a recording with samples that are no numbers")
        frames = log_mel(
            array,
            rate=self.sampling_rate,
            mels=self.num_mel_bins,
            hop=self.hop_length,
            frame=self.frame_length,
        )
        return stacked(frames, self.stack)
