"""A model with ``causal: false``: both sides of each token, no other document, and nothing that decodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from dualroute.attention import reference
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.decoding.generation import continue_batch

SMALL = {
    "vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 4, "dense_every": 2, "window": 5, "block": 8,
    "sub_block": 4, "top_k": 2, "causal": False,
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"global_mode": "routed"},
    {"global_mode": "routed", "far_summary": "first_order", "num_kv_heads": 2},
    {"global_mode": "routed", "far_summary": "none", "router": "moment"},
    {"global_mode": "auto", "auto_break_even": 24},
    {"global_mode": "full"},
    {"attention": "dense"},
    {"attention": "local"},
    {"attention": "interleaved"},
]


def build(**changes: Any) -> DualRoutingTransformer:
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(**{**SMALL, **changes})).double().eval()
    for parameter in model.parameters():  # sharper logits than those of the initial weights
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model


def ids(length: int, seed: int = 1) -> Tensor:
    return torch.randint(50, (1, length), generator=torch.Generator().manual_seed(seed))


def by_reference(model: DualRoutingTransformer, tokens: Tensor) -> Tensor:
    """Hidden states (n, dim) of one document (n,), from the weights and the formulas."""
    hidden, positions = model.embedding(tokens), torch.arange(len(tokens))
    for layer in model.layers:
        attention: Any = layer.attention
        rows, outputs = layer.attention_norm(hidden), []
        for route, projection in (("global", attention.global_qkv), ("local", attention.local_qkv)):
            if projection is None:
                continue
            heads = (rows @ projection.weight.T).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
            kv_heads = len(heads) // (attention.group + 2)
            query, key, value = heads.split([kv_heads * attention.group, kv_heads, kv_heads])
            query, key = reference.rotate(query, positions), reference.rotate(key, positions)
            limit, block = attention.max_exact_blocks, attention.block
            if route == "local":
                out = reference.local(query, key, value, window=attention.window, causal=False)
            elif limit is None or len(tokens) <= limit * block:
                out = reference.full(query, key, value, causal=False)
            else:
                how = {k: v for k, v in vars(attention.routing).items() if k != "cluster_span"}
                out = reference.routed(query, key, value, block=block, causal=False, **how)
            outputs.append(out.transpose(0, 1).flatten(1))
        hidden = hidden + torch.cat(outputs, 1) @ attention.out_proj.weight.T
        hidden = hidden + layer.ffn(layer.ffn_norm(hidden))
    return model.norm(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_the_formulas_of_each_alone(kind: dict[str, Any]) -> None:
    model, lengths = build(**kind), (19, 53, 8)
    documents = [ids(length, seed)[0] for seed, length in enumerate(lengths)]
    numbers = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([*lengths, 6]))[None]
    packed = torch.cat([*documents, torch.zeros(6, dtype=torch.long)])[None]
    actual = model.hidden_states(packed, segment_ids=numbers)[0, : sum(lengths)]
    wanted = torch.cat([by_reference(model, document) for document in documents])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=wanted.dtype)
    parameters = [p for name, p in model.named_parameters() if name != "head.weight"]
    got = torch.autograd.grad(actual, parameters, cotangent)
    for one, other in zip(got, torch.autograd.grad(wanted, parameters, cotangent), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_both_sides_of_its_document_and_no_other(kind: dict[str, Any]) -> None:
    model = build(**kind)
    segments = torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor([30, 45]))[None]
    embedded = model.embedding(ids(75)).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded  # type: ignore[method-assign]
    hidden = model.hidden_states(ids(75), segment_ids=segments)
    for token, first, last in ((12, 0, 30), (50, 30, 75)):
        (seen,) = torch.autograd.grad(hidden[0, token].sum(), embedded, retain_graph=True)
        reached = seen[0].abs().sum(1) > 0
        assert not reached[:first].any()
        assert not reached[last:].any()
        # two layers of windows of 5 reach 8 tokens to each side, the global route all of them
        near = model.config.attention == "local" or model.config.far_summary == "none"
        reach = slice(max(first, token - 8), min(last, token + 9)) if near else slice(first, last)
        assert reached[reach].all()
        if model.config.attention == "local":
            assert int(reached.sum()) == reach.stop - reach.start


def test_it_is_another_model_than_the_causal_one_with_the_same_weights() -> None:
    encoder, decoder = build(global_mode="routed"), build(global_mode="routed", causal=True)
    assert encoder.num_parameters() == decoder.num_parameters()
    assert not torch.allclose(encoder(ids(40))[:, :20], decoder(ids(40))[:, :20])


@pytest.mark.parametrize("kind", KINDS)
def test_flops_count_what_is_read_of_both_sides(kind: dict[str, Any]) -> None:
    context = 400
    model = build(**kind)
    weights = model.num_parameters(embeddings=False) + 50 * 32
    spread = torch.arange(context)
    near = int(((spread[:, None] - spread).abs() < 5).sum()) / context
    read = (2 + 2) * 8 if kind.get("global_mode") in ("routed", "auto") else context
    keys = {"dense": 8 * context, "local": 8 * near, "interleaved": 4 * context + 4 * near}.get(
        model.config.attention, 2 * (2 * read + 2 * near)
    )
    assert model.flops_per_token(context) == pytest.approx(6 * weights + 12 * 8 * keys)


def test_what_reads_from_left_to_right_is_refused_by_name() -> None:
    model = build()
    with pytest.raises(UserError, match=r"decoding token by token .*model\.causal false"):
        model.new_caches(1, 8)
    with pytest.raises(UserError, match=r"generation .*model\.causal false"):
        next(generate(model, [1, 2], SamplingConfig(max_new_tokens=2)))
    with pytest.raises(UserError, match=r"generation .*model\.causal false"):
        continue_batch(model, ids(4), 2, torch.Generator())


def test_a_file_says_it_only_where_it_is_so(tmp_path: Any) -> None:
    assert "causal" not in ModelConfig().to_dict()
    path = tmp_path / "model.json"
    path.write_text(json.dumps(ModelConfig(causal=False).to_dict()))
    assert ModelConfig.from_file(path).causal is False
    path.write_text(json.dumps(ModelConfig().to_dict()))
    assert ModelConfig.from_file(path).causal is True
