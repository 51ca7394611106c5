"""A DualRouting backbone with a head for a task: classes of texts or tokens, answers, masked tokens.

In: what `DualRoutingModel` takes, and labels.  Out: scores and a loss, as transformers' models for the same
    tasks give them.

The head is called ``score``, or ``qa_outputs`` for answers, as in transformers' own models: peft knows by
these names what it has to train whole.  A head that a folder does not have begins at random, and transformers
says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
from dualroute.export.hf.modeling_dualroute import DualRoutingModel, DualRoutingPreTrainedModel


class DualRoutingForSequenceClassification(DualRoutingPreTrainedModel):
    """Classes, or one number, for a text: read at its last token, its first, or over the mean of all
    (``config.pooling``)."""

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = DualRoutingModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels), and the loss of ``labels`` (B,), or (B, num_labels) where several hold.

        Without an attention_mask, tokens of config.pad_token_id on the right are taken for padding.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        kept = tokens_of_texts(hidden, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(pooled(hidden, kept, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class DualRoutingForTokenClassification(DualRoutingPreTrainedModel):
    """Classes of tokens."""

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = DualRoutingModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, n, num_labels), and the loss of ``labels`` (B, n); -100 counts nothing."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class DualRoutingForQuestionAnswering(DualRoutingPreTrainedModel):
    """Scores of being an answer's first and last token."""

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.model = DualRoutingModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Two logits for each token, (B, n) each, and the loss of the positions (B,)."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=outputs.hidden_states
        )


class DualRoutingForMaskedLM(DualRoutingPreTrainedModel):
    """A model that reads both sides of each token, and finds masked ones."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.model = DualRoutingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, n, V), and the loss of ``labels`` (B, n), which are not shifted; -100 counts nothing."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def tokens_of_texts(hidden: Tensor, ids: Tensor | None, mask: Tensor | None, pad_id: int | None) -> Tensor:
    """(B, n) of the tokens that belong to a text; all, where nothing tells."""
    if mask is not None:
        return mask[:, -hidden.shape[1] :].to(hidden.device, torch.bool)
    kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if ids is None or pad_id is None:
        return kept
    after = (ids != pad_id).flip(1).cumsum(1).flip(1) > 0  # a token of the text follows, or is here
    return after & kept


def pooled(hidden: Tensor, kept: Tensor, pooling: str) -> Tensor:
    """(B, n, dim) → (B, dim)."""
    if pooling == "mean":
        summed = (hidden * kept[..., None]).sum(1)
        return summed / kept.sum(1, keepdim=True).clamp_min(1).to(summed.dtype)
    numbers = torch.arange(kept.shape[1], device=kept.device)
    if pooling == "first":
        places = torch.where(kept, numbers, kept.shape[1] - 1).amin(1)
    else:
        places = torch.where(kept, numbers, 0).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), places]
