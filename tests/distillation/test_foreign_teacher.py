"""Teachers from elsewhere: loaded, checked against the data, and put to work by `dualroute distill`."""

import json

import pytest
import torch

from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.distillation.teacher import load_teacher
from dualroute.errors import UserError
from dualroute.training.monitoring.metrics_log import read_metrics

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def teachers(tiny_dataset, tmp_path_factory):
    """A tiny Llama, with padded vocabulary, and a tiny GPT-2 with the tokenizer of the data set."""
    size = Manifest.load(tiny_dataset).tokenizer.vocab_size
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=size + 12, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    models = {
        "llama": transformers.LlamaForCausalLM(llama),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.model").write_bytes((tiny_dataset / "tokenizer.model").read_bytes())
    return folder


def distill(dataset, teacher, output, *more):
    command = ["distill", "--teacher", teacher, "--data.path", dataset, "--output", output]
    command += "--model.dim 32 --model.num_layers 1 --model.num_heads 2 --model.block 16".split()
    command += "--data.context 64 --train.micro_batch 2 --train.tokens_per_batch 256".split()
    command += "--train.max_steps 12 --optim.warmup_steps 2 --optim.lr 0.01 --distill.kl_weight 1".split()
    command += "--distill.ce_weight 0 --monitor.peak_tflops 0.1 --monitor.log_every_steps 1".split()
    return main([str(word) for word in [*command, *more]])


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_student_approaches_it(teachers, tiny_dataset, tmp_path, family):
    assert distill(tiny_dataset, teachers / family, tmp_path / "run") == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["event"] == "validation"]
    distances = [row["val/divergence"] for row in rows]
    assert distances[-1] < 0.8 * distances[0]


def test_documents_do_not_see_each_other_nor_padding_rows(teachers, tiny_dataset):
    tokenizer = Tokenizer(tiny_dataset / "tokenizer.model")
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 15 + [2] * 25])
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    for family in ("llama", "gpt2"):
        teacher = load_teacher(str(teachers / family), tokenizer, str(tiny_dataset), 64)
        assert teacher.weight.shape[0] == tokenizer.vocab_size
        batch = {"input_ids": ids, "segment_ids": segments, "positions": positions}
        packed = teacher.hidden_states(batch)
        for part in (slice(0, 15), slice(15, 40)):
            alone = {name: value[:, part] for name, value in batch.items()}
            torch.testing.assert_close(packed[:, part], teacher.hidden_states(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gpt2", ["--distill.hidden_weight", "1"], "distill.hidden_weight cannot be used"),
        ("gpt2", ["--distill.attention_weight", "1"], "distill.attention_weight cannot be used"),
        ("gpt2", ["--distill.teacher_offload", "true"], "teacher_offload cannot be used"),
        ("gpt2", ["--distill.teacher_sharded", "true"], "teacher_sharded cannot be used"),
        ("gpt2", ["--data.context", "128", "--model.max_context", "128"], "reads at most 64 tokens"),
        ("llama", ["--data.context", "128", "--model.max_context", "128"], "reads at most 64 tokens"),
        ("nowhere", [], "nowhere is not there"),
    ],
)
def test_what_it_cannot_do_is_refused(teachers, tiny_dataset, tmp_path, capsys, family, options, named):
    assert distill(tiny_dataset, teachers / family, tmp_path / "run", *options) == 2
    assert named in capsys.readouterr().err


def test_its_tokenizer_must_be_that_of_the_data(teachers, tiny_dataset, tmp_path, real_data):
    tokenizer = Tokenizer(tiny_dataset / "tokenizer.model")
    folder = tmp_path / "llama"
    folder.mkdir()
    for file in (teachers / "llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.model").write_bytes((real_data / "tokenizers/sp_test_model.model").read_bytes())
    with pytest.raises(UserError, match="is not the tokenizer that"):
        load_teacher(str(folder), tokenizer, str(tiny_dataset), 64)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer beside it: .*dualroute convert"):
        load_teacher(str(folder), tokenizer, str(tiny_dataset), 64)
    # the same pieces in a file of other bytes will do
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((tiny_dataset / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_prefix = "another"
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    first = load_teacher(str(folder), tokenizer, str(tiny_dataset), 64)
    assert first.digest == load_teacher(str(teachers / "llama"), tokenizer, str(tiny_dataset), 64).digest
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == first.weight.shape[0] + 12
