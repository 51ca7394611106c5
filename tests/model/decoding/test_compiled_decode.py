"""The static step gives what ordinary decoding gives, for every kind of layer and at every length."""

import copy
import gc
import itertools
import shutil
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from dualroute.attention.backend import token_kernels
from dualroute.compress.quantize import quantize_model
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.decoding import compiled_decode
from dualroute.model.decoding.compiled_decode import CompiledDecoder
from dualroute.model.quantized import Quantization

SMALL = {
    "vocab_size": 60,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "window": 6,
    "block": 8,
    "sub_block": 4,
}
KINDS = {
    "routed": {"global_mode": "routed", "top_k": 2, "num_layers": 2},
    "routed, nothing chosen": {"global_mode": "routed", "top_k": 0},
    "moment, first order": {
        "global_mode": "routed",
        "top_k": 1,
        "router": "moment",
        "far_summary": "first_order",
    },
    "mean, no summary": {"global_mode": "routed", "top_k": 1, "router": "mean", "far_summary": "none"},
    "grouped": {"global_mode": "routed", "top_k": 2, "num_heads": 8, "num_kv_heads": 4},
    "full": {"global_mode": "full"},
    "dense, grouped": {"attention": "dense", "num_kv_heads": 2},
    "local": {"attention": "local"},
    "interleaved": {"attention": "interleaved", "dense_every": 2, "num_layers": 2},
    "global in one layer": {"global_mode": "routed", "top_k": 1, "global_layers": [1], "num_layers": 2},
    "norms and gates": {"global_mode": "routed", "top_k": 1, "qk_norm": True, "gate": True},
    "no global positions": {"global_mode": "routed", "top_k": 1, "global_rotary_factor": 0.0},
    "similar keys": {"global_mode": "routed", "top_k": 1, "cluster_span": 32, "global_rotary_factor": 0.0},
    "one choice of blocks": {"global_mode": "routed", "top_k": 1, "num_layers": 3, "share_choice": 2},
    "some channels": {"global_rotary_factor": 0.5, "local_rotary_factor": 0.25, "num_kv_heads": 2},
    "biases and scaled RoPE": {"global_mode": "full", "qkv_bias": True, "rope_scaling": {"factor": 4.0}},
}


#: of each route one: also after 5 tokens, which fill neither a window nor a block
SOME_KINDS = ("routed", "full", "local")


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = DualRoutingTransformer(ModelConfig(**(SMALL | {"max_context": 128} | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize(
    ("kind", "prompt"),
    # of 5 tokens, whose window is not full either, for one kind of each route
    [
        *itertools.product(KINDS, [1]),
        *itertools.product(SOME_KINDS, [5, 37]),
        *(pytest.param(kind, 37, marks=pytest.mark.slow) for kind in KINDS if kind not in SOME_KINDS),
    ],
)
def test_static_steps_equal_ordinary_ones(kind, prompt, monkeypatch):
    monkeypatch.setattr(compiled_decode, "SIZES", (20, 61, 96))
    model = build(**({"num_layers": 1} | KINDS[kind]))
    ids = torch.randint(60, (3, 70))
    ours, theirs = model.new_caches(3, 70), model.new_caches(3, 70)
    decoder = CompiledDecoder(model, compile=False)
    with torch.no_grad():
        for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, 70))]:
            expected = model.head(model.hidden_states(ids[:, begin:end], caches=theirs)[:, -1])
            torch.testing.assert_close(decoder(ids[:, begin:end], ours), expected, rtol=1e-5, atol=1e-5)
    assert [cache.length for cache in ours] == [70] * model.config.num_layers
    with pytest.raises(ValueError, match="hold max_length=70"):
        decoder(ids[:, :1], ours)


@pytest.mark.usefixtures("each_kernels")
def test_both_kinds_of_steps_may_take_turns_on_one_cache():
    model = build(global_mode="routed", top_k=1)
    ids = torch.randint(60, (1, 80))
    caches, decoder = model.new_caches(1, 80), CompiledDecoder(model, compile=False)
    with torch.no_grad():
        expected = model(ids)[0]
        decoder(ids[:, :3], caches)
        for at in range(3, 80):
            token = ids[:, at : at + 1]
            if at % 3:
                logits = decoder(token, caches)[0]
            else:
                logits = model.head(model.hidden_states(token, caches=caches))[0, 0]
            torch.testing.assert_close(logits, expected[at], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_kernels")
def test_a_cache_that_is_too_small_at_first_grows():
    model = build(global_mode="routed", top_k=1)
    ids = torch.randint(60, (2, 70))
    caches = [layer.attention.new_cache(2, 70, capacity=16) for layer in model.layers]
    decoder = CompiledDecoder(model, compile=False)
    expected = model(ids)
    decoder(ids[:, :3], caches)
    for at in range(3, 70):
        logits = decoder(ids[:, at : at + 1], caches)
        torch.testing.assert_close(logits, expected[:, at], rtol=1e-4, atol=1e-4)
    assert not logits.requires_grad


@pytest.mark.usefixtures("each_kernels")
def test_equal_scores_choose_the_same_blocks():
    """Blocks of equal keys: the first ones win, statically too."""
    model = build(global_mode="routed", top_k=2, attention="dual", num_layers=1)
    ids = torch.full((1, 90), 7)
    caches, others = model.new_caches(1, 90), model.new_caches(1, 90)
    decoder = CompiledDecoder(model, compile=False)
    with torch.no_grad():
        for at in range(90):
            expected = model.head(model.hidden_states(ids[:, at : at + 1], caches=others))[:, 0]
            torch.testing.assert_close(decoder(ids[:, at : at + 1], caches), expected, rtol=1e-5, atol=1e-5)


def test_generated_text_is_the_same():
    model = build(global_mode="routed", top_k=1)
    sampling = SamplingConfig(max_new_tokens=60, seed=2)
    expected = list(generate(model, [1, 2, 3], sampling))
    decoder = CompiledDecoder(model, compile=False)
    assert list(generate(model, [1, 2, 3], sampling, decoder=decoder)) == expected


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize(("mode", "cache_dtype"), [("routed", "int8"), ("routed", "int4"), ("full", "int4")])
def test_quantised_caches_are_read_alike(mode, cache_dtype):
    model = build(global_mode=mode, top_k=1)
    ids = torch.randint(60, (2, 70))
    ours, theirs = (model.new_caches(2, 70, cache_dtype=cache_dtype) for _ in range(2))
    decoder = CompiledDecoder(model, compile=False)
    with torch.no_grad():
        for begin, end in [(0, 9), *((at, at + 1) for at in range(9, 70))]:
            expected = model.head(model.hidden_states(ids[:, begin:end], caches=theirs)[:, -1])
            found = decoder(ids[:, begin:end], ours)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_steps_give_the_same_logits_with_every_model_and_cache():
    """Models of equal shapes, caches of several kinds, in turns: kernels need one program for all of them."""
    ids = torch.randint(60, (1, 50))
    runs = []
    for seed, length, kept in [(0, 50, "auto"), (1, 50, "auto"), (1, 64, "auto"), (1, 50, "int4")]:
        shape = {"global_mode": "routed", "top_k": 1, "num_layers": 1, "global_rotary_factor": 0.5}
        model = build(seed, **shape) if len(runs) < 2 else runs[-1][0]
        decoder = CompiledDecoder(model) if len(runs) < 2 else runs[-1][1]
        theirs = model.new_caches(1, length, cache_dtype=kept)
        runs.append((model, decoder, model.new_caches(1, length, cache_dtype=kept), theirs))
    tolerances = [1e-4, 1e-4, 1e-4, 1e-3]  # the last cache rounds
    with torch.no_grad():
        for begin, end in [(0, 30), *((at, at + 1) for at in range(30, 50))]:
            for (model, decoder, ours, theirs), tolerance in zip(runs, tolerances, strict=True):
                expected = model.head(model.hidden_states(ids[:, begin:end], caches=theirs)[:, -1])
                found = decoder(ids[:, begin:end], ours)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    programs = 3 if token_kernels(ids.float()) is None else 1
    assert [len(run[1]._programs) for run in runs[:2]] == [1, programs]
    # the compiler remembers what it compiled, but not the models
    models = [weakref.ref(run[0]) for run in runs]
    del runs, model, decoder, ours, theirs
    gc.collect()
    assert [model() for model in models] == [None] * 4


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("tie", [True, False])
def test_compiled_int8_weights_are_read_by_the_kernels(tie):
    """Without torch's dispatcher between them, and from programs that the compiler keeps on disk."""
    shape = {"num_layers": 1, "tie_embeddings": tie, "ffn_dim": 80, "global_rotary_factor": 0.0}
    model = build(global_mode="routed", top_k=1, **shape)
    model = quantize_model(model, Quantization("int8_weight_only"))
    exact = copy.deepcopy(model).double()
    ids = torch.randint(60, (1, 50))
    counters.clear()
    decoder = CompiledDecoder(model.bfloat16())
    ours, theirs = model.new_caches(1, 50), exact.new_caches(1, 50)
    with torch.no_grad():
        for begin, end in [(0, 30), *((at, at + 1) for at in range(30, 50))]:
            expected = exact.head(exact.hidden_states(ids[:, begin:end], caches=theirs)[:, -1])
            error = decoder(ids[:, begin:end], ours) - expected
            assert error.norm() < 0.05 * expected.norm()  # bfloat16 costs 1 to 3 percent, compiled or not
        assert not counters["inductor"]["fxgraph_cache_bypass"]
        kernels = token_kernels(ids.float())
        if kernels is None or not kernels.fast_int8_product():
            return
        assert _dispatched(decoder, ids) == set()
        plain = CompiledDecoder(model, compile=False)
        assert _dispatched(plain, ids) == {"dualroute::decode_layer", "dualroute::int8_product"}


def _dispatched(decoder, ids):
    """The project's operators that torch's dispatcher is asked for in a step."""
    caches = decoder.model.new_caches(1, 50)
    for begin in range(2):  # the first step compiles
        with torch.profiler.profile() as profile:
            decoder(ids[:, begin : begin + 1], caches)
    return {event.name for event in profile.events() if event.name.startswith("dualroute::")}


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled_decode.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        CompiledDecoder(build())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inference_mode_may_begin_and_end_between_steps_and_training_goes_on(each_kernels, compile):
    model = build(global_mode="routed", top_k=1, num_layers=1 if compile else 2)  # each is compiled
    ids = torch.randint(60, (1, 50))
    with torch.no_grad():
        expected = model(ids)[0]
    # compiling takes long: each kind of kernels begins in another mode
    for inside in (each_kernels == "cpp",) if compile else (True, False):
        with torch.inference_mode(inside):
            caches, decoder = model.new_caches(1, 50), CompiledDecoder(model, compile=compile)
            decoder(ids[:, :20], caches)
        for at in range(20, 50):
            with torch.inference_mode((at < 35) == inside):
                logits = decoder(ids[:, at : at + 1], caches)[0]
            torch.testing.assert_close(logits, expected[at], rtol=1e-4, atol=1e-4)
    model.train()(ids).square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
