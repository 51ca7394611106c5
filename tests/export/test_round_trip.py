"""A model from elsewhere goes through everything and leaves with its chat template and its ends of a text."""

import json

import pytest

from dualroute.cli import main
from dualroute.compress.config import ConvertConfig
from dualroute.compress.convert import convert
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import GENERATION, TEMPLATE, TokenizerSettings
from dualroute.evaluate.load import load
from dualroute.export.hf import folder as huggingface
from dualroute.model.checkpoint.format import TOKENIZER, TOKENIZER_SETTINGS, find_checkpoint, save_model
from dualroute.training.checkpointing.commands import export as export_weights

SAID = TokenizerSettings(
    "{% for m in messages %}<unk>{{ m.content }}<pad>{% endfor %}",
    {"eos_token": "<pad>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    (2, 0),
)
RUN = (
    "--data.context 64 --data.val_tokens 128 --train.micro_batch 2 --train.tokens_per_batch 128 "
    "--train.max_steps 2 --optim.warmup_steps 1 --monitor.sample_every_steps 0 --monitor.peak_tflops 0.1"
).split()


@pytest.mark.slow
def test_settings_of_a_tokenizer_travel(tiny_dataset, loaded, tmp_path):
    made = loaded(num_heads=4, max_context=64)
    made.tokenizer = made.tokenizer.with_settings(SAID)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    huggingface.write(made, elsewhere)

    converted = convert(ConvertConfig(str(elsewhere), str(tmp_path / "converted"))).checkpoint.folder
    names = ["--init_from", converted, "--data.path", tiny_dataset, "--output", tmp_path / "run"]
    assert main(["pretrain", *RUN, *map(str, names)]) == 0
    trained = find_checkpoint(tmp_path / "run")
    assert TOKENIZER_SETTINGS in trained.metadata["files"]
    assert [entry["operation"] for entry in trained.metadata["lineage"]] == ["elsewhere", "convert"]
    assert export_weights(str(trained.folder), str(tmp_path / "weights")) == 0
    again = load(tmp_path / "weights", "cpu")
    save_model(again.model, tmp_path / "smaller", again.tokenizer.path, {})  # as prune and quantize do

    for folder in (converted, trained.folder, tmp_path / "weights", tmp_path / "smaller"):
        tokenizer = Tokenizer(folder / TOKENIZER)
        assert tokenizer.settings == SAID
        assert tokenizer.eos_ids == (2, 0)
    (tmp_path / "out").mkdir()
    huggingface.write(load(tmp_path / "smaller", "cpu"), tmp_path / "out")
    assert (tmp_path / "out" / TEMPLATE).read_text() == SAID.chat_template
    assert json.loads((tmp_path / "out" / GENERATION).read_text())["eos_token_id"] == [2, 0]
    settings = json.loads((tmp_path / "out" / TOKENIZER_SETTINGS).read_text())
    assert settings["eos_token"] == "<pad>"
