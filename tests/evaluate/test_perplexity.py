import gzip
import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.prepare import PrepareConfig, prepare
from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.data.masking import Masking
from dualroute.data.reader import IGNORE_INDEX, ShardReader
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.evaluate.perplexity import EvaluateConfig, evaluate, evaluate_command, text_windows
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from tests.conftest import write_corpus

TEXT = "The old bird sees the river.\nA stone sleeps under the hill.\n" * 12


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text(TEXT)
    return path


def literal_loss(model, ids, context, stride):
    """Target by target: each is predicted in the first window that holds it."""
    losses = []
    for target in range(1, len(ids)):
        window = max(0, -(-(target - context) // stride)) * stride
        logits = model(torch.tensor([ids[window:target]]))[0, -1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(ids[target]))))
    return losses


@pytest.mark.parametrize("stride", [pytest.param(48, marks=pytest.mark.slow), 16])
@torch.no_grad()
def test_every_target_is_scored_once_with_the_past_of_its_window(checkpoint, text, stride):
    loaded = load(checkpoint)
    ids = loaded.tokenizer.encode(TEXT, bos=True, eos=True)
    losses = literal_loss(loaded.model, ids, 48, stride)
    score = evaluate(EvaluateConfig(str(checkpoint), text=str(text), context=48, stride=stride, batch_size=3))
    assert score.targets == len(ids) - 1 == len(losses)
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


@torch.no_grad()
def test_through_a_cache_a_text_has_the_loss_of_writing_it(checkpoint, text):
    """Windows of several blocks: what is rounded is the past, and token by token says the same."""
    loaded = load(checkpoint)
    ids = torch.tensor(loaded.tokenizer.encode(TEXT, bos=True, eos=True))
    options = {"text": str(text), "context": 72, "batch_size": 2}
    plain = evaluate(EvaluateConfig(str(checkpoint), **options)).loss
    assert evaluate(EvaluateConfig(str(checkpoint), **options, cache_dtype="auto")).loss == pytest.approx(
        plain, rel=1e-5
    )
    for kind in ("int8", "int4"):
        losses = []
        for start in range(0, len(ids) - 1, 72):
            window = ids[start : start + 73]
            caches = loaded.model.new_caches(1, 72, cache_dtype=kind)
            logits = [loaded.model(window[None, n : n + 1], caches=caches)[0] for n in range(len(window) - 1)]
            losses.append(F.cross_entropy(torch.cat(logits), window[1:], reduction="none"))
        found = evaluate(EvaluateConfig(str(checkpoint), **options, cache_dtype=kind)).loss
        assert found == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert found != pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 5, 5), (30, 7, 3), (29, 7, 7), (8, 7, 1)])
def test_windows_label_each_target_once(length, context, stride):
    ids = torch.arange(100, 100 + length)
    labels = [
        label
        for batch in text_windows(ids, context, stride, batch_size=2)
        for label in batch["labels"].flatten().tolist()
        if label != IGNORE_INDEX
    ]
    assert labels == ids[1:].tolist()


@torch.no_grad()
def test_shards_are_scored_document_by_document(checkpoint, tiny_dataset):
    loaded = load(checkpoint)
    manifest = Manifest.load(tiny_dataset)
    reader, index = ShardReader(manifest, "val"), manifest.open_index("val")
    context = max(index[:, 2].tolist())  # so long that the only window cuts are document ends
    loaded.model.config.max_context = 10**6
    total, count = 0.0, 0
    for document, (_, _, tokens, _) in enumerate(index.tolist()):
        ids = torch.from_numpy(reader.read(document, 0, tokens))
        logits = loaded.model(ids[None, :-1])[0]
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        count += tokens - 1
    assert context > 64
    from dualroute.evaluate.perplexity import evaluate_shards

    # one window for everything: documents stay apart by their segments
    score = evaluate_shards(loaded, tiny_dataset, "val", int(index[:, 2].sum()), 1, None)
    assert (score.targets, score.loss) == (count, pytest.approx(total / count, rel=1e-5))
    split = manifest.split("val")
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / split.bytes, rel=1e-5)


def test_the_batch_size_changes_nothing(checkpoint, tiny_dataset):
    scores = [
        evaluate(EvaluateConfig(str(checkpoint), data=str(tiny_dataset), batch_size=size)) for size in (1, 5)
    ]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert scores[0].targets == scores[1].targets


def test_the_command_writes_its_figures(checkpoint, tiny_dataset, tmp_path, capsys):
    output = tmp_path / "figures.json"
    evaluate_command(EvaluateConfig(str(checkpoint), data=str(tiny_dataset), output=str(output)))
    figures = json.loads(output.read_text())
    assert f"{figures['loss']:.4f}" in capsys.readouterr().out
    assert figures["evaluation"]["data"] == str(tiny_dataset)


def test_compressed_text_is_read_by_its_ending(checkpoint, text, tmp_path):
    packed = tmp_path / "held_out.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    plain, compressed = (evaluate(EvaluateConfig(str(checkpoint), text=str(p))) for p in (text, packed))
    assert plain == compressed


def test_shards_of_another_tokenizer_are_refused(checkpoint, tmp_path):
    write_corpus(tmp_path / "corpus", 40, seed=9)
    options = {"vocab_size": 330, "reserved_tokens": 0, "val_fraction": 0.2, "progress": False}
    prepare(PrepareConfig(corpus=str(tmp_path / "corpus"), output=str(tmp_path / "other"), **options))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(EvaluateConfig(str(checkpoint), data=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"text": "x", "data": "y"}, "not both"),
        ({"data": "y", "stride": 3}, "stride"),
        ({"text": "x", "context": 0}, "context is 0"),
        ({"data": "y", "cache_dtype": "int8"}, "cache_dtype works with --text only"),
        ({"text": "x", "suite": "ruler", "cache_dtype": "int8"}, "not work with a suite"),
    ],
)
def test_contradictions_are_named(values, named):
    with pytest.raises(UserError, match=named):
        EvaluateConfig("run", **values)


def test_unusable_inputs_are_named(checkpoint, text, tmp_path):
    def refused(**values):
        with pytest.raises(UserError) as caught:
            evaluate(EvaluateConfig(str(values.pop("run", checkpoint)), **values))
        return str(caught.value)

    assert "--data" in refused()
    assert "max_context 128" in refused(text=str(text), context=129)
    assert "nowhere.txt" in refused(text=str(tmp_path / "nowhere.txt"))
    assert "stride 65" in refused(text=str(text), stride=65)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(text=str(tmp_path / "bytes.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "too short" in refused(text=str(tmp_path / "empty.txt"))
    assert "cannot be used here" in refused(text=str(text), device="abacus")
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = broken / "checkpoints" / "step-00000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors" in refused(run=broken, text=str(text))


def test_real_text(checkpoint, real_data):
    """WikiText-2's test file as it is published, through the whole command."""
    path = real_data / "wikitext" / "wt2.test.txt.gz"
    score = evaluate(EvaluateConfig(str(checkpoint), text=str(path), max_tokens=2000))
    assert score.targets == 1999
    assert 0 < score.bytes < 8000


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    checkpoint, tiny_dataset, tmp_path, monkeypatch
):
    import dualroute.evaluate.perplexity as perplexity

    monkeypatch.setattr(perplexity, "evaluate", lambda config: pytest.fail("it was measured"))
    config = EvaluateConfig(str(checkpoint), str(tiny_dataset), output=str(tmp_path / "no" / "figures.json"))
    with pytest.raises(UserError, match=r"there is no folder .*no: make it"):
        evaluate_command(config)
    monkeypatch.setattr(perplexity, "evaluate", lambda config: perplexity.Score(1.0, 2, 3.0))
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        evaluate_command(EvaluateConfig(str(checkpoint), str(tiny_dataset), output=str(tmp_path)))


def test_a_text_from_outside_has_a_limit_and_is_a_file(tmp_path, monkeypatch):
    import dualroute.evaluate.perplexity as perplexity

    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(UserError, match="no regular file"):
            perplexity.read_text(path)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * 10_000))
    monkeypatch.setattr(perplexity, "MOST_BYTES", 9_999)
    with pytest.raises(UserError, match="over 9,999 bytes"):
        perplexity.read_text(tmp_path / "bomb.gz")
    damaged = bytearray((tmp_path / "bomb.gz").read_bytes())
    damaged[12:20] = b"\xff" * 8
    (tmp_path / "bomb.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="cannot be read"):
        perplexity.read_text(tmp_path / "bomb.gz")


@pytest.mark.parametrize("what", ["data", "text"])
def test_a_model_that_reads_both_sides_is_scored_on_hidden_tokens(what, tiny_dataset, tmp_path, capsys):
    """In the share of its training; whatever its own seed was, by the same masks."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, dim=16, num_layers=1, num_heads=2, block=16, max_context=64, causal=False
    )
    model = DualRoutingTransformer(config).eval()
    said = {"context": 32, "settings": {"data": {"mask_share": 0.25}}}
    save_model(model, tmp_path / "c", tiny_dataset / "tokenizer.model", said)
    (tmp_path / "t.txt").write_text(TEXT * 9)
    source = {"data": tiny_dataset, "text": tmp_path / "t.txt"}[what]
    output = tmp_path / "f.json"
    asked = ["evaluate", "--checkpoint", tmp_path / "c", f"--{what}", source, "--output", output]
    assert main([*map(str, asked), "--max_tokens", "200"]) == 0
    assert "pseudo-perplexity" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert (found["masked"], found["mask_seed"]) == (0.25, 0)
    assert "bits_per_byte" not in found
    if what == "text":
        tokenizer = Tokenizer(tiny_dataset / "tokenizer.model")
        ids = np.array(tokenizer.encode(TEXT * 9, bos=True, eos=True)[:200])
        masking = Masking.of(tokenizer, 0.25, hashlib.sha256((TEXT * 9).encode()).hexdigest(), 0)
        losses = []
        for number in range(-(-len(ids) // 32)):
            part = ids[32 * number : 32 * number + 32]
            hidden = masking.hidden(part, np.ones_like(part), "text", number)
            given = torch.from_numpy(np.where(hidden, masking.mask_id, part))[None]
            wanted = torch.from_numpy(part)[hidden]
            losses += torch.nn.functional.cross_entropy(
                model(given)[0, hidden], wanted, reduction="none"
            ).tolist()
        assert found["targets"] == len(losses)
        assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    else:
        assert found["targets"] == 6 * 8 + 2  # 200 tokens: six windows of 32, and one of 8
