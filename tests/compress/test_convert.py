"""`dualroute convert`: from a foreign or dense model to a checkpoint that every command takes."""

import json

import pytest
import torch
import torch.nn.functional as F

from dualroute.cli import main
from dualroute.cli.help import stage_parser
from dualroute.compress.convert import ConvertConfig, convert
from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model, save_model
from dualroute.model.decoding.generation import continue_batch
from dualroute.model.foreign.hub import load_causal_lm

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_context": 64, "block": 16}


@pytest.fixture
def stories(real_data):
    """Options that name the llama2.c model."""
    return {
        "source": str(real_data / "tiny_lms/stories260K.bin"),
        "tokenizer": str(real_data / "tiny_lms/tok512.bin"),
    }


@pytest.fixture(scope="module")
def dense(tiny_dataset, tmp_path_factory):
    """A dense checkpoint of ours with the tokenizer of the tiny data set."""
    torch.manual_seed(0)
    config = ModelConfig(
        **SMALL, attention="dense", vocab_size=Manifest.load(tiny_dataset).tokenizer.vocab_size
    )
    model = DualRoutingTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("dense") / "checkpoint"
    save_model(model, folder, tiny_dataset / "tokenizer.model", {"context": 48})
    return folder


@torch.no_grad()
def test_a_foreign_model_becomes_a_checkpoint(stories, tmp_path, capsys):
    output = tmp_path / "dense"
    assert main(["convert", "--output", str(output), "--attention", "dense",
                 "--source", stories["source"], "--tokenizer", stories["tokenizer"]]) == 0  # fmt: skip
    model = load_model(find_checkpoint(output))
    tokens = torch.randint(512, (1, 100), generator=torch.Generator().manual_seed(0))
    original, _ = load_causal_lm(stories["source"])
    torch.testing.assert_close(model(tokens), original(tokens), rtol=0, atol=0)
    assert main(["generate", "--checkpoint", str(output), "--prompt", "Once upon a time, there was a little",
                 "--sampling.temperature", "0", "--sampling.max_new_tokens", "20"]) == 0  # fmt: skip
    assert "little girl named Lily" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", stories["source"]]) == 2


def loss_on(model, tokens):
    """Nats per token of texts (B, n + 1)."""
    return float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.slow
@torch.no_grad()
def test_a_routed_conversion_keeps_the_loss(stories, tmp_path):
    """By default; the second order, which a model must have been trained with, loses many times as much."""
    original, _ = load_causal_lm(stories["source"])
    tokens = continue_batch(original, torch.ones(6, 1).long(), 511, torch.Generator().manual_seed(99))

    routing = {"window": 64, "global_mode": "routed", "block": 16, "sub_block": 16, "top_k": 4}
    gaps = []
    for changes in ({}, {"far_summary": "second_order"}):
        output = str(tmp_path / f"{len(gaps)}")
        done = convert(ConvertConfig(**stories, output=output, calibration_tokens=2048, **routing, **changes))
        gaps.append(loss_on(load_model(done.checkpoint), tokens) / loss_on(original, tokens) - 1)
    assert gaps[0] < 0.03
    assert gaps[1] > 5 * abs(gaps[0])


@pytest.mark.slow
@torch.no_grad()
def test_heads_are_divided_by_distance(stories, tmp_path):
    """What was measured is noted, and heads that look near lose less than any heads."""
    original, _ = load_causal_lm(stories["source"])
    tokens = continue_batch(original, torch.ones(8, 1).long(), 128, torch.Generator().manual_seed(99))

    losses = {}
    for choose in ("distance", "random"):
        done = convert(
            ConvertConfig(
                **stories, output=str(tmp_path / choose), window=16, global_mode="full", choose=choose,
                calibration_tokens=2048, context=128, seed=2,
            )
        )  # fmt: skip
        model = load_model(done.checkpoint)
        assert (model.config.attention, model.config.local_heads, model.config.window) == ("dual", 4, 16)
        note = done.checkpoint.metadata["conversion"]
        assert note["local_groups"] == done.local_groups
        if choose == "distance":
            assert done.mass.shape == (5, 8)
            noted = torch.tensor(note["mass_beyond_window"], dtype=torch.float64)
            torch.testing.assert_close(noted, done.mass, rtol=0, atol=1e-6)
        losses[choose] = loss_on(model, tokens)
    assert loss_on(original, tokens) < losses["distance"] < losses["random"]


@torch.no_grad()
@pytest.mark.parametrize("heads", ["divide", "both"])
def test_own_checkpoints_and_shards(dense, tiny_dataset, tmp_path, heads, capsys):
    arguments = ["--source", dense, "--output", tmp_path / "dual", "--heads", heads, "--window", "64"]
    arguments += ["--global_mode", "full", "--dtype", "float32", "--context", "40"]
    arguments += ["--choose", "random"] if heads == "divide" else ["--data", tiny_dataset]
    assert main(["convert", *map(str, arguments)]) == 0
    checkpoint = find_checkpoint(tmp_path / "dual")
    assert checkpoint.metadata["context"] == 48
    model, original = load_model(checkpoint), load_model(find_checkpoint(dense))
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), original(tokens), rtol=1e-4, atol=1e-5)
    assert model.config.local_heads == (2 if heads == "divide" else 4)
    command = ["evaluate", "--checkpoint", tmp_path / "dual", "--data", tiny_dataset, "--max_tokens", "500"]
    assert main([str(word) for word in command]) == 0


def test_distances_on_shards(dense, tiny_dataset, tmp_path, capsys):
    command = ["convert", "--source", dense, "--output", tmp_path / "dual", "--data", tiny_dataset,
               "--window", "8", "--calibration_tokens", "600"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    assert "beyond" in capsys.readouterr().out
    note = json.loads((tmp_path / "dual" / "checkpoint.json").read_text())["conversion"]
    mass = torch.tensor(note["mass_beyond_window"])
    for row, local in zip(mass.unflatten(1, (2, 2)).mean(2), note["local_groups"], strict=True):
        assert local == [int(row.argmin())]


def test_a_vocabulary_with_padding_is_cut_to_the_tokenizer(dense, tiny_dataset, tmp_path):
    for tied in (True, False):
        torch.manual_seed(0)
        size = Manifest.load(tiny_dataset).tokenizer.vocab_size
        model = DualRoutingTransformer(
            ModelConfig(**SMALL, attention="dense", vocab_size=size + 7, tie_embeddings=tied)
        )
        folder = tmp_path / f"padded-{tied}"
        save_model(model, folder, tiny_dataset / "tokenizer.model", {})
        convert(ConvertConfig(str(folder), str(tmp_path / f"cut-{tied}"), attention="dense"))
        cut = load_model(find_checkpoint(tmp_path / f"cut-{tied}"))
        tokens = torch.randint(size, (1, 30))
        torch.testing.assert_close(cut(tokens), model(tokens)[..., :size], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention": "dense", "window": 8}, "window works with --attention dual only"),
        ({"attention": "dense", "far_summary": "none"}, "far_summary works with --attention dual only"),
        ({"heads": "both", "local_heads": 2}, "local_heads works with --heads divide only"),
        ({"calibration_tokens": 0}, "calibration_tokens is 0"),
        ({"context": 1}, "context is 1"),
        ({"local_heads": 1}, "local_heads is 1"),
        ({"source": "nowhere"}, "no checkpoint at nowhere"),
        ({"context": 9, "window": 9, "block": 10}, "model.block=10 is not a multiple of sub_block=16"),
    ],
)
def test_what_cannot_be_converted(dense, tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        convert(ConvertConfig(**{"source": str(dense), "output": str(tmp_path / "new"), **options}))
    assert not (tmp_path / "new").exists()


def test_tokenizers_that_do_not_fit(stories, dense, tiny_dataset, tmp_path):
    output = str(tmp_path / "new")
    with pytest.raises(UserError, match="give the file with --tokenizer"):
        convert(ConvertConfig(stories["source"], output))
    with pytest.raises(UserError, match=f"has 512 ids and the model of {dense} 320"):
        convert(ConvertConfig(str(dense), output, tokenizer=stories["tokenizer"]))
    with pytest.raises(UserError, match="another tokenizer"):
        convert(ConvertConfig(**stories, output=output, data=str(tiny_dataset)))
    with pytest.raises(UserError, match="exists already"):
        convert(ConvertConfig(str(dense), str(tmp_path)))
    done = convert(ConvertConfig(**stories, output=output, attention="dense"))
    assert Tokenizer(done.checkpoint.folder / "tokenizer.model").vocab_size == 512
    convert(ConvertConfig(output, str(tmp_path / "dual"), choose="random"))
    with pytest.raises(UserError, match="attention 'dual'"):
        convert(ConvertConfig(str(tmp_path / "dual"), str(tmp_path / "twice"), choose="random"))


def test_every_option_is_explained():
    assert not [action.dest for action in stage_parser("convert")._actions if not action.help]


@torch.no_grad()
def test_a_hugging_face_folder_with_its_tokenizer(tmp_path, capsys):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    built.train_from_iterator(["a small house by the river, the old stone house"] * 4, trainer)
    torch.manual_seed(0)
    size = 320  # rows beyond the tokenizer's, as most models have them
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(built.to_str())
    command = ["convert", "--source", tmp_path / "hf", "--output", tmp_path / "dual", "--window", "64",
               "--global_mode", "full", "--calibration_tokens", "128", "--context", "64"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    model = load_model(find_checkpoint(tmp_path / "dual"))
    ids = torch.randint(built.get_vocab_size(), (1, 60))
    expected = theirs(ids).logits[..., : built.get_vocab_size()]
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    prompt = ["generate", "--checkpoint", tmp_path / "dual", "--prompt", "the old house"]
    assert main([str(word) for word in [*prompt, "--sampling.max_new_tokens", "4"]]) == 0
    assert "the old house" in capsys.readouterr().out


@pytest.mark.parametrize("choose", ["distance", "random"])
def test_a_budget_of_keys_is_kept(dense, tiny_dataset, tmp_path, choose, capsys):
    """What is written reads no more than was asked for, by the count that FLOPs are told by, and less
    diverges less."""
    from dualroute.compress.routing_budget import share_of_keys

    divergence = {}
    for keys in (0.3, 0.6):
        output = tmp_path / f"{keys}"
        words = ["convert", "--source", str(dense), "--output", str(output), "--keys", str(keys)]
        words += ["--choose", choose, "--data", str(tiny_dataset), "--calibration_tokens", "512"]
        assert main([*words, "--context", "64", "--block", "4", "--sub_block", "4", "--device", "cpu"]) == 0
        checkpoint = find_checkpoint(output)
        said = checkpoint.metadata["conversion"]["keys"]
        model = load_model(checkpoint)
        assert said["read"] <= keys
        assert share_of_keys(model.config, 64) == pytest.approx(said["read"])
        assert f"reads {said['read']:.1%} of the keys" in capsys.readouterr().out
        divergence[keys] = said["divergence"]
        assert torch.isfinite(model(torch.randint(3, 50, (1, 64)))).all()
    assert 0 < divergence[0.6] < divergence[0.3]


@torch.no_grad()
def test_the_search_measures_the_model_that_is_written(dense, tiny_dataset, tmp_path):
    """Its trials swap layers in one model; what comes out is built anew and diverges by as much."""
    from dualroute.compress.convert import _shards
    from dualroute.compress.routing_budget import KeySearch
    from dualroute.model.conversion import divide_heads, dual_config

    model = load_model(find_checkpoint(dense))
    config = ConvertConfig(source=str(dense), output=str(tmp_path / "out"), calibration_tokens=512)
    batches = list(_shards(config, str(tiny_dataset), Tokenizer(dense / "tokenizer.model"), 64))
    shape = dual_config(
        model.config,
        both=False,
        local_heads=2,
        window=32,
        block=4,
        sub_block=4,
        top_k=4,
        global_mode="routed",
    )
    search = KeySearch(model, batches, 64, torch.device("cpu"), shape=shape, local_groups=[[0], [1]])
    found = search.within(0.3)
    far = found.config.global_layers or [0, 1]
    groups = [[number] if number in far else [0, 1] for number in range(2)]
    written = divide_heads(model, found.config, groups)
    total = count = 0.0
    for batch in batches:
        segments = batch.get("segment_ids")
        q = model(batch["input_ids"], segment_ids=segments).log_softmax(-1)
        p = written(batch["input_ids"], segment_ids=segments).log_softmax(-1)
        kept = torch.ones(q.shape[:2], dtype=torch.bool) if segments is None else segments != 0
        total += float((q.exp() * (q - p)).sum(-1)[kept].sum())
        count += int(kept.sum())
    assert found.divergence == pytest.approx(total / count, rel=1e-4)
    assert found.divergence == pytest.approx(search.divergence(), rel=1e-6)


def test_a_budget_that_cannot_be_met_says_what_is_the_least(dense, tiny_dataset, tmp_path):
    options = {"source": str(dense), "output": str(tmp_path / "out"), "data": str(tiny_dataset)}
    small = {"calibration_tokens": 256, "context": 64, "block": 16, "device": "cpu"}
    with pytest.raises(UserError, match=r"--keys 0.01: .* reads at least 0\.\d+ of the keys of 64 tokens"):
        convert(ConvertConfig(**options, **small, keys=0.01))
    assert not (tmp_path / "out").exists()
    for wrong in ({"global_layers": [0]}, {"heads": "both"}):
        with pytest.raises(UserError, match="keys looks for the layers and heads itself: leave"):
            ConvertConfig(**options, keys=0.1, **wrong)
    with pytest.raises(UserError, match="keys works with --attention dual only"):
        ConvertConfig(**options, keys=0.1, attention="dense")
    with pytest.raises(UserError, match="keys"):
        ConvertConfig(**options, keys=0.0)
