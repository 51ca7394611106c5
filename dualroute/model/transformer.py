"""The model: token ids in; logits out, of the next token or, where it is not causal, of the token itself, or
what a task asks for.

``DualRoutingTransformer(config)(input_ids)`` runs in a plain Python shell; nothing here knows of a
trainer, a device or a rank.  Ids come from :mod:`dualroute.data.reader`, with ``segment_ids`` that say
which document each token belongs to; the layout of documents and blocks is computed once here and shared
by all layers; hidden states leave through :mod:`dualroute.model.lm_head`, or
:mod:`dualroute.model.task_heads`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute.attention.core.layout import Layout, LayoutPlan
from dualroute.attention.decoding import share_choices
from dualroute.attention.sequence_parallel import Group
from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.model.cost.flops import keys_read, routing_units, training_flops
from dualroute.model.frontends import Frontend
from dualroute.model.layers import TransformerBlock, norm_of, shared_choices
from dualroute.model.lm_head import NextTokenHead
from dualroute.model.task_heads import TaskHead

INIT_STD = 0.02


class DualRoutingTransformer(nn.Module):
    """Transformer: RMSNorm, DualRouting attention with RoPE, SwiGLU; a decoder, or with ``causal`` false an
    encoder, which reads both sides of each token.

    Args:
        config: Shape of the model; ``vocab_size`` must be set.

    Raises:
        UserError: ``vocab_size`` is null.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vocab_size = config.vocab_size
        if vocab_size is None:
            raise UserError("model.vocab_size is null: give it, or a data set whose tokenizer says it")
        config = config.resolved()
        self.config = config
        self.sequence_group: Group | None = None  # see set_sequence_group
        self.embedding: nn.Embedding | Frontend
        if config.frontend is None:
            self.embedding = nn.Embedding(vocab_size, config.dim)
        else:
            self.embedding = Frontend(config.frontend, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config.of_layer(i)) for i in range(config.num_layers))
        self.norm = norm_of(config)
        own = None if config.head_is_tied else nn.Parameter(torch.empty(vocab_size, config.dim))
        self.head = NextTokenHead(self.embedding.weight if own is None else own)
        self.task_head = None if config.task_head is None else TaskHead(config.task_head, config.dim)
        # counted now: a trainer that shards the model leaves parameters of size 0 behind
        vocabulary = {id(p): p.numel() for p in (self.embedding.weight, self.head.weight)}
        self._parameters_in_vocabulary = sum(vocabulary.values())
        self._parameters_in_layers = sum(p.numel() for p in self.parameters() if id(p) not in vocabulary)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02), but for the embedding where `ModelConfig.embedding_std` says so; projections back
        into the residual stream divided by √(2·layers), so that its variance does not grow with depth (GPT-2,
        Radford et al. 2019, §2.3)."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_layers)
        embedding_std = self.config.embedding_std or INIT_STD
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = embedding_std if module is self.embedding else INIT_STD
                nn.init.normal_(module.weight, std=std)
        tied = self.head.weight is self.embedding.weight
        nn.init.normal_(self.head.weight, std=embedding_std if tied else INIT_STD)
        if isinstance(self.embedding, Frontend):
            self.embedding.init_weights(INIT_STD)
        if self.task_head is not None:
            self.task_head.init_weights(INIT_STD)
        for layer in self.layers:
            assert isinstance(layer, TransformerBlock)
            nn.init.normal_(layer.attention.out_proj.weight, std=residual_std)
            nn.init.normal_(layer.ffn.down.weight, std=residual_std)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        caches: list[Any] | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, n) token ids; (B, n, features) inputs of a model with a frontend.
            segment_ids: (B, n) document number of each token, 0 for padding; null is one document.
            positions: (B, n) position for RoPE; null counts from 0 within each document.
            attention_mask: (B, n), False for padding; null derives it from ``segment_ids``.
            caches: One cache per layer from :meth:`new_caches`; the tokens continue what it holds.
            layout: That of ``segment_ids``, from :meth:`layout_plan`; null works it out here, which makes the
                host wait for a GPU.

        Returns:
            (B, n, dim); with a sequence group those of this rank's tokens, as :meth:`local_shard` cuts them.
        """
        if attention_mask is None and segment_ids is not None:
            attention_mask = segment_ids != 0
        if self.sequence_group is not None and caches is None:
            return self._divided_hidden_states(input_ids, segment_ids, positions, attention_mask, layout)
        hidden = self.embedding(input_ids)
        if caches is not None:
            for layer, cache, choice in zip(
                self.layers, caches, shared_choices(len(self.layers), self.config.choice_groups), strict=True
            ):
                hidden = layer(hidden, positions=positions, cache=cache, choice=choice)
            return self.norm(hidden)
        return self._through_layers(hidden, input_ids, segment_ids, positions, attention_mask, layout)

    def layout_plan(self) -> LayoutPlan:
        """How batches are laid out for this model, to be done where they are loaded."""
        limits: set[int | None] = {layer.attention.max_exact_blocks for layer in self.layers}  # type: ignore
        exact = tuple(sorted(limit for limit in limits if limit is not None))
        parts = 1 if self.sequence_group is None else self.sequence_group.size()
        return LayoutPlan(self.config.block, exact, self.config.grid, parts)

    def _through_layers(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        positions: Tensor | None,
        attention_mask: Tensor | None,
        layout: Layout | None,
    ) -> Tensor:
        if layout is None:
            batch, length = input_ids.shape[:2]
            layout = Layout.build(
                batch,
                length,
                self.config.block,
                segment_ids=segment_ids,
                attention_mask=attention_mask,
                device=input_ids.device,
                grid=self.config.grid,
            )
        layout = layout.at_positions(positions)
        if isinstance(self.embedding, Frontend):
            hidden = self.embedding.at_places(hidden, self.local_shard(layout.positions))
        for layer, choice in zip(
            self.layers, shared_choices(len(self.layers), self.config.choice_groups, layout), strict=True
        ):
            layer.attention.prepare(layout, hidden.dtype)  # type: ignore[union-attr,operator]
            hidden = layer(hidden, layout=layout, choice=choice)
        return self.norm(hidden)

    # ------------------------------------------------------------------ sequence parallelism

    def set_sequence_group(self, group: Group | None) -> None:
        """Divide every text among the ranks of ``group`` from now on; null ends it.  Decoding stays whole.

        All ranks of the group must be given the same inputs, whole; each embeds and holds its own tokens.
        """
        self.sequence_group = group
        for layer in self.layers:
            layer.attention.sequence_group = group  # type: ignore[union-attr]

    def local_shard(self, rows: Tensor, fill: float = 0) -> Tensor:
        """This rank's consecutive part, (B, ceil(n / P), ...), of (B, n, ...), filled up at the end."""
        if self.sequence_group is None:
            return rows
        padded = self._padded(rows, fill)
        return padded.chunk(self.sequence_group.size(), dim=1)[self.sequence_group.rank()]

    def _padded(self, rows: Tensor, fill: float) -> Tensor:
        assert self.sequence_group is not None
        missing = -rows.shape[1] % self.sequence_group.size()
        return F.pad(rows, (*(0, 0) * (rows.ndim - 2), 0, missing), value=fill)

    def _divided_hidden_states(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        positions: Tensor | None,
        attention_mask: Tensor | None,
        layout: Layout | None,
    ) -> Tensor:
        ids = self._padded(input_ids, 0)
        if ids.shape != input_ids.shape:
            if attention_mask is None:
                attention_mask = input_ids.new_ones(input_ids.shape[:2], dtype=torch.bool)
            attention_mask = self._padded(attention_mask, 0)
            segment_ids = None if segment_ids is None else self._padded(segment_ids, 0)
            positions = None if positions is None else self._padded(positions, 0)
        hidden = self.embedding(self.local_shard(input_ids))
        return self._through_layers(hidden, ids, segment_ids, positions, attention_mask, layout)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits (B, n, V), of the next token or, not causal, of the token itself, or a task's outputs
        for each token; arguments as in :meth:`hidden_states`."""
        hidden = self.hidden_states(input_ids, **inputs)
        if self.task_head is not None:
            outputs: Tensor = self.task_head(hidden, segment_ids=inputs.get("segment_ids"))
            return outputs
        if self.config.frontend is not None:
            raise UserError("a model with a frontend has no vocabulary to write: give it a task_head")
        return self.head(hidden)

    def new_caches(
        self,
        batch_size: int,
        max_length: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        cache_dtype: str = "auto",
        cache_offload: str | None = None,
    ) -> list[Any]:
        """Empty decoding caches, one per layer, on the model's device and in its dtype; complete blocks
        of the global route as integers with ``cache_dtype`` int8 or int4, its keys and values in a file of
        the folder ``cache_offload``, or in the memory of the ``host`` for a model that is not there.

        There is room for ``max_length`` tokens, or for ``capacity`` at first and for more when they come.

        Raises:
            UserError: The model is not causal, or the folder cannot be used, or is full.
        """
        self.config.require_causal("decoding token by token")
        weight = self.norm.weight  # floats in a quantised model too
        device = weight.device if device is None else device
        options: dict[str, Any] = {"cache_dtype": cache_dtype, "cache_offload": cache_offload}
        attentions: list[Any] = [layer.attention for layer in self.layers]
        try:
            caches = [
                attention.new_cache(batch_size, max_length, device, weight.dtype, capacity, **options)
                for attention in attentions
            ]
        except OSError as error:
            raise UserError(f"cache_offload {cache_offload}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        for group in self.config.choice_groups:
            share_choices([caches[number] for number in group], attentions[group[0]].routing.top_k)
        return caches

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trainable parameters; tied embeddings count once, and not at all with ``embeddings=False``."""
        return self._parameters_in_layers + (self._parameters_in_vocabulary if embeddings else 0)

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs (forward + backward) per token at a context of ``context`` tokens.

        6 per weight that a token is multiplied with (Kaplan et al. 2020, §2.1; the head counts, the
        embedding look-up does not), and 12·head_dim per head and key actually read: a key costs a dot
        product and a weighted sum, 4·head_dim forward, twice that backward.
        """
        return training_flops(self.config, context).of_model

    def attention_flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token of the attention itself, without projections, at ``context`` tokens.

        4·head_dim per head and key read.  In a routed layer besides: the choice of blocks (minmax: two
        products with the bounds of each sub-block; moment: with mean and variance of each block; mean: one),
        and the far summary of each block, 6·head_dim with its second order.
        """
        assert self.config.head_dim is not None
        layers = [self.config.of_layer(index) for index in range(self.config.num_layers)]
        units = sum(
            4 * sum(keys_read(layer, context)) + sum(routing_units(layer, context, chooses=chooser == number))
            for number, (chooser, layer) in enumerate(zip(self.config.choosers, layers, strict=True))
        )
        return units * self.config.head_dim
