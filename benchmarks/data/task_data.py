"""Data sets of configs/task that are no files of rows yet, made into some.

    DUALROUTE_DATA=/path/to/data python benchmarks/data/task_data.py tatoeba_en_zh --output data/tasks

tatoeba_en_zh   pairs of sentences; `group` joins all pairs that share a source or a target, directly or
                over others, so that a division by group has no sentence on both sides
scitldr         abstract and one-sentence summary
sgd             the dialogue so far and what the system says next
sgd_state       the dialogue so far and what the user has asked for, as text
chinese_source  a paragraph and which of the Chinese corpora it is from; `document` is its chapter or page
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualroute.files import atomic_path

Rows = Iterator[dict[str, Any]]
TURNS = 6  # of a dialogue that are given


def tatoeba_en_zh(folder: Path) -> dict[str, Rows]:
    with gzip.open(folder / "mt_en_zh" / "cmn.with_attribution.tsv.gz", "rt", encoding="utf-8-sig") as stream:
        fields = [line.rstrip("\n").split("\t") for line in stream]
    pairs = [(parts[0], parts[1]) for parts in fields if len(parts) == 3]
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for source, answer in pairs:
        parent[root(f"s {source}")] = root(f"t {answer}")
    return {"rows": ({"source": s, "answer": t, "group": root(f"s {s}")} for s, t in pairs)}


def scitldr(folder: Path) -> dict[str, Rows]:
    def rows(part: str) -> Rows:
        for row in json_lines(folder / "summarization" / f"scitldr_a.{part}.jsonl.gz"):
            yield {"source": " ".join(row["source"]), "answer": row["target"][0]}

    return {part: rows(part) for part in ("train", "dev", "test")}


def sgd(folder: Path) -> dict[str, Rows]:
    def rows(part: str) -> Rows:
        for dialogue in json_lines(folder / "dialogue" / "sgd" / f"{part}.jsonl.gz"):
            said = [f"{turn['speaker'].lower()}: {turn['utterance']}" for turn in dialogue["turns"]]
            for number, turn in enumerate(dialogue["turns"]):
                if turn["speaker"] == "SYSTEM" and number:
                    history = "\n".join(said[max(number - TURNS, 0) : number])
                    yield {"source": history, "answer": turn["utterance"]}

    return {part: rows(part) for part in ("train", "dev", "test")}


def sgd_state(folder: Path) -> dict[str, Rows]:
    def rows(part: str) -> Rows:
        for dialogue in json_lines(folder / "dialogue" / "sgd" / f"{part}.jsonl.gz"):
            said: list[str] = []
            for turn in dialogue["turns"]:
                said.append(f"{turn['speaker'].lower()}: {turn['utterance']}")
                if turn["speaker"] == "USER":
                    slots = {
                        f"{slot} = {sorted(values)[0]}"
                        for frame in turn["frames"]
                        for slot, values in frame["state"]["slot_values"].items()
                    }
                    yield {"source": "\n".join(said), "answer": "; ".join(sorted(slots)) or "nothing"}

    return {part: rows(part) for part in ("train", "dev", "test")}


def chinese_source(folder: Path) -> dict[str, Rows]:
    def rows() -> Rows:
        for file in sorted((folder / "chinese_text").glob("*.txt.xz")):
            name = file.name.removesuffix("_zh.txt.xz")
            with lzma.open(file, "rt", encoding="utf-8") as stream:
                lines = [line.strip() for line in stream]
            for number, line in enumerate(lines):
                if 20 <= len(line) <= 2000:
                    yield {"text": line, "label": name, "document": f"{name} {number // 20}"}

    return {"rows": rows()}


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


MADE = {maker.__name__: maker for maker in (tatoeba_en_zh, scitldr, sgd, sgd_state, chinese_source)}


def make(name: str, output: Path) -> None:
    """Write the files of a data set, unless they are there."""
    source = Path(os.environ.get("DUALROUTE_DATA", "../shared/data"))
    folder = output / name
    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in MADE[name](source).items():
        with atomic_path(folder / f"{part}.jsonl") as path, path.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "made").touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=MADE)
    parser.add_argument("--output", type=Path, default=Path("data/tasks"))
    options = parser.parse_args()
    for one in options.names:
        make(one, options.output)
