"""Training as Slurm's job: on two and four nodes, in a chain, in an array, pre-empted, cancelled, failed."""

import json
import re
import time

import pytest
import yaml

from dualroute.cli.submit.scripts import template_folder
from tests.conftest import write_corpus
from tests.slurm.conftest import NODES
from tests.training.resilience.ranks import WATCHED
from tests.training.step.test_module import curve, train

pytestmark = pytest.mark.slow

STEPS = 14
RUN = {
    "model": {
        **{"dim": 32, "num_layers": 2, "num_heads": 4, "window": 8, "block": 16, "top_k": 1},
        "global_mode": "routed",
    },
    "data": {"context": 64, "val_tokens": 512},
    "train": {"micro_batch": 2, "tokens_per_batch": 512, "val_every_steps": 7, "max_steps": STEPS},
    "optim": {"lr": 0.003, "warmup_steps": 4},
    "checkpoint": {"every_steps": 4},
    "monitor": {"log_every_steps": 1, "sample_every_steps": 0, "peak_tflops": 0.1},
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder from which jobs are submitted."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configuration(folder, name, data, **train):
    values = {**RUN, "output": f"runs/{name}", "data": {**RUN["data"], "path": str(data)}}
    values["train"] = {**RUN["train"], **train}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for_step(output, step, seconds=120):
    path = output / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = path.read_text() if path.exists() else ""
        if f'"step": {step}, "event": "train"' in text:
            return
        time.sleep(0.05)
    logs = "".join(log.read_text()[-2000:] for log in output.glob("slurm/*.out"))
    raise AssertionError(f"{output} did not come to step {step}\n{logs}")


def run_on(nodes, cluster, dataset, folder):
    """The output of an unbroken run on so many nodes, in ``folder``."""
    pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        from dualroute.cli import main

        config = configuration(folder, "unbroken", dataset)
        arguments = ["--config", str(config), "--nodes", str(nodes), "--time", "10"]
        assert main(["submit", "pretrain", *arguments]) == 0
    job = cluster.run("squeue", "--noheader", "--format=%A")
    output = folder / "runs" / "unbroken"
    done = cluster.wait(job, "COMPLETED", log=output / "slurm" / f"unbroken-{job}.out")
    assert (done["ExitCode"], done["NumNodes"], done["Restarts"]) == ("0:0", str(nodes), "0")
    assert "DeepSpeed ZeRO" in (output / "checkpoints" / "last" / "checkpoint.json").read_text()
    return output


@pytest.fixture(scope="module")
def two_nodes(cluster, tiny_dataset, tmp_path_factory):
    return run_on(2, cluster, tiny_dataset, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):
    """The output of one process without Slurm."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_dataset, output, STEPS, "--optim.lr", "0.003", "--monitor.sample_every_steps", "0")
    return output


def assert_near(output, reference):
    for event in ("train", "validation"):
        ours, theirs = curve(output, event), curve(reference, event)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in ours) <= 1e-5


def test_two_nodes_train_as_one_process_does(two_nodes, alone):
    assert_near(two_nodes, alone)


def test_four_nodes_train_as_one_process_does(cluster, alone, tiny_dataset, tmp_path):
    assert_near(run_on(4, cluster, tiny_dataset, tmp_path), alone)


def test_a_chain_waits_for_a_stage_that_is_preempted(cluster, two_nodes, work, capsys, monkeypatch):
    write_corpus(work / "corpus")
    options = {"vocab_size": 320, "reserved_tokens": 0, "val_fraction": 0.1, "progress": False}
    (work / "prepare.yaml").write_text(yaml.safe_dump({"corpus": "corpus", "output": "shards", **options}))
    config = configuration(work, "chain", "shards")
    prepare, pretrain, evaluate = cluster.submit(
        capsys, monkeypatch, "pipeline", "--prepare", "prepare.yaml", "--config", config, "--nodes", 2,
        "--time", 10,
    )  # fmt: skip
    output, log = work / "runs" / "chain", work / "runs" / "chain" / "slurm" / f"chain-{pretrain}.out"
    wait_for_step(output, 2)
    cluster.run("scancel", "--signal=USR1", pretrain)
    cluster.wait(pretrain, "PENDING", log=log)
    waiting = cluster.job(evaluate)
    assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency")
    done = cluster.wait(pretrain, "COMPLETED", log=log)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1")
    cluster.wait(evaluate, "COMPLETED")
    assert cluster.job(prepare)["JobState"] == "COMPLETED"
    said = log.read_text()
    assert said.count("SIGUSR1: stopped after step") == said.count("resuming from") == 1
    for event in ("train", "validation"):
        assert curve(output, event) == curve(two_nodes, event)
    measured = json.loads((output / "evaluation.json").read_text())["loss"]
    assert measured == pytest.approx(curve(output, "validation")[STEPS], abs=0.3)


def test_a_compression_runs_as_a_chain(cluster, two_nodes, tiny_dataset, work, capsys, monkeypatch):
    """prune and what follows on one node, the recovery on both; the records say that all was done."""
    pytest.importorskip("torchao")
    training = {key: RUN[key] for key in ("data", "train", "optim", "checkpoint", "monitor")}
    sections = {
        "output": "runs/small", "prepare": None, "data": str(tiny_dataset), "export": None,
        "pretrain": None, "parent": str(two_nodes),
        "prune": {"ffn_dim": 64, "multiple": 16, "calibration_tokens": 1024},
        "recover": {**training, "train": {**RUN["train"], "max_steps": 7}},
        "evaluate": {"max_tokens": 512}, "compile": False, "decode_tokens": 4, "sample_tokens": 4,
    }  # fmt: skip
    (work / "small.yaml").write_text(yaml.safe_dump(sections))
    jobs = cluster.submit(
        capsys, monkeypatch, "pipeline", "--config", work / "small.yaml", "--nodes", 2, "--time", 10
    )
    assert len(jobs) == 3
    folder = work / "runs" / "small"
    for job, stage in zip(jobs, ("prune", "recover", "quantize"), strict=True):
        cluster.wait(job, "COMPLETED", log=folder / "slurm" / f"small-{stage}-{job}.out")
    assert "DeepSpeed ZeRO" in (folder / "recover/checkpoints/last/checkpoint.json").read_text()
    records = {path.stem: json.loads(path.read_text()) for path in (folder / "stages").glob("*.json")}
    assert all(record["done"] for record in records.values())
    assert {"prune", "recover", "quantize", "evaluate-quantized", "speed-parent"} <= records.keys()
    assert "quantized" in (folder / "report.md").read_text()


def test_a_task_of_an_array_makes_room_for_a_more_urgent_job(
    cluster, tiny_dataset, work, capsys, monkeypatch
):
    """Slurm's own pre-emption.  The other task is done by then and must not be run again."""
    # the second one lasts until it is cancelled, however fast the machine
    configs = [configuration(work, name, tiny_dataset, max_steps=n) for name, n in (("a", 5), ("b", 5000))]
    (array,) = cluster.submit(
        capsys, monkeypatch, "sweep", "--config", *configs, "--time", 10, "--max_parallel", 1
    )
    wait_for_step(work / "runs" / "b", 3)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", f"-N{NODES}", "--exclusive", "--wrap", "true"
    )
    cluster.wait(urgent, "COMPLETED")
    again = cluster.wait(f"{array}_1", "RUNNING")
    done = cluster.wait(f"{array}_0", "COMPLETED")
    assert (done["Restarts"], again["Restarts"]) == ("0", "1")
    # the last task has the array's own number, under which Slurm would requeue all of it
    assert again["JobId"] == array
    log = work / "runs" / "slurm" / f"sweep-{array}_1.out"
    saved = int(re.search(r"SIGUSR1: stopped after step (\d+) of 5000", log.read_text())[1])
    wait_for_step(work / "runs" / "b", saved + 2)
    cluster.run("scancel", f"{array}_1")
    cluster.wait(f"{array}_1", "CANCELLED")
    assert f"resuming from runs/b/checkpoints/step-{saved:08d}" in log.read_text()
    steps = sorted(curve(work / "runs" / "b"))
    assert steps == list(range(1, len(steps) + 1))
    assert sorted(curve(work / "runs" / "a")) == list(range(1, 6))


def test_a_stopped_job_that_slurm_does_not_run_again_is_no_success(
    cluster, tiny_dataset, work, capsys, monkeypatch
):
    fixed = configuration(work, "fixed", tiny_dataset, max_steps=2000)
    cancelled = configuration(work, "cancelled", tiny_dataset, max_steps=2000)
    (fixed_job,) = cluster.submit(
        capsys, monkeypatch, "pretrain", "--config", fixed, "--time", 10, "--sbatch=--no-requeue"
    )
    (cancelled_job,) = cluster.submit(capsys, monkeypatch, "pretrain", "--config", cancelled, "--time", 10)
    after = ["--parsable", "--kill-on-invalid-dep=yes", "--wrap", "true"]
    followers = [
        cluster.run("sbatch", f"--dependency=afterok:{job}", *after) for job in (fixed_job, cancelled_job)
    ]
    wait_for_step(work / "runs" / "fixed", 2)
    wait_for_step(work / "runs" / "cancelled", 2)
    cluster.run("scancel", "--signal=USR1", fixed_job)
    cluster.run("scancel", cancelled_job)  # sends TERM: the run saves, and does not rise from the dead
    assert cluster.wait(fixed_job, "FAILED")["ExitCode"] == "75:0"
    for job in (cancelled_job, *followers):
        assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    for name in ("fixed", "cancelled"):
        assert (work / "runs" / name / "checkpoints" / "last" / "checkpoint.json").exists()


def faulty(folder, name, *faults):
    """A template whose rank does (what, which rank, which step) in the job's first start, the second, …"""
    text = (template_folder() / "pretrain.sbatch").read_text()
    told = " ".join(f"'{what} {rank} {step}'" for what, rank, step in faults)
    wrong = (
        f'faults=({told})\nfault="${{faults[${{SLURM_RESTART_COUNT:-0}}]:-none 0 0}}"\n'
        'launch=(srun --kill-on-bad-exit=1 "${keep_signals[@]}" '
        "@PYTHON@ -m tests.training.resilience.processes.faulty_rank $fault)"
    )
    path = folder / f"{name}.sbatch"
    path.write_text(re.sub(r"^launch=.*$", lambda _: wrong, text, flags=re.M))
    return path


@pytest.mark.timeout(600)
def test_after_a_stall_and_after_a_death_slurm_runs_the_job_again(
    cluster, two_nodes, tiny_dataset, work, capsys, monkeypatch
):
    """Each of them is the first since a newer checkpoint."""
    template = faulty(work, "faulty", ("sleep", 1, 6), ("kill", 1, 10))
    config = configuration(work, "stalls", tiny_dataset)
    (job,) = cluster.submit(
        capsys, monkeypatch, "pretrain", "--config", config, "--nodes", 2, "--time", 10,
        "--stall_requeues", 1, "--template", template, "--", *WATCHED,
    )  # fmt: skip
    output = work / "runs" / "stalls"
    log = output / "slurm" / f"stalls-{job}.out"
    done = cluster.wait(job, "COMPLETED", seconds=400, log=log)  # three starts
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "2")
    said = log.read_text()
    assert "slow or stuck in forward of step 6" in said
    assert re.findall(r"stall (\d) since the checkpoint of step (\d)", said) == [("1", "4"), ("1", "8")]
    for event in ("train", "validation"):
        assert curve(output, event) == curve(two_nodes, event)


def test_a_job_that_dies_at_the_same_place_again_and_again_is_left_alone(
    cluster, tiny_dataset, work, capsys, monkeypatch
):
    template = faulty(work, "deadly", ("kill", 0, 6), ("kill", 0, 6))
    config = configuration(work, "dies", tiny_dataset, max_steps=9)
    submit = ("pretrain", "--config", config, "--time", 10, "--stall_requeues", 1)
    (job,) = cluster.submit(capsys, monkeypatch, *submit, "--template", template, "--", *WATCHED)
    output = work / "runs" / "dies"
    log = output / "slurm" / f"dies-{job}.out"
    done = cluster.wait(job, "FAILED", log=log)
    assert (done["ExitCode"], done["Restarts"]) == ("137:0", "1")
    assert "not requeued: this is stall 2 since the checkpoint of step 4" in log.read_text()
    # whoever submits it again has seen that
    assert json.loads((output / "stalls" / "requeues.json").read_text())["job"] == job
    (again,) = cluster.submit(capsys, monkeypatch, *submit)
    assert cluster.wait(again, "COMPLETED")["Restarts"] == "0"
    assert sorted(curve(output)) == list(range(1, 10))


def test_behind_a_failed_stage_nothing_runs(cluster, work, capsys, monkeypatch):
    (work / "prepare.yaml").write_text(yaml.safe_dump({"corpus": "nothing", "output": "shards"}))
    config = configuration(work, "chain", "shards")
    jobs = cluster.submit(
        capsys, monkeypatch, "pipeline", "--prepare", "prepare.yaml", "--config", config, "--time", 10
    )
    assert cluster.wait(jobs[0], "FAILED")["ExitCode"] == "2:0"  # of a mistake that the user can mend
    assert [cluster.wait(job, "CANCELLED")["Reason"] for job in jobs[1:]] == ["DependencyNeverSatisfied"] * 2
    assert not (work / "runs" / "chain" / "metrics.jsonl").exists()
