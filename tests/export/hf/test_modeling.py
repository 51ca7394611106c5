"""What transformers' own common tests ask of a model class, asked of ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dualroute.attention.backend import plain_torch  # noqa: E402
from dualroute.errors import UserError  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402
from dualroute.export.hf import heads_dualroute as heads  # noqa: E402
from dualroute.export.hf.configuration_dualroute import DualRoutingConfig  # noqa: E402
from dualroute.export.hf.modeling_dualroute import DualRoutingForCausalLM, DualRoutingModel  # noqa: E402
from tests.export.conftest import TINY, tiny_model  # noqa: E402
from tests.export.hf.models import GREEDY, config_of, ids_of, left_padded, wrapped  # noqa: E402

transformers.logging.set_verbosity_error()
CLASSES = [
    DualRoutingModel,
    DualRoutingForCausalLM,
    heads.DualRoutingForSequenceClassification,
    heads.DualRoutingForTokenClassification,
    heads.DualRoutingForQuestionAnswering,
]


@pytest.fixture(autouse=True)
def plain_kernels():
    with plain_torch():
        yield


def tiny_config(**options) -> DualRoutingConfig:
    return config_of(tiny_model().config, num_labels=3, **options)


def labelled(kind, batch=2, length=20):
    """Inputs that give a loss."""
    labels = {
        "ForCausalLM": {"labels": ids_of(length, batch)},
        "ForSequenceClassification": {"labels": torch.arange(batch) % 3},
        "ForTokenClassification": {"labels": ids_of(length, batch) % 3},
        "ForQuestionAnswering": dict.fromkeys(("start_positions", "end_positions"), torch.full((batch,), 2)),
    }  # fmt: skip
    return {"input_ids": ids_of(length, batch), **labels.get(kind.__name__.removeprefix("DualRouting"), {})}


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_model_comes_back(kind, tmp_path):
    model = kind(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    inputs = {"input_ids": ids_of(30, 2)}
    assert torch.equal(model(**inputs)[0], again.eval()(**inputs)[0])


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not DualRoutingForCausalLM])
def test_a_language_model_lends_its_backbone_to_every_class(kind, tmp_path):
    for tied in (True, False):
        _, model = wrapped(tie_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        other, info = kind.from_pretrained(tmp_path / str(tied), num_labels=3, output_loading_info=True)
        fresh = {name for name, _ in other.named_parameters() if name.startswith(("score", "qa_outputs"))}
        assert set(info["missing_keys"]) == fresh
        assert set(info["unexpected_keys"]) == (set() if tied else {"lm_head.weight"})
        backbone = getattr(other, "model", other)
        ids = ids_of(20)
        wanted = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(backbone.eval()(input_ids=ids).last_hidden_state, wanted)
        for name in fresh:
            spread = dict(other.named_parameters())[name]
            assert (spread.std() < 0.04) if name.endswith("weight") else not spread.any()


def test_a_weight_that_is_missing_is_told(tmp_path):
    _, model = wrapped()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for missing, renamed in (
        ("model.embedding.weight", "lm_head.weight"),  # another program's choice of the tied one: complete
        ("model.embedding.weight", None),
        ("model.layers.0.ffn.up.weight", None),
    ):
        left = {name: value for name, value in weights.items() if name != missing}
        if renamed:
            left[renamed] = weights[missing]
        save_file(left, path, {"format": "pt"})
        again, info = DualRoutingForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert (missing in info["missing_keys"]) == (renamed is None)
        if renamed:
            assert torch.equal(again.model.embedding.weight, weights[missing])


def test_fresh_weights_are_those_of_the_package():
    torch.manual_seed(0)
    shape = {**TINY, "vocab_size": 500, "dim": 64, "num_layers": 8, "gate": True, "qkv_bias": True}
    model = DualRoutingForCausalLM(DualRoutingConfig(shape))
    layer = model.model.layers[3]
    for weight, std in (
        (model.model.embedding.weight, 0.02),
        (layer.attention.global_qkv.weight, 0.02),
        (layer.attention.out_proj.weight, 0.02 / 4),
        (layer.ffn.down.weight, 0.02 / 4),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)
    assert not layer.attention.gate_weight.any()
    assert not layer.attention.global_qkv.bias.any()
    assert torch.equal(layer.ffn_norm.weight, torch.ones(64))
    small = DualRoutingForCausalLM(DualRoutingConfig(shape, initializer_range=0.001))
    assert float(small.model.embedding.weight.detach().std()) == pytest.approx(0.001, rel=0.1)


def test_the_standard_names_of_a_configuration_lead(tmp_path):
    config = DualRoutingConfig(TINY, hidden_size=16, num_hidden_layers=1, vocab_size=77)
    assert (config.shape.dim, config.shape.num_layers, config.shape.vocab_size) == (16, 1, 77)
    config.num_hidden_layers = 3
    assert len(DualRoutingModel(config).layers) == 3
    config.save_pretrained(tmp_path)
    again = DualRoutingConfig.from_pretrained(tmp_path, head_dim=8)
    assert again.shape == config.shape.__class__(**{**config.dualroute, "head_dim": 8})
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    with pytest.raises(UserError, match=r"model\.num_layers"):
        DualRoutingConfig(TINY, num_hidden_layers=0)


def test_resized_embeddings_keep_what_they_knew(tmp_path):
    for tied in (True, False):
        ours, model = wrapped(tie_embeddings=tied)
        ids = ids_of(20)
        for size in (330, 320):
            model.resize_token_embeddings(size)
            logits = model(input_ids=ids).logits
            assert logits.shape[-1] == size == model.config.vocab_size == model.config.shape.vocab_size
            torch.testing.assert_close(logits[..., :320], ours(ids), rtol=0, atol=1e-5)
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            model.save_pretrained(tmp_path / f"{tied}{size}")
            again = DualRoutingForCausalLM.from_pretrained(tmp_path / f"{tied}{size}")
            assert torch.equal(again(input_ids=ids).logits, logits)


def test_the_output_layer_is_a_module_of_the_model():
    _, model = wrapped()
    head = model.get_output_embeddings()
    assert [name for name, module in model.named_modules() if module is head] == ["lm_head"]
    assert model.base_model is model.model
    assert model.get_decoder() is model.model


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_layers_have_the_same_gradients(kind, use_reentrant):
    model = kind(tiny_config()).train()
    inputs = labelled(kind)

    def gradients():
        model.zero_grad()
        out = model(**inputs)
        (out[0] if out[0].ndim == 0 else out[0].square().sum()).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    wanted = gradients()
    calls = []
    backbone = getattr(model, "model", model)
    backbone.layers[0].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, value in gradients().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert model(**inputs, use_cache=True).get("past_key_values") is None
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_hidden_states_of_every_layer(kind):
    model = kind(tiny_config()).eval()
    backbone = getattr(model, "model", model)
    ids, mask = left_padded([ids_of(20)[0].tolist(), ids_of(9)[0].tolist()])
    seen = []
    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = {"input_ids": ids, "attention_mask": mask}
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert all(torch.equal(*pair) for pair in zip(seen, states[:-1], strict=True))
    assert torch.equal(states[-1], backbone(**inputs).last_hidden_state)
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3
    assert [state is not None for state in model(**inputs, output_hidden_states=[-1, 0]).hidden_states] == [
        True, False, True,
    ]  # fmt: skip
    if kind is DualRoutingForCausalLM:
        cached = model(**inputs, use_cache=True, output_hidden_states=True).hidden_states
        for one, other in zip(cached, states, strict=True):
            torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_embeddings_do_as_ids_do_and_tuples_as_dictionaries(kind):
    model = kind(tiny_config()).eval()
    inputs = labelled(kind)
    ids = inputs.pop("input_ids")
    wanted = model(input_ids=ids, **inputs)
    got = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs)
    assert torch.equal(got[0], wanted[0])
    row = model(input_ids=ids, return_dict=False, **inputs)
    assert isinstance(row, tuple)
    assert torch.equal(row[0], wanted[0])
    for both in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)


@pytest.mark.parametrize("kind", CLASSES[2:])
@torch.no_grad()
def test_a_row_has_the_scores_of_itself_alone(kind):
    model = kind(tiny_config()).eval()
    rows = [ids_of(length, seed=length)[0].tolist() for length in (20, 9, 1)]
    ids, mask = left_padded(rows)
    for flip in (False, True):  # padding left, then right
        ids, mask = (ids.flip(1), mask.flip(1)) if flip else (ids, mask)
        out = model(input_ids=ids, attention_mask=mask)
        for number, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row[::-1] if flip else row]))
            for name in ("logits", "start_logits", "end_logits"):
                if name in out:
                    got = out[name][number]
                    got = got if kind is CLASSES[2] else got[mask[number].bool()]
                    torch.testing.assert_close(got, alone[name][0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_where_a_text_is_classified():
    ids, mask = left_padded([ids_of(20)[0].tolist(), ids_of(9)[0].tolist()])
    for pooling in ("last", "first", "mean", None):
        model = heads.DualRoutingForSequenceClassification(tiny_config(pooling=pooling)).eval()
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = {
            "last": hidden[:, -1],
            "first": torch.stack([hidden[0, 0], hidden[1, 11]]),
            "mean": torch.stack([hidden[0].mean(0), hidden[1, 11:].mean(0)]),
        }[pooling or "last"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, model.score(pooled), rtol=0, atol=1e-6)
        if pooling != "mean":
            right = model(input_ids=F.pad(ids[:1], (0, 3)))  # no mask: the id of padding tells
            torch.testing.assert_close(right.logits, logits[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (1, torch.tensor([0.5, -1.0]), "regression"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
    ],
)
def test_losses_of_classes_and_numbers(num_labels, labels, problem):
    model = heads.DualRoutingForSequenceClassification(config_of(tiny_model().config, num_labels=num_labels))
    out = model(input_ids=ids_of(12, 2), labels=labels)
    assert model.config.problem_type == problem
    wanted = {
        "single_label_classification": F.cross_entropy,
        "regression": lambda logits, labels: F.mse_loss(logits[:, 0], labels),
        "multi_label_classification": F.binary_cross_entropy_with_logits,
    }[problem]
    torch.testing.assert_close(out.loss, wanted(out.logits, labels))


def test_the_loss_is_divided_by_the_targets_of_the_whole_batch():
    _, model = wrapped()
    ids = ids_of(30, batch=4)
    labels = ids.clone()
    labels[0, :20] = labels[2, 7:] = -100
    whole = model(input_ids=ids, labels=labels).loss
    targets = (labels[:, 1:] != -100).sum()
    halves = [
        model(input_ids=ids[part], labels=labels[part], num_items_in_batch=targets).loss
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), whole)


# ---------------------------------------------------------------- caches


@torch.no_grad()
def test_when_a_call_returns_a_cache():
    _, model = wrapped()
    ids = ids_of(20)
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
    assert model(input_ids=ids).past_key_values.get_seq_length() == 20
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model(input_ids=ids, position_ids=packed).past_key_values is None
    assert model(input_ids=ids, segment_ids=packed // 12 + 1).past_key_values is None
    with pytest.raises(ValueError, match="packed rows have no cache"):
        model(input_ids=ids, position_ids=packed, use_cache=True)
    model.config.use_cache = False
    assert model(input_ids=ids).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 20
    model.config.use_cache = True
    with torch.enable_grad():
        assert model.train()(input_ids=ids).past_key_values is None


@torch.no_grad()
def test_a_cache_that_was_not_asked_for_costs_nothing():
    """The call reads the text as one without a cache, and runs no layer twice."""
    ours, model = wrapped(global_mode="auto", auto_break_even=64)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    ids, mask = left_padded([ids_of(60)[0].tolist(), ids_of(50)[0].tolist(), ids_of(40)[0].tolist()])
    out = model(input_ids=ids, attention_mask=mask)
    assert len(calls) == 1
    assert not out.past_key_values.groups
    assert torch.equal(out.logits[:1], ours(ids[:1]))
    beams = out.past_key_values
    beams.reorder_cache(torch.tensor([2, 2, 0]))
    assert beams.batch_size == 3
    last = model(input_ids=ids_of(1, 3), past_key_values=beams)
    assert len(calls) == 1 + 2 + 2
    assert last.past_key_values.get_seq_length() == 61


# ---------------------------------------------------------------- placement


def test_layers_on_disk_and_in_memory(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ours, model = wrapped()
    model.save_pretrained(tmp_path / "saved")
    ids = ids_of(30)
    places = {"model.embedding": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu"}
    again = DualRoutingForCausalLM.from_pretrained(
        tmp_path / "saved", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(again(input_ids=ids).logits, ours(ids))
    texts = [each.generate(input_ids=ids, max_new_tokens=5, **GREEDY) for each in (model, again)]
    assert torch.equal(*texts)
    auto = DualRoutingForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu", dtype=torch.bfloat16)
    assert auto.dtype == torch.bfloat16
    assert auto(input_ids=ids).logits.dtype == torch.bfloat16


def test_every_class_is_found_in_a_folder(loaded, tmp_path):
    huggingface.write(loaded(), tmp_path)
    ids = ids_of(12)
    for auto, ends in (
        ("AutoModel", "Model"),
        ("AutoModelForCausalLM", "ForCausalLM"),
        ("AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("AutoModelForTokenClassification", "ForTokenClassification"),
        ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
    ):
        load = getattr(transformers, auto).from_pretrained
        model = load(tmp_path, trust_remote_code=True).eval()
        assert type(model).__name__ == f"DualRouting{ends}"
    model.save_pretrained(tmp_path / "tuned")  # with the code
    again = load(tmp_path / "tuned", trust_remote_code=True).eval()
    assert torch.equal(again(input_ids=ids)[0], model(input_ids=ids)[0])
    assert transformers.AutoModel.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
