"""The last page of a pipeline: what each stage cost and gave, as ``report.md`` and ``report.html``.

In: the JSON files of the measurements, the account of the pruning, the runs' own metrics.  Out: tables, a
picture of size against loss, the curves of the recovery and its controls, and what every model writes after
the same beginnings.  The HTML file holds its pictures; the Markdown one has them beside it.

Nothing is measured here.  A figure that is not in a file is not in the report.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.evaluate.suite.cells import Score
from dualroute.evaluate.suite.compare import differences
from dualroute.evaluate.suite.record import read_record
from dualroute.evaluate.suite.run import error_of, figure, flat_scores
from dualroute.files import write_bytes_atomically
from dualroute.pipeline.config import PipelineConfig
from dualroute.pipeline.pictures import draw_curves, draw_intervals
from dualroute.pipeline.stages import Plan
from dualroute.training.monitoring.metrics_log import read_metrics

Row = Sequence[str]


def write_report(config: PipelineConfig, plan: Plan, records: dict[str, dict[str, Any]]) -> Path:
    """Write both files; the path of the HTML one.

    Raises:
        UserError: A measurement is missing.
    """
    output = Path(config.output)
    models = {label: _figures(output, label) for label in plan.models}
    controls = {label: _read(output / "evaluate" / f"{label}.json", _EVALUATION) for label in plan.controls}
    blocks: list[tuple[str, Any]] = [
        ("text", f"Data: `{plan.data}`.  Parent: `{plan.models['parent']}`."),
        ("table", _summary(models)),
        ("picture", ("pareto.svg", "Size against held-out loss", _pareto(models))),
    ]
    if config.suite is not None:
        blocks += [
            ("title", f"Suite: {Path(config.suite).stem}"),
            ("text", _SUITE),
            ("table", _suite(output, plan)),
            ("picture", ("bias.svg", "Bias along the pipeline, with 95 % intervals", _bias(output, plan))),
        ]
    if controls:
        blocks += [("title", "Controls"), ("text", _CONTROLS), ("table", _controls(models, controls))]
    curves = _curves(plan)
    if curves:
        picture = draw_curves(curves, "steps of the recovery", "validation loss")
        blocks.append(("picture", ("recovery.svg", "Validation loss during the recovery", picture)))
    for label in plan.models:
        account = plan.models[label] / "prune.json"
        if account.is_file():
            blocks += [("title", f"Pruning: {label}"), ("table", _pruning(_read(account)))]
    blocks += [("title", "Samples"), ("table", _samples(models))]
    exported = output / "export" / "export.json"
    if exported.is_file():
        facts = {name: fact for name, fact in _read(exported).items() if name != "source_files"}
        blocks += [("title", "Export"), ("code", json.dumps(facts, indent=1))]
    seconds = [(name, f"{record['seconds']:,.0f}") for name, record in records.items() if "seconds" in record]
    blocks += [("title", "Time"), ("table", [("stage", "seconds"), *seconds])]
    write_bytes_atomically(output / "report.md", _markdown(output, blocks).encode())
    page = output / "report.html"
    write_bytes_atomically(page, _html(output.name, blocks).encode())
    return page


_SUITE = (
    "Scores with their standard errors. A model is called better or worse than the parent where they "
    "differ by more than two standard errors of the difference."
)
_CONTROLS = (
    "The same data, steps and learning rate: the parent trained further, the pruned model recovered by "
    "cross-entropy alone, and a model of the same shape pruned at random and recovered by distillation."
)


_NUMBER = (int, float)
#: What a measurement must hold; {name: type}.
_EVALUATION: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "bits_per_byte"), _NUMBER)
_SPEED: dict[str, Any] = {
    **dict.fromkeys(("parameters", "weights_bytes", "eager_tokens_per_second"), _NUMBER),
    "peak_memory_bytes": (*_NUMBER, type(None)),
    "samples": dict,
}


def _read(path: Path, holds: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON file with at least the names ``holds``, of those types.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no table of figures")
        for name, kind in (holds or {}).items():
            if not isinstance(found.get(name), kind) or isinstance(found.get(name), bool):
                raise ValueError(f"{name} is missing or of another type")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it, and the pipeline makes it again"
        ) from error


def _figures(output: Path, label: str) -> dict[str, Any]:
    evaluation = _read(output / "evaluate" / f"{label}.json", _EVALUATION)
    return evaluation | _read(output / "speed" / f"{label}.json", _SPEED)


def _summary(models: dict[str, dict[str, Any]]) -> list[Row]:
    first = next(iter(models.values()))
    head = [
        "model", "parameters", "MB", "smaller", "loss", "perplexity", "change", "bits per byte",
        "tokens/s", "tokens/s compiled", "peak memory, MB",
    ]  # fmt: skip
    rows: list[Row] = [head]
    for label, of in models.items():
        change = of["perplexity"] / first["perplexity"] - 1
        compiled = of.get("compiled_tokens_per_second")
        base = first.get("compiled_tokens_per_second")
        faster = f" ({compiled / base:.2f}×)" if compiled and base else ""
        rows.append([
            label, f"{of['parameters']:,}", f"{of['weights_bytes'] / 1e6:.2f}",
            f"{first['weights_bytes'] / of['weights_bytes']:.2f}×", f"{of['loss']:.4f}",
            f"{of['perplexity']:.2f}", f"{change:+.2%}", f"{of['bits_per_byte']:.4f}",
            f"{of['eager_tokens_per_second']:,.0f}", f"{compiled:,.0f}{faster}" if compiled else "–",
            f"{of['peak_memory_bytes'] / 1e6:,.0f}" if of["peak_memory_bytes"] else "–",
        ])  # fmt: skip
    return rows


def _suite(output: Path, plan: Plan) -> list[Row]:
    """A line for each score, a column for each model."""
    records = {label: read_record(output / "suite" / f"{label}.json", "the suite's") for label in plan.models}
    first, *others = records
    rows: list[Row] = [["", *records]]
    verdicts = {
        (label, f"{one.key}/{one.metric}"): one.verdict
        for label in others
        for one in differences(records[label], records[first])
    }
    scores = {label: dict(flat_scores(record)) for label, record in records.items()}
    for name in scores[first]:
        cells = [name]
        for label in records:
            score = scores[label].get(name)
            verdict = verdicts.get((label, name), "")
            told = f" ({verdict})" if verdict in ("better", "worse", "different") else ""
            cells.append("–" if score is None else f"{figure(score.value)} ± {error_of(score)}{told}")
        rows.append(cells)
    return rows


def _pareto(models: dict[str, dict[str, Any]]) -> str:
    points = {label: [(of["weights_bytes"] / 1e6, of["loss"])] for label, of in models.items()}
    return draw_curves(points, "megabytes of weights", "held-out loss (nats per token)")


def _bias(output: Path, plan: Plan) -> str:
    """An SVG of the scores that have an interval and no better direction: those of bias."""
    found: dict[str, dict[str, Score]] = {}
    for label in plan.models:
        record = read_record(output / "suite" / f"{label}.json", "the suite's")
        for name, score in flat_scores(record):
            if score.higher_is_better is None and score.interval is not None:
                found.setdefault(name, {})[label] = score
    return draw_intervals(found) if found else ""


def _controls(models: dict[str, dict[str, Any]], controls: dict[str, dict[str, Any]]) -> list[Row]:
    last = [of for label, of in models.items() if label.startswith("recovered")][-1]
    rows = [["", "loss", "against recovered"], ["recovered", f"{last['loss']:.4f}", ""]]
    names = {
        "control-parent": "parent, the same further steps",
        "control-cross_entropy": "cross-entropy alone",
        "control-random": "random pruning, then distilled",
    }
    for label, of in controls.items():
        rows.append([names[label], f"{of['loss']:.4f}", f"{of['loss'] - last['loss']:+.4f}"])
    return list(rows)


def _pruning(account: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [["axis", "size", "loss +", "random +"]]
    for axis, sizes in account.get("axes", {}).items():
        rows += [
            [axis, f"{one['share']:.0%}", f"{one['activation']:.4f}", f"{one['random']:.4f}"] for one in sizes
        ]
    for name, size in account["shape"]["pruned"].items():
        rows.append([f"chosen {name}", f"{size:,} of {account['shape']['parent'][name]:,}", "", ""])
    return rows


def _samples(models: dict[str, dict[str, Any]]) -> list[Row]:
    prompts = list(next(iter(models.values()))["samples"])
    return [
        ["model", *prompts],
        *([label, *(of["samples"][p] for p in prompts)] for label, of in models.items()),
    ]


def _curves(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """{label: [(step, validation loss)]} of the last recovery and of the controls."""
    runs = {label: path for label, path in plan.models.items() if label.startswith("recovered")}
    runs = dict(list(runs.items())[-1:]) | plan.controls
    curves = {}
    for label, folder in runs.items():
        lines = read_metrics(folder / "metrics.jsonl", "validation")
        if lines:
            curves[label] = [(float(line["step"]), float(line["val/loss"])) for line in lines]
    return curves


# -- the two formats -----------------------------------------------------------------------------------------


def _markdown(output: Path, blocks: Iterable[tuple[str, Any]]) -> str:
    parts = [f"# {output.name}"]
    for kind, content in blocks:
        if kind == "title":
            parts.append(f"## {content}")
        elif kind == "text":
            parts.append(content)
        elif kind == "code":
            parts.append(f"```json\n{content}\n```")
        elif kind == "table":
            head, *rows = ([_cell(cell) for cell in row] for row in content)
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        elif content[2]:
            name, title, picture = content
            write_bytes_atomically(output / name, picture.encode())
            parts.append(f"![{title}]({name})")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}"
    "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}"
    "th{background:#f4f4f4}pre{background:#f6f6f6;padding:1em;overflow:auto}svg{max-width:100%;height:auto}"
)


def _html(title: str, blocks: Iterable[tuple[str, Any]]) -> str:
    parts = []
    for kind, content in blocks:
        if kind == "title":
            parts.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(content).replace('`', '')}</p>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "table":
            head, *rows = content
            lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
            lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
        elif content[2]:
            picture = content[2][content[2].index("<svg") :]
            parts.append(f"<h3>{html.escape(content[1])}</h3>{picture}")
    body = "\n".join(parts)
    return (
        "<!doctype html><html lang='en'><meta "
        f"charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
