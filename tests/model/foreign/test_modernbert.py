"""A ModernBERT comes in: the same hidden states, whatever head it had; with a WordPiece tokenizer too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from dualroute.cli import main  # noqa: E402
from dualroute.data.masking import mask_id  # noqa: E402
from dualroute.data.tokenizer import Tokenizer  # noqa: E402
from dualroute.errors import UserError  # noqa: E402
from dualroute.evaluate.load import load  # noqa: E402
from dualroute.export.hf import check_folder  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402
from dualroute.model.foreign.hub import load_dense  # noqa: E402
from tests.tasks.made import MOODS, SMALL, reviews, write_jsonl  # noqa: E402

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "local_attention": 12,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "pad_token_id": 0,
}


def word_pieces(path: Path) -> int:
    """Write a BERT's tokenizer.json; the number of its ids."""
    made = tokenizers.BertWordPieceTokenizer(lowercase=True)
    texts = [row["review"] for row in reviews(200)] + ["the old river sees an unfriendly stone", "naïve café"]
    made.train_from_iterator(texts * 3, vocab_size=300, min_frequency=1)
    made.save(str(path))
    return int(made.get_vocab_size())


def modernbert(folder: Path, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    folder.mkdir()
    size = word_pieces(folder / "tokenizer.json")
    config = transformers.ModernBertConfig(vocab_size=size, **{**SHAPE, **options})
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # not nearly uniform, and norms that are not 1
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ModernBertModel", {}),
        ("ModernBertForMaskedLM", {"global_attn_every_n_layers": 2}),
        ("ModernBertForSequenceClassification", {"num_hidden_layers": 2, "local_attention": 128}),
    ],
)
@torch.no_grad()
def test_hidden_states_are_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = modernbert(tmp_path / "m", name, **options)
    ours, tokenizer = load_dense(tmp_path / "m")
    assert tokenizer == tmp_path / "m" / "tokenizer.json"
    encoder = theirs if name == "ModernBertModel" else theirs.model
    for length in (1, 7, 40, 100):
        ids = torch.randint(ours.config.vocab_size or 0, (2, length))
        wanted = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(ours.hidden_states(ids), wanted, rtol=0, atol=1e-4)


def test_it_is_converted_tuned_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has otherwise goes through a training and into the exported folder."""
    modernbert(tmp_path / "m", "ModernBertForMaskedLM", num_hidden_layers=2)
    made = tmp_path / "made"
    assert main(["convert", "--source", str(tmp_path / "m"), "--output", str(made)]) == 0
    loaded = load(made, "cpu")
    assert torch.equal(
        loaded.model.layers[0].ffn.up.weight, load_dense(tmp_path / "m")[0].layers[0].ffn.up.weight
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", reviews(60))
    small = SMALL[SMALL.index("--data.context") : -2]  # shape and vocabulary are the checkpoint's
    more = ["--data.path", str(rows), "--output", str(tmp_path / "run"), "--train.max_steps", "4"]
    assert main(["finetune", *small, *MOODS, "--init_from", str(made), *more]) == 0
    tuned = load(tmp_path / "run", "cpu", "float32")
    assert tuned.model.config.parts == loaded.model.config.parts
    (tmp_path / "hf").mkdir()
    huggingface.write(tuned, tmp_path / "hf")
    monkeypatch.setattr(huggingface, "run_check", lambda at, said: check_folder.check(str(at), said))
    huggingface.verify(tuned, tmp_path / "hf", ["the film was fine"])


def test_word_pieces_are_those_of_the_library(tmp_path: Path) -> None:
    word_pieces(tmp_path / "tokenizer.json")
    own = Tokenizer(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ["The film was FINE.", "unfriendly stones", "", "  two  spaces ", "Naïve cafés, 漢字", "x" * 300]
    for text in [*texts, " ".join(row["review"] for row in reviews(3000))]:
        assert own.encode(text) == theirs(text, add_special_tokens=False).input_ids
    pieces = own.pieces()
    assert (pieces[own.bos_id], pieces[own.eos_id], pieces[own.pad_id]) == ("[CLS]", "[SEP]", "[PAD]")
    assert pieces[mask_id(own)] == "[MASK]"
    assert own.decode(own.encode("the film was fine")) == "the film was fine"
    assert own.bos_id not in own.encode("[CLS] the film")  # a special token that a text spells is text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_bias": True}, "attention_bias True cannot be read"),
        ({"hidden_activation": "relu"}, "hidden_activation 'relu' cannot be read"),
        ({"num_hidden_layers": 3}, "has no place for"),
        ({"model_type": "bert"}, "learned positions.*masked pretraining"),
    ],
)
def test_what_differs_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    modernbert(tmp_path / "m", "ModernBertModel")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    if "num_hidden_layers" in changed:
        values["layer_types"] = values["layer_types"][:3]
    path.write_text(json.dumps({**values, **changed}))
    with pytest.raises(UserError, match=message):
        load_dense(tmp_path / "m")
