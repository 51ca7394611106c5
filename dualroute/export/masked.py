"""The model as one graph that holds for any batch and any length: what ONNX and torch.export are given.

In: a `DualRoutingTransformer`.  Out: `MaskedTransformer`, the same weights and the same layers with each
    route written as a masked softmax over all keys; next, a tracer records it.

The attention is that of :mod:`dualroute.attention.backends.traceable`, which holds what is said of it.
"""

from __future__ import annotations

from torch import Tensor, nn

from dualroute.attention.backends.traceable import traceable_attention
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.layers import TransformerBlock


class MaskedTransformer(nn.Module):
    """Token ids (B, n) → logits (B, n, V), equal to the model's for texts without padding.

    Args:
        model: Whose parameters are used, not copied.
        for_onnx: Choose blocks by top-k instead of a stable sort, which ONNX does not have.  Of equal scores
            its own TopK takes the first, as the router does; torch's takes any.

    Raises:
        UserError: The model is not causal, or its blocks are of similar keys.
    """

    def __init__(self, model: DualRoutingTransformer, for_onnx: bool = False) -> None:
        super().__init__()
        if not model.config.causal:
            raise UserError(
                "a graph of fixed operators is made of causal models only, and this one has model.causal "
                "false: export it with --format hf"
            )
        span = model.config.cluster_span
        if span and model.config.global_mode != "full" and model.config.attention in ("dual", "interleaved"):
            raise UserError(
                f"a graph of fixed operators has no blocks of similar keys, and this one has "
                f"model.cluster_span {span}: export it with --format hf"
            )
        self.model, self.for_onnx = model, for_onnx

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.model.embedding(input_ids)
        for layer in self.model.layers:
            assert isinstance(layer, TransformerBlock)
            hidden = hidden + traceable_attention(
                layer.attention, layer.attention_norm(hidden), self.for_onnx
            )
            hidden = hidden + layer.ffn(layer.ffn_norm(hidden))
        return self.model.head(self.model.norm(hidden))
