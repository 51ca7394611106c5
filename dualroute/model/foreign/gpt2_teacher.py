"""A GPT-2 as a teacher, run by transformers.

In: a Hugging Face directory on this machine.  Here: the library's model, with a mask that keeps packed
documents apart.  Out: hidden states and a head, as distillation asks for them.

Its positions are a table, so a window longer than the table cannot be read at all;
positions count from 0 in each document, which stretches it a little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig


def document_positions(segment_ids: Tensor) -> Tensor:
    """(B, n) position of each token inside its run of equal segment ids, from 0."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values


def document_mask(segment_ids: Tensor) -> Tensor:
    """(B, 1, n, n), True where a token may look: back, inside its own document, and at itself."""
    length = segment_ids.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    starts = torch.zeros_like(segment_ids)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    number = starts.cumsum(1)  # neighbours with equal ids are one document, as in `Layout`
    return (number[:, :, None] == number[:, None, :])[:, None] & back


class Gpt2Teacher(nn.Module):
    """Hidden states of a GPT-2.

    Args:
        folder: Its Hugging Face directory.
        dtype: Of the weights.

    Attributes:
        head: ``head.weight`` is (V, D).
        config: What is asked of it elsewhere: ``max_context``, the rows of its table of positions, ``dim``
            and ``num_layers``.

    Raises:
        UserError: transformers is not installed, or the directory cannot be read.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                f"{folder} is a GPT-2, which is run by transformers: pip install -e '.[export]'"
            ) from error
        try:
            model: Any = transformers.GPT2LMHeadModel.from_pretrained(
                folder, local_files_only=True, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{folder} cannot be read as a GPT-2 ({reason})") from error
        self.body: nn.Module = model.transformer
        self.head: nn.Module = model.lm_head
        self.config = ModelConfig(
            vocab_size=model.config.vocab_size,
            dim=model.config.n_embd,
            num_layers=model.config.n_layer,
            num_heads=model.config.n_head,
            max_context=model.config.n_positions,
            attention="dense",
        )
        self.eval()

    def hidden_states(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, n) token ids.
            segment_ids: (B, n) document of each token; null is one document a row.
            positions: (B, n) rows of the table of positions; null counts from 0 in each document.

        Returns:
            (B, n, D); what stands at padding means nothing.

        Raises:
            UserError: A document is longer than the table of positions.
        """
        if segment_ids is None:
            segment_ids = torch.ones_like(input_ids)
        if positions is None:
            positions = document_positions(segment_ids)
        limit = self.config.max_context
        if input_ids.shape[1] > limit and (longest := int(positions.max()) + 1) > limit:
            raise UserError(
                f"a document of {longest} tokens is longer than the teacher's {limit} positions: lower "
                f"data.context"
            )
        return self.body(
            input_ids=input_ids,
            attention_mask=document_mask(segment_ids),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
