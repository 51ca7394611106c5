"""What an export wrote comes back, as it was and as transformers saved it again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualroute.compress.config import ConvertConfig
from dualroute.compress.convert import convert
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.export.command import described
from dualroute.export.hf import folder as huggingface
from dualroute.model.foreign.hub import load_causal_lm, tokenizer_file
from dualroute.model.foreign.own_export import exported_lineage
from tests.export.conftest import KINDS, checkpoint, loaded  # noqa: F401


@pytest.fixture
def exported(loaded, tmp_path):  # noqa: F811
    """Write a folder: `exported(**options of ModelConfig)` → (what was loaded, the folder)."""

    def write(**options):
        made, folder = loaded(**options), tmp_path / "hf"
        folder.mkdir()
        huggingface.write(made, folder)
        return made, folder

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_folder_has_the_same_weights(kind, exported):
    made, folder = exported(**KINDS[kind])
    back, tokenizer = load_causal_lm(folder)
    assert back.config == made.model.config
    ours, theirs = dict(made.model.named_parameters()), dict(back.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tokenizer == folder / "tokenizer.model"


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_was_tuned_elsewhere(tied, exported, tmp_path):
    """Saved by transformers in shards, with tokens added and the vocabulary padded."""
    transformers = pytest.importorskip("transformers")
    made, folder = exported(tie_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = [2, 321]
    model.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2

    done = convert(ConvertConfig(str(tmp_path / "tuned"), str(tmp_path / "back")))
    back = load(done.checkpoint.folder, "cpu")
    ids = torch.randint(322, (2, 90), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back.model(ids), model.eval()(ids).logits[..., :322], rtol=0, atol=1e-4)
    assert back.model.config.vocab_size == back.tokenizer.vocab_size == 322
    assert back.tokenizer.eos_ids == (2, 321)
    messages = [{"role": "user", "content": "the river"}]
    wanted = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert back.tokenizer.chat(messages).ids == wanted
    assert wanted[0] == 320
    text = "The old river.\n  Sees 漢字 <eos>"
    assert back.tokenizer.encode(text) == made.tokenizer.encode(text)


def test_the_same_tokenizer_in_both_forms(exported):
    made, folder = exported()
    fast = Tokenizer(folder / "tokenizer.json")
    assert fast.sha256 != made.tokenizer.sha256
    assert fast.same_ids(made.tokenizer)
    assert made.tokenizer.same_ids(fast)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 320, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert not Tokenizer(folder / "tokenizer.json").same_ids(made.tokenizer)
    assert tokenizer_file(folder) == folder / "tokenizer.json"  # it holds a token more


def test_history_comes_back(exported):
    made, folder = exported()
    assert exported_lineage(folder) == {}
    (folder / "export.json").write_text(json.dumps({"checkpoint": described(made.checkpoint)}))
    back = exported_lineage(folder)
    assert [entry["operation"] for entry in back["lineage"]] == ["pretrain", "elsewhere"]
    assert back["lineage"][0]["folder"] == "c"
    assert back["total_tokens"] == 1234
    (folder / "export.json").write_text('{"checkpoint": 5}')
    assert exported_lineage(folder) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dualroute": None}, "lacks the table 'dualroute'"),
        ({"dualroute": {"unknown": 1}}, r"unknown keys \['unknown'\]"),
        ({"num_attention_heads": 5}, "config.json: model"),
        ({"num_attention_heads": "many"}, "config.json"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, r"8 tensor\(s\) .* has no place for, model.layers.1"),
        ({"vocab_size": 400}, r"embedding.weight has shape \(320, 32\)"),
    ],
)
def test_what_does_not_belong_together(exported, changes, named):
    _, folder = exported()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError, match=named) as caught:
        load_causal_lm(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_alone_and_a_tensor_too_many(exported, tmp_path):
    _, folder = exported()
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.weight": torch.zeros(2, 32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensor\(s\) .* score.weight for one: merge adapters"):
        load_causal_lm(folder)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter without its model: merge it"):
        load_causal_lm(tmp_path / "lora")
    shutil.copy(folder / "config.json", tmp_path / "lora" / "config.json")
    with pytest.raises(UserError, match=r"has neither model\.safetensors"):
        load_causal_lm(tmp_path / "lora")
