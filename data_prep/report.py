"""A page about a preparation that needs nothing but itself: what stayed, what went and why, with samples.

Comes in: the manifest's counts, and what `staged` and `composition` found. Goes out: ``report.html`` in the
output folder. Every text in it comes from a corpus, and is escaped; there is no script, and a policy
forbids all that is not on the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data_prep.staged.staging import Found
from data_prep.tally import describe
from dualroute.data.manifest import Manifest
from dualroute.files import write_bytes_atomically

REPORT_FILE = "report.html"
_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0
1rem;color:#222;background:#fff}} table{{border-collapse:collapse;margin:.5rem 0}}td,th{{padding:.2rem
.8rem;border-bottom:1px solid #ddd;text-align:left}}
td.n,th.n{{text-align:right;font-variant-numeric:tabular-nums}}summary{{cursor:pointer;padding:.2rem 0}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.6rem;margin:.2rem 0
1rem;font-size:13px}}
.name{{color:#666;font-size:13px;overflow-wrap:anywhere}}.two{{display:grid;grid-template-columns:1fr
1fr;gap:1rem}}
@media(prefers-color-scheme:dark){{body{{background:#16181a;color:#ddd}}pre{{background:#222528}}td,th{{border-color:#333}}}}
</style></head><body>"""


def write_report(manifest: Manifest, found: Found | None, hits: int, lines: Sequence[str]) -> Path:
    """Write the page.

    Args:
        manifest: of the finished data set.
        found: from `Staging.found`; None if nothing was cleaned beyond lengths and exact duplicates.
        hits: documents in contaminated.jsonl.
        lines: for people, as they end a preparation.
    """
    preparation = manifest.preparation
    corpus = str(preparation.get("options", {}).get("corpus", ""))
    body = [_HEAD.format(title=escape(f"Preparation of {corpus}")), f"<h1>{escape(corpus)}</h1>"]
    body += ["<pre>", escape("\n".join(lines)), "</pre>"]
    body.append("<h2>What there is</h2>")
    for what in ("sources", "languages"):
        table: Mapping[str, Mapping[str, int]] = preparation.get("composition", {}).get(what, {})
        if table:
            rows = (
                (name, *entry.values(), f"{entry['bytes'] / max(1, entry['tokens']):.2f}")
                for name, entry in table.items()
            )
            body.append(_table((what[:-1], "documents", "bytes", "tokens", "bytes a token"), rows))
    body.append("<h2>What was dropped</h2>")
    samples = found.samples if found is not None else {}
    total = sum(preparation.get("dropped", {}).values()) or 1
    for reason, count in sorted(preparation.get("dropped", {}).items(), key=lambda item: (-item[1], item[0])):
        head = f"<b>{escape(reason)}</b>: {count:,} ({count / total:.1%} of what was dropped)"
        shown = "".join(_sample(name, text) for name, text in samples.get(reason, []))
        body.append(f"<details><summary>{head}</summary>{shown}</details>" if shown else f"<p>{head}</p>")
    if found is not None:
        if found.pairs:
            body.append("<h2>Near duplicates: the first, and what each repeats</h2>")
            body += [
                f'<div class="two"><div>{_sample(*pair[:2])}</div><div>{_sample(*pair[2:])}</div></div>'
                for pair in found.pairs
            ]
        if found.counts:
            body.append("<h2>What was changed in documents that stayed</h2>")
            body.append(_table(("what", "how often"), sorted(found.counts.items())))
        if hits:
            body.append(
                f"<p>{hits:,} documents hold text of evaluation sets: contaminated.jsonl lists them.</p>"
            )
    body += ["<h2>Files</h2><pre>", escape("\n".join(describe(preparation.get("files", {})))), "</pre>"]
    options = preparation.get("options", {}).items()
    body.append(
        "<h2>Options</h2>" + _table(("key", "value"), ((key, _short(value)) for key, value in options))
    )
    body.append("</body></html>\n")
    path = manifest.folder / REPORT_FILE
    write_bytes_atomically(path, "".join(body).encode(errors="backslashreplace"))
    return path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]} …"


def _sample(name: str, text: str) -> str:
    return f'<div class="name">{escape(name)}</div><pre>{escape(text)}</pre>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cells(tag: str, row: Sequence[object]) -> str:
        marked = (
            (f"{value:,}" if isinstance(value, int) else str(value), place) for place, value in enumerate(row)
        )
        return "".join(
            f"<{tag}{' class=n' if place else ''}>{escape(value)}</{tag}>" for value, place in marked
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>{lines}</table>"
