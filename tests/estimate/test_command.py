"""The estimate against memory that was really used, and against arithmetic by hand."""

import subprocess
import sys

import pytest

from dualroute.cli import main, parse_stage
from dualroute.errors import UserError
from dualroute.estimate.command import GIB, Fixed, estimate, estimated
from dualroute.estimate.recommend import advise
from dualroute.training.memory.parts import memory_of
from tests.conftest import ROOT
from tests.training.step.test_activations import peaks

#: the model of test_activations.PEAK
SAME = [
    *("--model.vocab_size", "64", "--model.dim", "64", "--model.num_layers", "8", "--model.num_heads", "4"),
    *("--model.max_context", "4096", "--model.window", "64", "--model.top_k", "4"),
    *("--model.global_mode", "routed", "--data.context", "4096", "--train.max_steps", "10"),
    *("--train.micro_batch", "1", "--train.tokens_per_batch", "16384"),
]


def of(*more):
    return estimate(parse_stage("estimate", [*SAME, *more]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["none", "full", pytest.param("feed_forward", marks=pytest.mark.nightly)])
def test_activations_are_what_a_step_really_uses(what):
    result = of("--train.activation_checkpointing", what)
    estimated = (result.kept_per_token + result.work_per_token) * 4096 / 1024  # KiB
    # pages of libraries that the system took away come back during the step and count as its memory: what is
    # measured is up to a sixth too much, from process to process, and the least of it is what is asked for
    measured = min(peaks((what, 1), (what, 1)))
    for _ in range(2):
        if estimated < 0.7 * measured:
            measured = min(measured, *peaks((what, 1), (what, 1)))
    assert estimated == pytest.approx(measured, rel=0.3)


def test_states_by_hand():
    alone, sharded = of(), of("--gpus", "4", "--parallel.zero_stage", "2", "--train.precision", "bf16-mixed")
    count = alone.parameters
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * count, 4 * count, 8 * count)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * count, count, 3 * count)
    muon = of("--optim.name", "muon")
    matrices = 8 * (4 * 64 * 64 + 3 * 64 * 192)  # queries, keys, values and output; feed-forward
    assert muon.optimizer == pytest.approx(8 * count - 4 * matrices)
    third = of("--gpus", "4", "--parallel.zero_stage", "3", "--parallel.offload_optimizer", "true")
    assert (third.weights, third.gradients, third.optimizer) == (count, 0, 0)
    more = ("--gpus", "4", "--parallel.zero_stage", "3", "--parallel.zero_hpz_partition_size", "2")
    second = of(*more, "--train.precision", "bf16-mixed")
    assert second.second_partition == count
    assert second.states == second.weights + second.gradients + second.optimizer + count
    moved = of("--train.offload_activations", "true")
    assert moved.kept_per_token == pytest.approx(alone.kept_per_token * 3 / 8, rel=0.1), "three of eight stay"
    assert alone.hours > 0


def test_gradients_and_optimizer_are_of_what_is_trained():
    whole = of()
    lora = of("--finetune.adapter", "lora", "--finetune.rank", "4", "--finetune.targets", "[layers.3.ffn]")
    added = 4 * 3 * (64 + 192)  # rank x three matrices x (64 + ffn_dim)
    assert lora.trained == added == lora.parameters - whole.parameters
    assert (lora.weights, lora.gradients, lora.optimizer) == (4 * lora.parameters, 4 * added, 8 * added)
    frozen = of("--finetune.freeze", "[embedding, 'layers.[0-3]']")
    assert frozen.trained < whole.parameters == frozen.parameters
    assert frozen.gradients == 4 * frozen.trained
    half = pytest.approx(whole.kept_per_token / 2, rel=0.1)
    assert frozen.kept_per_token == half, "nothing is kept beneath what is trained"
    assert frozen.flops_per_token < whole.flops_per_token
    untied = of("--finetune.adapter", "dora", "--finetune.targets", "[head]")
    assert untied.parameters == whole.parameters + 64 * 64 + untied.trained


def test_the_longest_context_fills_the_memory_and_grows_with_the_ranks_that_share_it():
    memory = ("--gpu_memory", "1", "--headroom", "0")
    alone = of(*memory)

    def used(context):
        words = [*SAME, *memory, "--data.context", str(context), "--train.tokens_per_batch", str(context)]
        return memory_of(parse_stage("estimate", words), 1).total

    assert used(alone.longest_context) <= GIB < used(int(1.002 * alone.longest_context))
    large = ("--gpu_memory", "80", "--headroom", "0")
    both = ("--gpus", "2", "--parallel.zero_stage", "0", "--parallel.sequence_parallel", "2")
    assert of(*large, *both).longest_context == pytest.approx(2 * of(*large).longest_context, rel=0.03)
    assert of("--gpu_memory", "0.0001").longest_context == 0


def test_what_cannot_be_estimated_is_named(capsys):
    with pytest.raises(UserError, match="gpus"):
        of("--gpus", "0")
    assert main(["estimate", *SAME, "--gpu_memory", "0.01"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "DOES NOT FIT" in printed
    assert (
        "nothing that was tried fits into 0.01 GiB: the least is 0.7 GiB, of which 0.6 GiB are buffers"
        in printed
    )
    for words in ("estimates, not measurements", "assumed at 35%", "launches, 60 + 90 a layer of 5 us"):
        assert words in printed


def test_the_vocabulary_is_that_of_the_data_and_a_usual_one_before_they_are_there(
    tiny_dataset, tmp_path, capsys
):
    words = [
        "--model.dim",
        "64",
        "--model.num_layers",
        "2",
        "--model.num_heads",
        "4",
        "--train.max_steps",
        "10",
    ]
    there = estimate(parse_stage("estimate", [*words, "--data.path", str(tiny_dataset)]))
    assert not capsys.readouterr().out
    given = estimate(parse_stage("estimate", [*words, "--model.vocab_size", "320"]))
    assert there.parameters == given.parameters
    not_yet = estimate(parse_stage("estimate", [*words, "--data.path", str(tmp_path / "nowhere")]))
    assert not_yet.parameters == given.parameters + (32_000 - 320) * 64
    assert "a vocabulary of 32,000 is assumed" in capsys.readouterr().out


def test_no_torch_is_needed():
    """Nor Lightning, nor DeepSpeed; in a process that would fail to import them."""
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'deepspeed', 'pyarrow', 'transformers', 'sentencepiece'):\n"
        "    sys.modules[name] = None\n"
        "from dualroute.cli import main\n"
        f"words = {[*SAME, '--hardware', 'laptop']!r}\n"
        "assert main(['estimate', *words]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout


def test_machines_come_from_a_table_that_a_person_may_edit(tmp_path):
    result = of("--hardware", "a100", "--peak_tflops", "100")
    config = result.config
    assert (config.gpu_memory, config.peak_tflops, config.network_bandwidth) == (80, 100, 20), (
        "a flag goes first"
    )
    assert result.cost == pytest.approx(1.5 * result.hours)
    assert of().cost is None
    table = tmp_path / "mine.yaml"
    table.write_text("mine: {memory: 10, price: 0.5}")
    mine = of(
        "--hardware", "mine", "--hardware_table", str(table), "--gpus", "4", "--parallel.strategy", "ddp"
    )
    assert mine.config.gpu_memory == 10
    assert mine.cost == pytest.approx(4 * 0.5 * mine.hours)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("a: {memory: 1}", "h100", "hardware is 'h100', which is no row of .*; there are a"),
        ("mine: {memroy: 1}", "mine", "mine has 'memroy': choose among memory"),
        ("mine: 3", "mine", "mine is no table of numbers"),
        ("mine: {memory: -1}", "mine", "mine: gpu_memory is -1"),
        ("mine: {memory: much}", "mine", "mine: gpu_memory is 'much': it must be a number"),
        ("[1]", "mine", "holds no table of machines"),
        ("a: [", "mine", "is no YAML"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, name, message):
    table = tmp_path / "mine.yaml"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        of("--hardware", name, "--hardware_table", str(table))


def test_a_teacher_is_memory_and_operations(tmp_path):
    shape = tmp_path / "teacher.yaml"
    shape.write_text("{dim: 128, num_layers: 4, num_heads: 4}")
    plain, taught = of(), of("--teacher", str(shape))
    assert taught.memory.teacher > 4 * 128 * 128 * 12 * 4
    assert taught.times.arithmetic > plain.times.arithmetic
    assert (
        of("--teacher", str(shape), "--teacher_dtype", "bfloat16").memory.teacher == taught.memory.teacher / 2
    )
    (tmp_path / "model.json").write_text('{"dim": 128, "num_layers": 4, "num_heads": 4, "vocab_size": 64}')
    assert of("--teacher", str(tmp_path)).memory.teacher == taught.memory.teacher
    shape.write_text("{dim: 128, heads: 4}")
    with pytest.raises(UserError, match="is no shape of a model"):
        of("--teacher", str(shape))


def advice(*more):
    result = of(*more)
    fixed = Fixed.of(result.config, result.count)
    return advise(result.config, result, lambda changed: estimated(changed, fixed))


def test_what_would_fit_fits():
    """Four texts of the small model on a GPU that has no room for them."""
    more = [
        "--train.micro_batch",
        "4",
        "--train.tokens_per_batch",
        "65536",
        "--gpu_memory",
        "1.2",
        "--gpus",
        "1",
    ]
    assert not of(*more).fits
    found = advice(*more)
    assert found.fits
    assert found.line.startswith("it does not fit as it is; with this it does")
    flags = [word for flag in found.flags for word in flag.split()]
    assert of(*more, *flags).fits
    # the flags of micro_batch and checkpointing stand after those that they replace
    assert advice("--gpu_memory", "80").line.startswith("it fits")


def test_more_gpus_are_named_where_they_would_do():
    shape = [
        "--model.dim",
        "2048",
        "--model.num_layers",
        "24",
        "--model.num_heads",
        "16",
        "--gpu_memory",
        "16",
    ]
    more = [*shape, "--train.precision", "bf16-mixed", "--train.tokens_per_batch", "1048576", "--gpus", "1"]
    found = advice(*more)
    assert not found.fits
    assert " GPUs would do: --gpus " in found.line
    flags = [word for flag in found.flags for word in flag.split()]
    assert of(*more[:-2], *flags).fits
