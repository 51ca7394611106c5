"""The model as one graph that holds for any batch and any length: what ONNX and torch.export are given.

In: a `DualRoutingTransformer`.  Out: `MaskedTransformer`, the same weights and the same layers with each
    route written as a masked softmax over all keys; next, a tracer records it.

The attention is that of :mod:`dualroute.attention.backends.traceable`, which holds what is said of it.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from dualroute.attention.backends.traceable import traceable_attention
from dualroute.errors import UserError
from dualroute.export.parity import place_of_output
from dualroute.model import DualRoutingTransformer
from dualroute.model.layers import TransformerBlock


class MaskedTransformer(nn.Module):
    """Token ids (B, n) → logits (B, n, V), equal to the model's for texts without padding; or what a task's
    head gives: (B, n, outputs) of heads of tokens and spans, (B, outputs) where a text has one.

    Args:
        model: Whose parameters are used, not copied.
        for_onnx: Choose blocks by top-k instead of a stable sort, which ONNX does not have.  Of equal scores
            its own TopK takes the first, as the router does; torch's takes any.

    Raises:
        UserError: The model reads no ids, or its blocks are of similar keys.
    """

    def __init__(self, model: DualRoutingTransformer, for_onnx: bool = False) -> None:
        super().__init__()
        model.config.require_tokens("a graph of fixed operators")
        span = model.config.cluster_span
        if span and model.config.global_mode != "full" and model.config.attention in ("dual", "interleaved"):
            raise UserError(
                f"a graph of fixed operators has no blocks of similar keys, and this one has "
                f"model.cluster_span {span}: export it with --format hf"
            )
        self.model, self.for_onnx = model, for_onnx

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.model.embedding(input_ids)
        choices: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)  # by the layer that chooses
        for chooser, layer in zip(self.model.config.choosers, self.model.layers, strict=True):
            assert isinstance(layer, TransformerBlock)
            hidden = hidden + traceable_attention(
                layer.attention,
                layer.attention_norm(hidden),
                self.for_onnx,
                choices[chooser],
            )
            hidden = hidden + layer.ffn(layer.ffn_norm(hidden))
        hidden = self.model.norm(hidden)
        head = self.model.task_head
        if head is None:
            return self.model.head(hidden)
        place = place_of_output(head.config)
        if place is None:
            return head.project(hidden)
        mean = head.config.pooling == "mean" and head.config.kind != "item"
        outputs: Tensor = head.project(hidden.mean(1) if mean else hidden[:, place])
        return outputs
