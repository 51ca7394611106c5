"""A student beside its teacher, as a user runs it: learning, resuming, refusing; alone and on two ranks."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from dualroute.cli import main
from dualroute.distillation import teacher as teachers
from dualroute.distillation.on_policy import is_on_policy
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model, save_model
from dualroute.training.monitoring.metrics_log import read_metrics
from tests import warm
from tests.conftest import ROOT
from tests.training.checkpointing.runs import snapshot
from tests.training.step.test_module import curve, environment, wait_for_step

COMMON = (
    "--data.context 64 --data.val_tokens 512 --train.micro_batch 4 --train.tokens_per_batch 512 "
    "--train.val_every_steps 7 --optim.lr 0.01 --optim.warmup_steps 4 --optim.schedule constant "
    "--checkpoint.every_steps 4 --monitor.log_every_steps 1 "
    "--monitor.sample_every_steps 0 --monitor.peak_tflops 0.1"
).split()
ATTENTION = "--model.window 8 --model.block 16 --model.top_k 1 --model.global_mode routed".split()
STUDENT = "--model.dim 16 --model.num_layers 1 --model.num_heads 4".split()
STEPS, FEW = 16, 6
#: every part of the objective at once
EVERYTHING = (
    "--distill.loss jsd --distill.temperature 2 --distill.hidden_weight 0.1 --distill.on_policy_fraction 0.4 "
    "--distill.on_policy_prefix 8 --distill.on_policy_tokens 8"
).split()


def arguments(dataset, teacher, output, *more, steps=STEPS):
    return [
        *("distill", *COMMON, *ATTENTION, *STUDENT, "--data.path", str(dataset), "--teacher", str(teacher)),
        *("--output", str(output), "--train.max_steps", str(steps), *map(str, more)),
    ]


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher") / "run"
    shape = "--model.dim 32 --model.num_layers 2 --model.num_heads 4".split()
    more = ["--data.path", str(tiny_dataset), "--output", str(output), "--train.max_steps", "24"]
    assert main(["pretrain", *COMMON, *ATTENTION, *shape, *more]) == 0
    return output


@pytest.mark.slow
def test_a_teacher_that_is_gone_is_missed_by_a_run_that_goes_on(tiny_dataset, teacher, tmp_path, capsys):
    """Not by one that is finished; and the run is left as it was."""
    copy = shutil.copytree(teacher, tmp_path / "teacher", symlinks=True)
    assert main(arguments(tiny_dataset, copy, tmp_path / "run", steps=FEW)) == 0
    shutil.rmtree(copy)
    before = snapshot(tmp_path / "run")
    assert main(arguments(tiny_dataset, copy, tmp_path / "run", steps=FEW)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments(tiny_dataset, copy, tmp_path / "run", steps=STEPS)) == 2
    assert f"teacher {copy} is not there" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


@pytest.fixture(scope="module")
def distil(tiny_dataset, teacher, tmp_path_factory):
    """Runs ``dualroute distill`` in this process and gives back the run folder."""

    def run(*more, steps=STEPS):
        output = tmp_path_factory.mktemp("distill") / "run"
        assert main(arguments(tiny_dataset, teacher, output, *more, steps=steps)) == 0
        return output

    return run


@pytest.fixture(scope="module")
def plain(distil):
    return distil()


@pytest.fixture(scope="module")
def everything(distil):
    return distil(*EVERYTHING)


def figures(output, name, event="train"):
    return [line[name] for line in read_metrics(output / "metrics.jsonl", event) if name in line]


def first(output):
    """The losses that a run of FEW steps has too: the learning rate is constant."""
    return {step: loss for step, loss in curve(output).items() if step <= FEW}


def close(one, other):
    assert one.keys() == other.keys()
    return max(abs(one[step] - other[step]) for step in one)


@pytest.mark.slow
def test_the_student_comes_near_its_teacher_and_is_published_alone(plain, everything):
    losses, distances = (
        figures(plain, "val/loss", "validation"),
        figures(plain, "val/divergence", "validation"),
    )
    assert losses[-1] < losses[0] - 1.0
    assert distances[-1] < distances[0] - 1.0
    assert figures(plain, "train/divergence")[-1] < figures(plain, "train/divergence")[0] - 1.0
    model = load_model(find_checkpoint(everything))
    assert model.config.dim == 16
    weights = load_file(find_checkpoint(everything).folder / "model.safetensors")
    assert set(weights) == {name for name, _ in model.named_parameters()}
    state = torch.load(find_checkpoint(everything).state, weights_only=True)
    others = {name for name in state["state_dict"] if not name.startswith("model.")}
    assert others == {"projections.0.weight"}
    assert state["state_dict"]["projections.0.weight"].shape == (32, 16)
    assert len(figures(everything, "train/hidden_loss")) == STEPS


def test_hidden_states_and_projections_are_learnt(everything):
    off_policy = [
        value
        for step, value in enumerate(figures(everything, "train/hidden_loss"))
        if not is_on_policy(0, step, 0.4)
    ]
    assert off_policy[-1] < off_policy[0]


def test_a_student_that_begins_as_its_teacher_has_no_distance(distil, teacher):
    attention = ("--distill.attention_weight", 1, "--distill.hidden_weight", 1)
    shape = ("--model.dim", 32, "--model.num_layers", 2)
    output = distil("--init_from", teacher, *shape, *attention, steps=5)
    assert abs(figures(output, "val/divergence", "validation")[0]) < 1e-6
    # the projection begins as the identity
    assert figures(output, "train/attention_loss")[0] < 1e-9
    assert figures(output, "train/hidden_loss")[0] < 1e-9
    assert figures(output, "train/divergence")[-1] > 1e-6
    assert figures(output, "val/loss", "validation")[0] == pytest.approx(find_checkpoint(teacher).val_loss)


def test_without_a_teachers_word_it_is_pretraining(distil, tiny_dataset, tmp_path):
    output = distil("--distill.kl_weight", 0, "--distill.ce_weight", 1, steps=FEW)
    more = [
        "--data.path",
        str(tiny_dataset),
        "--output",
        str(tmp_path / "run"),
        "--train.max_steps",
        str(FEW),
    ]
    assert main(["pretrain", *COMMON, *ATTENTION, *STUDENT, *more]) == 0
    assert close(curve(output), curve(tmp_path / "run")) < 1e-4


def test_all_tokens_of_a_truncated_teacher_are_the_teacher(plain, distil):
    assert close(curve(distil("--distill.top_k", 320, steps=FEW)), first(plain)) < 1e-4
    assert close(curve(distil("--distill.top_k", 4, steps=FEW)), first(plain)) > 1e-4


def test_an_offloaded_teacher_says_the_same_and_a_bf16_one_nearly(plain, distil):
    assert curve(distil("--distill.teacher_offload", "true", steps=FEW)) == first(plain)
    rough = curve(distil("--distill.teacher_dtype", "bfloat16", steps=FEW))
    assert 0 < close(rough, first(plain)) < 0.1


def test_its_layers_come_and_go():
    config = ModelConfig(vocab_size=50, dim=16, num_layers=2, num_heads=2)
    model = DualRoutingTransformer(config)
    homes = [p.data_ptr() for p in model.layers.parameters()]
    teacher = teachers.Teacher(model, offload=True)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda *_: seen.append(len(seen)))
    ids = torch.randint(50, (2, 10))
    batch = {
        "input_ids": ids,
        "segment_ids": torch.ones_like(ids),
        "positions": torch.arange(10).expand(2, 10),
    }
    with torch.no_grad():
        assert torch.equal(teacher.hidden_states(batch), DualRoutingTransformer.hidden_states(model, ids))
    assert seen
    assert [p.data_ptr() for p in model.layers.parameters()] == homes
    assert not any(p.requires_grad for p in model.parameters())


class Plain(torch.nn.Module):
    """The least that a teacher has to be."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(320, 12)
        self.head = torch.nn.Linear(12, 320, bias=False)

    def hidden_states(self, input_ids, *, segment_ids, positions):
        assert segment_ids.shape == positions.shape == input_ids.shape
        return self.embedding(input_ids)


def test_any_module_may_teach_but_not_show_what_it_has_not(
    distil, tiny_dataset, teacher, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dualroute.distillation.run.load_teacher", lambda *_, **__: teachers.Teacher(Plain()))
    assert figures(distil(steps=5), "val/divergence", "validation")[-1] > 0
    for more, message in (
        (("--distill.hidden_weight", 1), "does not show its layers and heads as a model of dualroute does"),
        (("--parallel.sequence_parallel", 1, "--distill.attention_weight", 1), "does not show"),
    ):
        assert main(arguments(tiny_dataset, teacher, tmp_path / "run", *more)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="no list of them"):
        teachers.Teacher(Plain(), offload=True)


def test_recomputed_layers_teach_the_same(distil):
    shape = ("--model.dim", 32, "--distill.hidden_weight", 0.1, "--distill.attention_weight", 0.1)
    kept = distil(*shape, steps=5)
    recomputed = distil(*shape, "--train.activation_checkpointing", "full", steps=5)
    assert curve(recomputed) == curve(kept)
    assert figures(recomputed, "train/attention_loss") == figures(kept, "train/attention_loss")


def test_a_run_is_not_continued_with_another_teacher_or_as_another_kind(
    plain, everything, tiny_dataset, teacher, tmp_path, capsys
):
    for source, named, more, message in (
        (plain, plain, (), "with another teacher"),
        (plain, teacher, EVERYTHING, "has projections for layers []"),
        (everything, teacher, (), "has projections for layers ['0']"),
    ):
        output = tmp_path / "run"
        shutil.copytree(source, output)
        assert main(arguments(tiny_dataset, named, output, *more, steps=STEPS + 2)) == 2
        assert message in capsys.readouterr().err
        shutil.rmtree(output)


def test_the_export_of_a_training_state_is_the_student_alone(everything, tmp_path, capsys):
    assert main(["checkpoint", "export", str(everything), "--output", str(tmp_path / "whole")]) == 0
    exported = load_file(tmp_path / "whole" / "model.safetensors")
    assert exported.keys() == load_file(find_checkpoint(everything).folder / "model.safetensors").keys()


@pytest.mark.slow
def test_killed_it_continues_as_if_nothing_had_happened(everything, tiny_dataset, teacher, tmp_path):
    output = tmp_path / "run"
    words = arguments(tiny_dataset, teacher, output, *EVERYTHING)
    for number, step in ((signal.SIGTERM, 2), (signal.SIGKILL, 6)):
        process = warm.Started(None, words, cwd=ROOT, env=environment())
        wait_for_step(process, output / "metrics.jsonl", step)
        process.send_signal(number)
        # asked to stop, it saves between two checkpoints of its own and says "run it again"
        assert process.wait(timeout=120) == (75 if number == signal.SIGTERM else -number)
    assert find_checkpoint(output).step < STEPS
    assert main(arguments(tiny_dataset, teacher, output, *EVERYTHING)) == 0
    assert curve(output) == curve(everything)
    assert curve(output, "validation") == curve(everything, "validation")
    for name in ("train/divergence", "train/hidden_loss"):
        assert figures(output, name) == figures(everything, name)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "sharing"), [("3", "1"), ("1", "2")])
def test_two_ranks_distil_as_one_process_does(stage, sharing, distil, tiny_dataset, teacher, tmp_path):
    pytest.importorskip("deepspeed")
    settings = ["--distill.hidden_weight", "0.1", "--optim.lr", "0.003", "--train.micro_batch", "2"]
    settings += ["--distill.on_policy_fraction", "0.5", *EVERYTHING[-4:]]  # drawn alike on any ranks
    parallel = ("--parallel.zero_stage", stage, "--parallel.sequence_parallel", sharing)
    output = tmp_path / "run"
    words = arguments(tiny_dataset, teacher, output, *settings, *parallel, steps=FEW)[1:]
    warm.ranks(2, "launch/distill.py", words, cwd=ROOT, env=environment())
    alone = distil(*settings, steps=FEW)
    for event in ("train", "validation"):
        assert close(curve(output, event), curve(alone, event)) < 1e-5
    for name in ("train/divergence", "train/hidden_loss"):
        assert figures(output, name) == pytest.approx(figures(alone, name), abs=1e-4)
    assert set(load_file(find_checkpoint(output).folder / "model.safetensors")) == {
        name for name, _ in load_model(find_checkpoint(alone)).named_parameters()
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--distill.temperature", "0"), "distill.temperature is 0"),
        (("--distill.loss", "jsd", "--distill.beta", "1"), "distill.beta is 1"),
        (("--distill.kl_weight", "0", "--distill.ce_weight", "0"), "nothing would be trained"),
        (("--distill.on_policy_fraction", "0.5"), "more than data.context 64"),
        (("--distill.on_policy_fraction", "1.5"), "must be in [0, 1]"),
        (("--distill.top_k", "321"), "above the vocabulary of 320"),
        (("--distill.hidden_weight", "1", "--distill.layer_map", "[2]"), "from 0 to 1"),
        (("--distill.hidden_weight", "1", "--distill.layer_map", "[-1]"), "leaves out every layer"),
        (("--distill.attention_weight", "1"), "has head_dim 4 and layer 1 of the teacher 8"),
        (("--teacher", "/nowhere"), "teacher /nowhere is not there"),
        (
            (
                *("--data.context", "4096", "--model.max_context", "4096"),
                *("--train.tokens_per_batch", "8192", "--train.micro_batch", "2"),
            ),
            "2048",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(more, message, tiny_dataset, teacher, tmp_path, capsys):
    assert main(arguments(tiny_dataset, teacher, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Liger may be used")
def test_liger_is_refused_without_a_gpu(tiny_dataset, teacher, tmp_path, capsys):
    assert main(arguments(tiny_dataset, teacher, tmp_path / "run", "--distill.backend", "liger")) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(tiny_dataset, tmp_path, capsys):
    from sentencepiece import sentencepiece_model_pb2

    other = tmp_path / "other.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString((tiny_dataset / "tokenizer.model").read_bytes())
    proto.pieces[300].piece = "another"
    other.write_bytes(proto.SerializeToString())
    model = DualRoutingTransformer(ModelConfig(vocab_size=320, dim=16, num_layers=1, num_heads=2))
    save_model(model, tmp_path / "teacher", other, {})
    assert main(arguments(tiny_dataset, tmp_path / "teacher", tmp_path / "run")) == 2
    assert "is not the tokenizer that" in capsys.readouterr().err


def test_a_quantised_teacher_is_refused(tiny_dataset, tmp_path, capsys):
    model = DualRoutingTransformer(ModelConfig(vocab_size=320, dim=16, num_layers=1, num_heads=2))
    said = {"quantization": {"scheme": "int8_weight_only"}}
    save_model(model, tmp_path / "teacher", tiny_dataset / "tokenizer.model", said)
    assert main(arguments(tiny_dataset, tmp_path / "teacher", tmp_path / "run")) == 2
    assert "is quantized (int8_weight_only): a teacher's head must be floats" in capsys.readouterr().err
