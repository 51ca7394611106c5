import pytest
import torch
import torch.nn.functional as F

from dualroute.model import DualRoutingTransformer, ModelConfig

SMALL = {
    "vocab_size": 50,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dense_every": 2,
    "window": 8,
    "block": 8,
    "sub_block": 4,
    "top_k": 2,
    "global_mode": "routed",
}


def build(**changes):
    torch.manual_seed(0)
    return DualRoutingTransformer(ModelConfig(**{**SMALL, **changes})).double().eval()


def ids(batch, length, seed=1):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["dual", "dense", "local", "interleaved"])
def test_no_token_sees_the_future(attention):
    model = build(attention=attention)
    tokens = ids(1, 40)
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 7) % 50
    torch.testing.assert_close(model(tokens)[:, :25], model(changed)[:, :25], rtol=0, atol=0)
    assert not torch.equal(model(tokens)[:, 25:], model(changed)[:, 25:])


def test_packed_documents_are_what_they_are_alone():
    model = build()
    first, second = ids(1, 19, 1), ids(1, 30, 2)
    segments = torch.tensor([[1] * 19 + [2] * 30 + [0] * 7])
    packed = torch.cat([first, second, torch.zeros(1, 7, dtype=torch.long)], 1)
    logits = model(packed, segment_ids=segments)
    torch.testing.assert_close(logits[:, :19], model(first))
    torch.testing.assert_close(logits[:, 19:49], model(second))
    assert logits.isfinite().all()


def test_dense_and_dual_have_the_same_parameters():
    sizes = {a: build(attention=a).num_parameters() for a in ("dual", "dense", "local", "interleaved")}
    assert len(set(sizes.values())) == 1


def test_interleaved_is_local_with_a_dense_layer_now_and_then():
    model = build(attention="interleaved", num_layers=5, dense_every=2)
    heads = [(layer.attention.global_heads, layer.attention.local_heads) for layer in model.layers]
    assert heads == [(0, 4), (4, 0), (0, 4), (4, 0), (0, 4)]
    per_layer = [build(attention=a, num_layers=1).flops_per_token(512) for a in ("local", "dense")]
    weights = 6 * 50 * 32  # of the head, in every model once
    expected = 3 * per_layer[0] + 2 * per_layer[1] - 4 * weights
    # the final norm's weights are counted with the layers
    assert model.flops_per_token(512) == pytest.approx(expected - 4 * 6 * 32)
    tokens = ids(1, 40)
    caches = model.new_caches(1, 40)
    pieces = [model.hidden_states(tokens[:, a:b], caches=caches) for a, b in [(0, 30), (30, 31), (31, 40)]]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(tokens))


def test_some_layers_have_a_global_route():
    model = build(num_layers=3, num_heads=8, global_layers=[0, 2], global_heads=2, local_heads=6)
    heads = [(layer.attention.global_heads, layer.attention.local_heads) for layer in model.layers]
    assert heads == [(2, 6), (0, 8), (2, 6)]
    kinds = (("dual", 2), ("local", 1))
    for count in ("flops_per_token", "attention_flops_per_token"):
        every, none = (
            getattr(build(num_layers=3, num_heads=8, global_heads=2, local_heads=6, attention=kind), count)(
                512
            )
            for kind, _ in kinds
        )
        assert getattr(model, count)(512) == pytest.approx((2 * every + none) / 3)
    assert model.num_parameters() == build(num_layers=3, num_heads=8).num_parameters()
    tokens = ids(2, 40)
    caches = model.new_caches(2, 40)
    assert [cache.global_cache is None for cache in caches] == [False, True, False]
    pieces = [model.hidden_states(tokens[:, a:b], caches=caches) for a, b in [(0, 30), (30, 31), (31, 40)]]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(tokens))
    whole = model.config.to_dict()
    assert whole["global_layers"] == [0, 2]
    assert "global_layers" not in build().config.to_dict()


def test_tied_embeddings_are_one_tensor_and_counted_once():
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 50 * 32
    assert tied.num_parameters(embeddings=False) == untied.num_parameters(embeddings=False)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_may_begin_larger_than_all_else(tied):
    def drawn(**more):
        torch.manual_seed(0)
        shape = {"vocab_size": 500, "dim": 64, "num_layers": 1, "num_heads": 2, "tie_embeddings": tied}
        return DualRoutingTransformer(ModelConfig(**shape, **more)).state_dict()

    usual, large = drawn(), drawn(embedding_std=0.5)
    scaled = {"embedding.weight", "head.weight"} if tied else {"embedding.weight"}
    for name, value in usual.items():
        torch.testing.assert_close(large[name], value * (25 if name in scaled else 1))


def test_the_head_lends_its_weight_to_a_loss():
    model = build()
    hidden = model.hidden_states(ids(2, 12))
    loss = model.head(hidden, lambda h, w: F.linear(h, w).logsumexp(-1).sum())
    torch.testing.assert_close(loss, model(ids(2, 12)).logsumexp(-1).sum())


def test_cached_decoding_equals_the_full_forward():
    model = build()
    tokens = ids(2, 45)
    caches = model.new_caches(2, 45)
    pieces = [model.hidden_states(tokens[:, a:b], caches=caches) for a, b in [(0, 21), (21, 22), (22, 45)]]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(tokens))


def test_initial_loss_is_that_of_a_uniform_guess():
    model = build(dim=64)
    loss = F.cross_entropy(model(ids(4, 64))[:, :-1].flatten(0, 1), ids(4, 64)[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(50.0).log().item()) < 0.1


def test_flops_follow_the_arithmetic_of_each_route():
    context, layers, head_dim = 1024, 2, 8
    dense = build(attention="dense").flops_per_token(context)
    weights = 6 * (build().num_parameters(embeddings=False) + 50 * 32)
    assert dense == weights + 12 * layers * head_dim * 4 * (context + 1) / 2
    local = build(attention="local").flops_per_token(context)
    # tokens 0..7 see 1..8 keys, the rest 8
    assert local == pytest.approx(weights + 12 * layers * head_dim * 4 * (8 - 28 / context))
    assert weights < build().flops_per_token(context) < dense


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is null"):
        DualRoutingTransformer(ModelConfig())


@pytest.mark.parametrize("preset", ["tiny", "5m", "160m", "410m", "1b", "7b"])
def test_presets_have_the_size_they_are_named_for(preset, pytestconfig):
    import yaml

    values = yaml.safe_load((pytestconfig.rootpath / f"configs/model/{preset}.yaml").read_text())
    with torch.device("meta"):
        model = DualRoutingTransformer(ModelConfig(vocab_size=32000, **values))
    named = {"tiny": 1.8e6, "5m": 4.8e6, "160m": 113e6, "410m": 302e6, "1b": 1.0e9, "7b": 7.0e9}[preset]
    assert model.num_parameters(embeddings=False) == pytest.approx(named, rel=0.05)
