"""A DualRouting backbone with a head for images, recordings or items.

In: what the folder's image processor or feature extractor makes, or ids of items, and labels.  Out: scores
    and a loss, as transformers' models for the same tasks give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
from dualroute.export.hf.heads_dualroute import (
    DualRoutingForSequenceClassification,
    pooled,
    tokens_of_texts,
)
from dualroute.export.hf.modeling_dualroute import DualRoutingModel, DualRoutingPreTrainedModel


class DualRoutingOfSteps(DualRoutingPreTrainedModel):
    """A backbone of images or recordings with one projection on it."""

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = DualRoutingModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def _classified(
        self, hidden: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, num_labels) of hidden states (B, n, dim), and the loss of ``labels`` (B,)."""
        kept = tokens_of_texts(hidden, None, attention_mask, None)
        logits = self.score(pooled(hidden, kept, self.config.pooling))
        return logits, None if labels is None else self.loss_function(labels, logits, self.config)


class DualRoutingForImageClassification(DualRoutingOfSteps):
    """Classes of images: read over the mean of all patches, or at one (``config.pooling``)."""

    main_input_name = "pixel_values"
    input_modalities = "image"

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels) of pixel_values (B, channels, height, width), from -1 to 1, and the loss of
        ``labels`` (B,)."""
        outputs = self.model(pixel_values=pixel_values, **kwargs)
        logits, loss = self._classified(outputs.last_hidden_state, None, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class DualRoutingForAudioClassification(DualRoutingOfSteps):
    """Classes of recordings: read over the mean of all steps, or at one (``config.pooling``)."""

    main_input_name = "input_features"
    input_modalities = "audio"

    @can_return_tuple
    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) of input_features (B, n, features), and the loss of ``labels`` (B,);
        attention_mask (B, n) is 0 where a shorter recording has ended."""
        outputs = self.model(input_features=input_features, attention_mask=attention_mask, **kwargs)
        logits, loss = self._classified(outputs.last_hidden_state, attention_mask, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class DualRoutingForCTC(DualRoutingOfSteps):
    """What is said in recordings: a character, or none (output 0), for each step."""

    main_input_name = "input_features"
    input_modalities = "audio"

    @can_return_tuple
    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (B, n, outputs) of input_features (B, n, features), none (0) behind a recording's end, and
        the CTC loss of ``labels`` (B, characters); -100 counts nothing."""
        outputs = self.model(input_features=input_features, attention_mask=attention_mask, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
        if attention_mask is not None:
            mask = attention_mask.to(logits.device, torch.bool)
            lengths = mask.sum(1)
            silence = torch.zeros_like(logits[0, 0])
            silence[1:] = torch.finfo(logits.dtype).min
            logits = torch.where(mask[..., None], logits, silence)  # a pipeline decodes these steps too
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, lengths, blank_token_id=0, reduction=self.config.ctc_loss_reduction
            )
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class DualRoutingForNextItem(DualRoutingForSequenceClassification):
    """Which item comes next, after ids of items in the order of time, each one more than its output; 0 is an
    item that is not known."""

    loss_type = "ForSequenceClassification"

    def ids_of(self, histories: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, (B, n) each, of histories by the names of their items."""
        known: Any = self.config.label2id
        rows = [[known.get(str(item), -1) + 1 for item in items] for items in histories]
        if not rows or not all(rows):
            raise ValueError("a history without an item: nothing follows from it")
        width, device = max(map(len, rows)), self.device
        ids = [row + [0] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @torch.no_grad()
    def rank(self, histories: Sequence[Sequence[str]], best: int = 10) -> list[list[str]]:
        """The ``best`` items that come next in each history, the likeliest first, without those in it."""
        ids, mask = self.ids_of(histories)
        scores = self(input_ids=ids, attention_mask=mask).logits.float()
        for row, (numbers, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
            had = numbers[kept & (numbers > 0)] - 1
            scores[row, had] = -torch.inf
        names: Any = self.config.id2label
        order = scores.sort(dim=1, descending=True, stable=True)
        return [
            [names[int(number)] for number, score in zip(*row, strict=True) if score > -torch.inf]
            for row in zip(order.indices[:, :best], order.values[:, :best], strict=True)
        ]
