"""The table of docs/tasks.md: each task with dual attention, its dense twin and its trivial baseline.

    DUALROUTE_DATA=/path/to/data python benchmarks/tasks.py [NAME …] --output runs/tasks

A row is an ordinary `dualroute finetune` run in OUTPUT/NAME-ATTENTION-sSEED, which goes on where it was cut
short; what is measured is appended to OUTPUT/results.jsonl, and rows that stand there are not run again.
CPU seconds (user and system, which other work on the machine changes little) and peak memory are those of
the training's process; of a row that was cut short they are those of its last part, and `resumed` says so.
Rows that begin with pretrained weights have them made first, once for each attention, in
OUTPUT/books_encoder-ATTENTION (`dualroute prepare`, then `dualroute pretrain`, which go on where they were as
well). Settings behind `--` go to every training of a task (`-- --train.epochs 1`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import task_data

from dualroute.tasks.answer import Answerer
from dualroute.tasks.evaluate import evaluate_task, training_rows, usable_rows

ATTENTIONS = ("dual", "dense")


@dataclass(frozen=True)
class Task:
    """A row.

    Attributes:
        metric: That is shown.
        baseline: Which of the kind's; empty for its first.
        made: The data set is made by data/task_data.py.
        made_by: The program of benchmarks/data that makes its data set, and its --output (see `SOURCES`).
        settings: Of its trainings, besides those of its configuration.
        most_rows: Of the rows that are scored, where the model writes its answers.
        of: The task whose configuration it is; empty for its own.
        begins_with: The pretraining (configs/pretrain) whose weights its trainings begin with.
        takes_long: A quarter of an hour of one core, or more; it is run where it is named.
    """

    metric: str
    baseline: str = ""
    made: bool = False
    made_by: tuple[str, str] | None = None
    settings: tuple[str, ...] = ()
    most_rows: int | None = None
    of: str = ""
    begins_with: str = ""
    takes_long: bool = False


TASKS = {
    "sst2": Task("accuracy"),
    "cola": Task("matthews"),
    "mrpc": Task("f1"),
    "rte": Task("accuracy"),
    **{
        f"{name}_pretrained": Task(metric, of=name, begins_with="books_encoder")
        for name, metric in {"cola": "matthews", "mrpc": "f1", "rte": "accuracy", "wnut17": "f1"}.items()
    },
    "chinese_source": Task("accuracy", made=True),
    "wnut17": Task("f1"),
    "xquad": Task("f1"),
    "xquad_zh": Task("f1"),
    "cmrc2018": Task("f1"),
    "tatoeba_en_zh": Task("bleu", made=True, most_rows=1000),
    "tatoeba_zh_en": Task("bleu", made=True, most_rows=1000),
    "scitldr": Task("rouge1", "lead-1", made=True),
    "sgd": Task("bleu", "majority", made=True, most_rows=1000),
    "sgd_state": Task("exact_match", "majority", made=True, most_rows=1000),
    "mnist": Task("accuracy"),
    "mnist_pixels": Task("accuracy", takes_long=True),
    "digits": Task("accuracy", made_by=("spoken_digits.py", "data/digits")),
    "digit_strings": Task("wer", made_by=("spoken_digits.py", "data/digits")),
    "movielens": Task(
        "ndcg@10",
        made_by=("interactions.py", "data/interactions"),
        settings=("--data.path", "data/interactions/u.data"),
    ),
    "listops": Task("accuracy", made_by=("listops.py", "data/listops"), takes_long=True),
    "retrieval": Task(
        "accuracy",
        "TF-IDF cosine of the pair",
        made_by=("retrieval.py", "data/retrieval"),
        takes_long=True,
    ),
}

#: What programs of `Task.made_by` are made from, in $DUALROUTE_DATA; the others make everything up.
SOURCES = {
    "spoken_digits.py": "speech_fsdd/fsdd.tar.xz",
    "retrieval.py": "english_books/books.tar.xz",
}


def make(task: Task) -> None:
    """Have the data set made, unless it is there."""
    if task.made_by is None:
        return
    program, output = task.made_by
    if not Path(output).exists():
        words = [sys.executable, str(Path(__file__).parent / "data" / program), "--output", output]
        if program in SOURCES:
            words += [
                "--source",
                str(Path(os.environ.get("DUALROUTE_DATA", "../shared/data")) / SOURCES[program]),
            ]
        subprocess.run(words, check=True)


def attention_arithmetic(answerer: Answerer, rows: list[dict[str, Any]]) -> float:
    """Forward FLOPs of the attention of one row, on average over `rows`; see
    `DualRoutingTransformer.attention_flops_per_token`."""
    lengths = [len(example) for row in rows for example in answerer.kind.encode(row)]
    flops = {n: n * answerer.loaded.model.attention_flops_per_token(n) for n in set(lengths)}
    return sum(flops[n] for n in lengths) / len(rows)


def command(name: str, attention: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The training of a row."""
    return [
        *("finetune", "--config", f"configs/task/{TASKS[name].of or name}.yaml"),
        *("--model.attention", attention),
        *("--seed", str(seed), "--output", str(folder(name, attention, seed, options.output))),
        *(*TASKS[name].settings, *options.more),
    ]


def folder(name: str, attention: str, seed: int, output: Path) -> Path:
    return output / f"{name}-{attention}-s{seed}"


def pretrained(name: str, attention: str, options: argparse.Namespace) -> Path:
    """The run folder of a pretraining, trained to its end."""
    books = Path(os.environ.get("DUALROUTE_DATA", "../shared/data")) / "english_books" / "books.tar.xz"
    output: Path = options.output / f"{name}-{attention}"
    prepare = ["prepare", "--config", "configs/prepare/books.yaml", "--corpus", str(books)]
    pretrain = ["pretrain", "--config", f"configs/pretrain/{name}.yaml", "--model.attention", attention]
    for words in (prepare, [*pretrain, "--output", str(output)]):  # what is done is not done again
        subprocess.run([sys.executable, "-m", "dualroute.cli", *words], check=True)
    return output


def measured(name: str, attention: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a row."""
    task = TASKS[name]
    words = command(name, attention, seed, options)
    if task.begins_with:
        words += ["--init_from", str(pretrained(task.begins_with, attention, options))]
    resumed = (folder(name, attention, seed, options.output) / "checkpoints").exists()
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "dualroute.cli", *words])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{shlex.join(['dualroute', *words])} ended with {os.waitstatus_to_exitcode(status)}"
        )
    seconds = time.perf_counter() - begin
    answerer = Answerer(folder(name, attention, seed, options.output))
    score = evaluate_task(answerer, max_rows=task.most_rows)
    steps = answerer.loaded.checkpoint.metadata
    return {
        "task": name,
        "attention": attention,
        "seed": seed,
        "metrics": score.metrics,
        "rows": score.rows,
        "seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": seconds,
        "resumed": resumed,
        "peak_mib": used.ru_maxrss / 1024,
        "attention_flops": attention_arithmetic(answerer, usable_rows(answerer, max_rows=200)[1]),
        "parameters": answerer.loaded.model.num_parameters(),
        "best_step": steps.get("step"),
        "command": shlex.join(["dualroute", *words]),
    }


def baseline(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Score the trivial baseline of a task, with the data of one of its rows."""
    task = TASKS[name]
    answerer = Answerer(folder(name, ATTENTIONS[0], options.seeds[0], options.output))
    kind = answerer.kind
    known = kind.baselines()
    which = task.baseline or next(iter(known))
    _, rows, _ = usable_rows(answerer, max_rows=task.most_rows)
    predictions = known[which](training_rows(answerer), rows)
    metrics = kind.score([kind.target(row) for row in rows], predictions)
    return {"task": name, "attention": "baseline", "seed": None, "name": which, "metrics": metrics}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one line for each task that has a result."""
    lines = [
        "| task | metric | dual | dense | baseline | CPU seconds (dual / dense) | peak MiB (dual / dense) "
        "| attention arithmetic, of dense |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, task in TASKS.items():
        mine = [one for one in results if one["task"] == name]
        by = {a: [one for one in mine if one["attention"] == a] for a in (*ATTENTIONS, "baseline")}
        if not by["dual"] and not by["dense"]:
            continue

        def spread(some: list[dict[str, Any]], metric: str = task.metric) -> str:
            values = [one["metrics"][metric] for one in some]
            shown = f"{statistics.mean(values):.3f}" if values else "–"
            return shown + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")

        def means(key: str, some: dict[str, list[dict[str, Any]]] = by) -> str:
            found = [statistics.mean(one[key] for one in some[a]) if some[a] else None for a in ATTENTIONS]
            return " / ".join("–" if value is None else f"{value:,.0f}" for value in found)

        flops = [[one.get("attention_flops") for one in by[a]] for a in ATTENTIONS]
        known = all(some and all(some) for some in flops)
        share = f"{flops[0][0] / flops[1][0]:.2f}" if known else "–"
        trivial = f"{spread(by['baseline'])} ({by['baseline'][0]['name']})" if by["baseline"] else "–"
        lines.append(
            f"| `{name}` | {task.metric} | {spread(by['dual'])} | {spread(by['dense'])} | {trivial} "
            f"| {means('seconds')} | {means('peak_mib')} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    longest = [name for name, task in TASKS.items() if task.takes_long]
    parser.add_argument(
        "names",
        nargs="*",
        help=f"of {', '.join(TASKS)}; none means all but the longest, {', '.join(longest)}",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--attentions", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    options.more = words[split + 1 :]
    unknown = [name for name in options.names if name not in TASKS]
    if unknown:
        parser.error(f"{unknown[0]} is no task of {', '.join(TASKS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(result: dict[str, Any]) -> None:
        results.append(result)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result, ensure_ascii=False) + "\n")

    done = {(one["task"], one["attention"], one["seed"]) for one in results}
    for name in options.names or [name for name in TASKS if name not in longest]:
        if TASKS[name].made:
            task_data.make(name.replace("zh_en", "en_zh"), Path("data/tasks"))
        make(TASKS[name])
        for attention in options.attentions:
            for seed in options.seeds:
                if (name, attention, seed) not in done:
                    note(measured(name, attention, seed, options))
        if (name, "baseline", None) not in done and "dual" in options.attentions:
            note(baseline(name, options))
    print(table(results))


if __name__ == "__main__":
    main()
