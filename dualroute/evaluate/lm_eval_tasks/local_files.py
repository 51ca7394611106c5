"""What the YAMLs beside it call: local files as data sets, and metrics of their answers."""

from __future__ import annotations

import csv
import io
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from dualroute.errors import UserError
from dualroute.evaluate.fairness_sets import PLACES as FAIRNESS
from dualroute.evaluate.fairness_sets import SETS, bbq_rows
from dualroute.evaluate.long_context.questions import read_paragraphs
from dualroute.evaluate.long_context.tasks import data_file
from dualroute.evaluate.parts.wikitext import articles, detokenise
from dualroute.evaluate.perplexity import read_text

#: {task: where its file or folder lies in $DUALROUTE_DATA}
PLACES = {
    "local_wikitext": "wikitext/wt2.test.txt.gz",
    "local_sst2": "glue/SST-2/dev.tsv.gz",
    "local_xquad": "squad_style/xquad.en.json.gz",
    "local_crows_pairs": FAIRNESS["crows_pairs"],
    "local_bbq": FAIRNESS["bbq"],
}


def file_of(task: str, files: dict[str, str] | None = None) -> Path:
    """The file or folder of a task.

    Raises:
        UserError: None was given, and none is in $DUALROUTE_DATA; or it is not there.
    """
    path = (files or {}).get(task) or data_file(PLACES[task], folders=True)
    if path is None:
        raise UserError(
            f"{task} reads {PLACES[task]} in $DUALROUTE_DATA, and it is not there: set DUALROUTE_DATA, or "
            f"give files {{{task}: FILE}}"
        )
    if not Path(path).exists():
        raise UserError(f"files.{task} {path} is not there: give the path of an existing file")
    return Path(path)


def _dataset(rows: Iterable[dict[str, Any]], path: Path) -> dict[str, Any]:
    listed = list(rows)
    if not listed:
        raise UserError(f"{path} holds nothing to ask: give another file")
    return {"test": datasets.Dataset.from_list(listed)}


# -- data sets: called by lm_eval with the task manager's metadata -------------------------------------------


def wikitext(files: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """Articles of a WikiText-like file."""
    path = file_of("local_wikitext", files)
    return _dataset(({"page": page} for page in articles(read_text(path)) if page.strip()), path)


def sst2(files: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """Rows of a GLUE-like table: sentence, label (0 or 1)."""
    path = file_of("local_sst2", files)
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"sentence", "label"} - set(reader.fieldnames or [])
    if missing:
        raise UserError(
            f"{path} has no column {min(missing)!r}, it has {reader.fieldnames}: give another file"
        )
    rows = []
    for number, row in enumerate(reader, 2):
        if row["label"] not in ("0", "1"):
            raise UserError(f"{path}, line {number}: the label {row['label']!r} is not among 0 and 1")
        rows.append({"sentence": row["sentence"], "label": int(row["label"])})
    return _dataset(rows, path)


def xquad(files: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """Questions on paragraphs, in SQuAD's form."""
    path = file_of("local_xquad", files)
    found = read_paragraphs(path)
    rows = (
        {"context": found.documents[one.documents[0]], "question": one.text, "answers": list(one.answers)}
        for one in found.questions
    )
    return _dataset(rows, path)


def crows_pairs(files: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """Pairs of sentences of CrowS-Pairs' table."""
    path = file_of("local_crows_pairs", files)
    pairs = ((*item.texts, item.kind) for item in SETS["crows_pairs"].read(path))
    return _dataset(
        (dict(zip(("sent_more", "sent_less", "bias_type"), one, strict=True)) for one in pairs), path
    )


def bbq(files: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """Questions of BBQ's JSON lines; of a folder all categories."""
    path = file_of("local_bbq", files)
    names = ("context", "question", "category", "context_condition")
    rows = (
        {name: str(row[name]) for name in names}
        | {"choices": [str(row[f"ans{number}"]) for number in range(3)], "label": int(row["label"])}
        for row, _ in bbq_rows(path)
    )
    return _dataset(rows, path)


# -- answers -------------------------------------------------------------------------------------------------


def wikitext_target(doc: dict[str, Any]) -> str:
    """The article as the model reads it."""
    return detokenise(doc["page"])


def wikitext_results(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood by words and bytes of the file."""
    words, size = len(re.split(r"\s+", doc["page"])), len(doc["page"].encode())
    return {
        "word_perplexity": (results[0], words),
        "byte_perplexity": (results[0], size),
        "bits_per_byte": (results[0], size),
    }


def pair(doc: dict[str, Any]) -> list[str]:
    """Both sentences."""
    return [doc["sent_more"], doc["sent_less"]]


def pair_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the more stereotypical sentence is likelier, and by how much either is."""
    more, less = (float(one[0]) for one in results)
    return {"pct_stereotype": float(more > less), "likelihood_diff": abs(more - less)}


def _normal(text: str) -> list[str]:
    """SQuAD's: small letters, without articles and punctuation."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """SQuAD's exact match and F1 with the best of the answers."""
    written = _normal(results[0])
    exact = f1 = 0.0
    for answer in map(_normal, doc["answers"]):
        common = sum((Counter(written) & Counter(answer)).values())
        exact = max(exact, float(written == answer))
        if common:
            f1 = max(f1, 2 * common / (len(written) + len(answer)))
    return {"exact_match": exact, "f1": max(exact, f1)}
