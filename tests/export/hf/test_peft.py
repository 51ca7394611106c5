"""Adapters of the peft library on an exported model."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dualroute.attention.backend import plain_torch  # noqa: E402
from dualroute.export.hf.heads_dualroute import (  # noqa: E402
    DualRoutingForQuestionAnswering,
    DualRoutingForSequenceClassification,
    DualRoutingForTokenClassification,
)
from dualroute.export.hf.modeling_dualroute import DualRoutingForCausalLM  # noqa: E402
from tests.export.hf.models import GREEDY, config_of, ids_of, wrapped  # noqa: E402

LINEAR = {"global_qkv", "local_qkv", "out_proj", "gate", "up", "down"}
ADAPTERS = {
    "lora": {"kind": "LoraConfig", "target_modules": "all-linear"},
    "dora": {"kind": "LoraConfig", "target_modules": "all-linear", "use_dora": True},
    "ia3": {"kind": "IA3Config", "target_modules": ["global_qkv", "down"], "feedforward_modules": ["down"]},
    "prompt": {"kind": "PromptTuningConfig", "num_virtual_tokens": 4},
    "p-tuning": {"kind": "PromptEncoderConfig", "num_virtual_tokens": 4},
}


@pytest.fixture(autouse=True)
def plain_kernels():
    with plain_torch():
        yield


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_learns_writes_and_comes_back(name, tmp_path):
    options = dict(ADAPTERS[name])
    config = getattr(peft, options.pop("kind"))(task_type="CAUSAL_LM", **options)
    _, model = wrapped()
    tuned = peft.get_peft_model(model, config)
    ids, mask = ids_of(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = tuned.train()(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    inputs = {"input_ids": ids, "attention_mask": mask}
    texts = [
        tuned.eval().generate(**inputs, max_new_tokens=9, use_cache=use_cache, **GREEDY)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wrapped()[1], tmp_path).eval()
    with torch.no_grad():
        logits = tuned(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        if name in ("lora", "dora"):
            merged = again.merge_and_unload()
            assert type(merged) is DualRoutingForCausalLM
            torch.testing.assert_close(merged(**inputs).logits, logits, rtol=0, atol=1e-4)


def test_all_linear_is_every_layer_but_the_head():
    tuned = peft.get_peft_model(
        wrapped()[1], peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    assert tuned.targeted_module_names
    assert {name.rsplit(".", 1)[-1] for name in tuned.targeted_module_names} == LINEAR


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (DualRoutingForSequenceClassification, "SEQ_CLS"),
        (DualRoutingForTokenClassification, "TOKEN_CLS"),
        (DualRoutingForQuestionAnswering, "QUESTION_ANS"),
    ],
)
def test_a_fresh_head_is_trained_whole(kind, task):
    model = kind(config_of(wrapped()[0].config, num_labels=3))
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=sorted(LINEAR)))
    head = "qa_outputs" if task == "QUESTION_ANS" else "score"
    trained = [name for name, value in tuned.named_parameters() if value.requires_grad]
    assert sum(f".{head}.modules_to_save." in name for name in trained) == 2


def test_a_learnt_prefix_of_keys_is_refused_in_a_line():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(wrapped()[1], config)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        tuned(input_ids=ids_of(5))
