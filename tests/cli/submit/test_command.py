"""``dualroute submit``: what it refuses before anything is queued, and the scripts that it writes."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from dualroute.cli import main
from dualroute.cli.submit import scripts as submit_scripts
from dualroute.cli.submit.scripts import quoted
from dualroute.errors import UserError


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder from which jobs are submitted, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    for name in ("bash", "dirname"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def configuration(folder, data, name="run", **values):
    values = {
        "output": f"runs/{name}",
        "data": {"path": str(data), "context": 64},
        "train": {"micro_batch": 2, "tokens_per_batch": 512, "max_steps": 10},
        **values,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def scripts(capsys, *arguments):
    assert main(["submit", arguments[0], "--dry-run", *map(str, arguments[1:])]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    return ["#!/bin/bash" + script for script in text.split("#!/bin/bash")[1:]]


def command(script):
    """The line that trains, or that does the stage."""
    lines = [
        line for line in script.splitlines() if re.search(r" -m dualroute [a-z]|^.\$\{launch\[@\]\}", line)
    ]
    return lines[-1].removesuffix(" || status=$?")


def refused(capsys, *arguments):
    assert main(["submit", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_job_has_the_resources_that_were_asked_for(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset, "my run")
    (script,) = scripts(
        capsys, "pretrain", "--config", config, "--nodes", 2, "--gpus_per_node", 2, "--cpus_per_task", 8,
        "--time", "2-00:00:00", "--partition", "gpu", "--sbatch=--constraint=a100",
    )  # fmt: skip
    lines = set(re.findall(r"^#SBATCH (.*)$", script, re.M))
    assert lines >= {
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=8", "--time=2-00:00:00",
        "--partition=gpu", "--constraint=a100", "--signal=USR1@120", "--requeue", "--open-mode=append",
        "--job-name=my_run", f"--output='{work}/runs/my run/slurm/%x-%j.out'",
    }  # fmt: skip
    launch, status, train, *_, asked, end = script.rstrip().splitlines()[-6:]
    assert launch.startswith("launch=(srun --kill-on-bad-exit=1 ")
    assert launch.endswith(f"{sys.executable} -m dualroute)")
    assert train == f'"${{launch[@]}}" pretrain --config {shlex.quote(config)} || status=$?'
    # the training's exit status is the job's
    assert (status, end) == ("status=0", 'exit "$status"')
    assert asked.endswith(f"""--status "$status" --limit 3 --output '{work}/runs/my run'""")
    for time in ("5", "5:00", "0:05:00", "0-1", "1-00:00"):
        assert f"--time={time}\n" in scripts(capsys, "pretrain", "--config", config, "--time", time)[0]
    assert not (work / "runs").exists()


def test_ranks_that_share_texts_share_the_batch_too(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)  # 512 tokens a batch, 128 a rank: at most four
    assert "tokens_per_batch=512 is not a multiple" in refused(
        capsys, "pretrain", "--config", config, "--nodes", 8
    )
    more = ("pretrain", "--config", config, "--nodes", 8, "--", "--parallel.sequence_parallel", 2)
    assert "--nodes=8\n" in scripts(capsys, *more)[0]
    more = ("pretrain", "--config", config, "--nodes", 8, "--", "--parallel.sequence_parallel", 3)
    assert "does not divide the 8 rank(s)" in refused(capsys, *more)
    more = ("pretrain", "--config", config, "--nodes", 4, "--", "--parallel.zero_stage", 3)
    more += ("--parallel.zero_hpz_partition_size", 3)
    assert "zero_hpz_partition_size 3 does not divide the 4 ranks: use 2" in refused(capsys, *more)


def test_fp8_is_bfloat16_to_deepspeed(work, tiny_dataset, capsys):
    (work / "deepspeed.yaml").write_text("bf16: {enabled: true}\n")
    more = ("pretrain", "--config", configuration(work, tiny_dataset), "--nodes", 4, "--")
    more += ("--train.precision", "fp8", "--parallel.deepspeed_config", work / "deepspeed.yaml")
    assert "--nodes=4\n" in scripts(capsys, *more)[0]


def test_on_cpus_a_node_has_one_process_and_options_of_the_stage_follow(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    prompt = "it's a $HOME"
    (script,) = scripts(
        capsys, "pretrain", "--config", config, "--", "--monitor.sample_prompts", f'["{prompt}"]'
    )
    assert "--ntasks-per-node=1" in script
    assert "gpus" not in re.sub(r"^#  .*$", "", script, flags=re.M)
    words = shlex.split(command(script))
    assert words[-1] == f'["{prompt}"]'


def test_a_chain_is_prepared_trained_and_evaluated(work, capsys):
    config = configuration(work, "shards")
    (work / "prepare.yaml").write_text("output: shards")
    chain = scripts(capsys, "pipeline", "--prepare", "prepare.yaml", "--config", config, "--gpus_per_node", 4)
    lines = [command(script) for script in chain]
    commands = [re.split(r' -m dualroute |"\$\{launch\[@\]\}" ', line)[1] for line in lines]
    assert [line.split()[0] for line in commands] == ["prepare", "pretrain", "evaluate"]
    assert commands[2].startswith("evaluate --checkpoint runs/run --data shards")
    gpus = [re.search(r"^#SBATCH --gpus-per-node=(\d)", script, re.M)[1] for script in chain]
    assert gpus == ["1", "4", "1"]


def test_a_distillation_is_a_job_like_a_pretraining(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset, teacher="runs/teacher", distill={"temperature": 2.0})
    (script,) = scripts(
        capsys, "distill", "--config", config, "--nodes", 2, "--", "--init_from", "runs/pruned"
    )
    words = shlex.split(command(script))
    assert words[1:] == ["distill", "--config", config, "--init_from", "runs/pruned"]
    assert "#SBATCH --nodes=2" in script
    assert "unknown key 'distill'" in refused(capsys, "pretrain", "--config", config)


def test_a_finetuning_is_a_pretraining_that_begins_with_weights(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    (script,) = scripts(capsys, "finetune", "--config", config, "--", "--init_from", "runs/base")
    words = shlex.split(command(script))
    assert words[1:] == ["pretrain", "--config", config, "--init_from", "runs/base"]
    assert "init_from" in refused(capsys, "finetune", "--config", config)


def test_a_finetuning_for_a_task_is_a_job_of_dualroute_finetune(work, capsys):
    (work / "rows.csv").write_text("text,label\ngood,yes\nbad,no\n")
    settings = {"output": "runs/task", "data": {"path": "rows.csv"}, "task": {"kind": "sequence"}}
    (work / "task.yaml").write_text(yaml.safe_dump(settings))
    (script,) = scripts(capsys, "finetune", "--config", work / "task.yaml", "--gpus_per_node", 1)
    assert shlex.split(command(script))[1:] == ["finetune", "--config", str(work / "task.yaml")]
    settings.pop("task")
    (work / "data.yaml").write_text(yaml.safe_dump(settings))
    (script,) = scripts(capsys, "finetune", "--config", work / "data.yaml", "--", "--task.kind", "sequence")
    assert shlex.split(command(script))[1] == "finetune"
    (work / "broken.yaml").write_text("task: [")
    assert "broken.yaml" in refused(capsys, "finetune", "--config", work / "broken.yaml")


def test_a_compression_is_a_job_for_each_training_and_what_lies_between(work, tiny_dataset, capsys):
    training = {
        "data": {"context": 64},
        "train": {"tokens_per_batch": 512, "micro_batch": 2, "max_steps": 60},
    }
    sections = {"prepare": None, "data": str(tiny_dataset), "output": "runs/small", "pretrain": training,
                "recover": training, "prune": {"keep": 0.5, "multiple": 16}}  # fmt: skip
    (work / "pipeline.yaml").write_text(yaml.safe_dump(sections))
    chain = scripts(capsys, "pipeline", "--config", "pipeline.yaml", "--nodes", 2, "--", "--rounds", 2)
    lines = [shlex.split(command(script)) for script in chain]
    assert [line[line.index("--only") + 1].split(",")[0] for line in lines] == [
        "pretrain", "prune-1", "recover-1", "prune-2", "recover-2", "quantize",
    ]  # fmt: skip
    assert lines[-1][lines[-1].index("--only") + 1].endswith(",export,report")
    for script, line in zip(chain, lines, strict=True):
        training_job = "--launcher" in line
        assert ("#SBATCH --nodes=2" in script) == training_job
        if training_job:
            run = work / "runs" / "small" / line[line.index("--only") + 1]
            assert f"--limit 3 --output {run}\n" in script
        assert line[line.index("pipeline") + 1 :][:4] == [
            "--config",
            str(work / "pipeline.yaml"),
            "--rounds",
            "2",
        ]
    # 8 windows a step cannot be shared by 3 nodes; a stage's mistake is named
    assert "512" in refused(capsys, "pipeline", "--config", "pipeline.yaml", "--nodes", 3)
    assert "stage prune: keep is 5" in refused(
        capsys, "pipeline", "--config", "pipeline.yaml", "--", "--prune.keep", 5
    )


def test_a_sweep_has_a_task_for_each_file(work, tiny_dataset, capsys):
    files = [configuration(work, tiny_dataset, name) for name in ("a", "b", "c")]
    (script,) = scripts(capsys, "sweep", "--config", *files, "--max_parallel", 2, "--stall_requeues", 0)
    assert "#SBATCH --array=0-2%2" in script
    assert re.findall(r"^    (\S+\.yaml)$", script, re.M) == files
    runs = "\n".join(f"    {work}/runs/{name}" for name in ("a", "b", "c"))
    assert f"outputs=(\n{runs}\n)\n" in script
    assert "--limit 0 " in script


def test_what_cannot_run_is_not_queued(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    assert "--config" in refused(capsys, "pretrain")
    assert "--nodes is 0" in refused(capsys, "pretrain", "--config", config, "--nodes", 0)
    assert "--stall_requeues is -1" in refused(capsys, "pretrain", "--config", config, "--stall_requeues", -1)
    assert "--time soon" in refused(capsys, "pretrain", "--config", config, "--time", "soon")
    for time in ("4", "0-0:04", "00:04:59", "4:59"):
        assert "under 5 minutes" in refused(capsys, "pretrain", "--config", config, "--time", time)
    # 512 tokens are 8 windows, which 3 nodes cannot share
    assert "512" in refused(capsys, "pretrain", "--config", config, "--nodes", 3)
    assert "did you mean 'train.max_steps'" in refused(
        capsys, "pretrain", "--config", config, "--", "--train.max_stepz", 3
    )
    missing = configuration(work, "nowhere", "missing")
    assert "nowhere" in refused(capsys, "pretrain", "--config", missing)
    assert "give each its own" in refused(capsys, "sweep", "--config", config, config)
    assert "--prepare" in refused(capsys, "pipeline", "--config", config)
    (work / "prepare.yaml").write_text("output: elsewhere")
    line = refused(capsys, "pipeline", "--prepare", "prepare.yaml", "--config", config)
    assert "elsewhere" in line
    assert str(tiny_dataset) in line
    assert "no sbatch here" in refused(capsys, "pretrain", "--config", config)


def test_a_template_of_ones_own_may_not_ask_for_what_is_unknown(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    (work / "mine.sbatch").write_text("#!/bin/bash\n#SBATCH --nodes=@NODES@\nmodule load cuda\n@TRAIN@\n")
    line = refused(capsys, "pretrain", "--config", config, "--template", work / "mine.sbatch")
    assert "mine.sbatch has @TRAIN@" in line
    assert "ARGUMENTS" in line
    (work / "bytes.sbatch").write_bytes(b"#!/bin/bash\xff")
    os.mkfifo(work / "pipe.sbatch")
    for name, why in (("bytes.sbatch", "not UTF-8"), ("pipe.sbatch", "no regular"), (".", "no regular")):
        assert why in refused(capsys, "pretrain", "--config", config, "--template", work / name)
    with pytest.raises(UserError, match=r"none\.sbatch cannot be read"):
        submit_scripts.render("pretrain.sbatch", {}, work / "none.sbatch")


@pytest.mark.parametrize("name", ["pretrain", "sweep", "stage"])
def test_every_variable_of_a_template_is_explained_at_its_head(name):
    folder = submit_scripts.template_folder()
    text = (folder / f"{name}.sbatch").read_text()
    head = text[: text.index("#SBATCH")]
    if name != "pretrain":
        assert "pretrain.sbatch" in head
        head += (folder / "pretrain.sbatch").read_text().partition("#SBATCH")[0]
    for variable in set(re.findall(r"@([A-Z_]+)@", text)):
        assert re.search(rf"^#   {variable}\b|^#   .*\b{variable},", head, re.M), variable


HOSTILE = ["a\nb", "$(touch canary)", "`touch canary`", "'; touch canary; '", '"; touch canary; "', "a b",
           "$'\\n'", "a\u2028b", "\\", "!!", "a\rb\x1b[2J", "%j#&|<>*?~"]  # fmt: skip


def run_script(work, script):
    """Run a script with stand-ins for what a node has; the words of the training that it starts."""
    stubs = work / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("scontrol", "head", "sed"):
        (stubs / name).write_text("#!/bin/bash\n")
    (stubs / "env").write_text("#!/bin/bash\nexit 1\n")
    (stubs / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=work, capture_output=True, text=True,
        env={"PATH": str(stubs), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (work / "canary").exists()
    return (work / "words").read_text().split("\0")[:-1]


def test_words_reach_the_training_as_they_were_given_and_nothing_else_runs(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    options = [f"--monitor.sample_prompts={yaml.safe_dump(HOSTILE, default_flow_style=True, width=10_000)}"]
    (script,) = scripts(capsys, "pretrain", "--config", config, "--", *options)
    assert run_script(work, script)[-4:] == ["pretrain", "--config", config, *options]


@pytest.mark.parametrize("word", HOSTILE)
def test_any_word_survives_its_quotes_on_one_line(word):
    assert len(quoted(word).splitlines()) == 1
    shown = subprocess.run(["/bin/bash", "-c", f"printf %s {quoted(word)}"], capture_output=True)
    assert shown.stdout.decode() == word


def test_a_hostile_folder_is_quoted_or_refused(work, tiny_dataset, capsys):
    for number, word in enumerate(HOSTILE):
        config = configuration(work, tiny_dataset, f"run{number}", output=f"runs/{word}")
        if any(ord(character) < 32 for character in word):
            assert f"output in {config}:" in refused(capsys, "pretrain", "--config", config)
            continue
        if "\u2028" in word:
            assert "control character" in refused(capsys, "pretrain", "--config", config)
            continue
        config = configuration(work, tiny_dataset, f"run{number}", output=f"runs/{word}".replace("$", "$$"))
        (script,) = scripts(capsys, "pretrain", "--config", config)
        run_script(work, script)
        (log,) = re.findall(r"^#SBATCH --output=(.*)$", script, re.M)
        assert shlex.split(log) == [f"{work}/runs/{word}".replace("%", "%%") + "/slurm/%x-%j.out"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, word) for name in ("--partition", "--account", "--qos") for word in HOSTILE),
        ("--partition", ""),
        ("--partition", "-x"),
        ("--time", "5\n"),
        ("--time", "\u0665:00:00"),
        *(("--sbatch", f"--comment={word}") for word in HOSTILE if len(word.splitlines()) > 1),
        ("--sbatch", "constraint=a100"),
        ("--sbatch", ""),
    ],
)
def test_what_would_leave_its_line_is_refused(work, tiny_dataset, capsys, option, value):
    config = configuration(work, tiny_dataset)
    line = refused(capsys, "pretrain", "--config", config, f"{option}={value}")
    assert option in line
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_dashes_are_underscores_and_no_option_is_cut_short(work, tiny_dataset, capsys):
    config = configuration(work, tiny_dataset)
    (script,) = scripts(
        capsys,
        "pretrain",
        "--config",
        config,
        "--gpus-per-node",
        2,
        "--cpus-per-task=3",
        "--stall-requeues",
        1,
    )
    assert "#SBATCH --gpus-per-node=2\n#SBATCH --cpus-per-task=3\n" in script
    assert "--part" in refused(capsys, "pretrain", "--config", config, "--part", "gpu")


def test_a_folder_that_cannot_be_written_is_named(work, tiny_dataset, capsys):
    (work / "runs").write_text("in the way")
    line = refused(capsys, "pretrain", "--config", configuration(work, tiny_dataset))
    assert f"the script {work}/runs/run/slurm/pretrain.sbatch cannot be written" in line


def test_a_script_can_be_looked_at_before_the_data_are_there(work, capsys):
    config = configuration(work, "nowhere")
    assert main(["submit", "pretrain", "--config", config, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --nodes=1" in shown.out
    assert "no shards in nowhere yet" in shown.err
    assert "nowhere" in refused(capsys, "pretrain", "--config", config)
