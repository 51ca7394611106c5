"""What a data set is made of, and when its vocabulary is too large."""

from __future__ import annotations

import json

from data_prep.composition import described, warning
from data_prep.prepare import prepare, summary


def test_sources_and_bytes_a_token(config, corpus) -> None:
    manifest = prepare(config(shard_size_mb=0.01))
    made_of = manifest.preparation["composition"]
    assert sorted(made_of["sources"]) == ["part0", "part1", "part2"]
    for key in ("documents", "bytes", "tokens"):
        total = sum(entry[key] for entry in made_of["sources"].values())
        assert total == sum(getattr(split, key) for split in manifest.splits.values())
    assert made_of["vocabulary"]["tokens_counted"] == manifest.splits["train"].tokens
    assert "bytes a token by source: part" in summary(manifest)


def test_a_vocabulary_that_is_too_large_is_told(config, corpus) -> None:
    small = prepare(config())
    assert "note: the vocabulary is large for this corpus: " in summary(small)
    vocabulary = {"size": 400, "tokens_counted": 90_000, "tokens": 90_000, "pieces_with_100_examples": 250}
    assert warning(vocabulary) is None
    assert warning(vocabulary | {"pieces_with_100_examples": 150}) is not None
    sample = vocabulary | {"pieces_with_100_examples": 150, "tokens": 10**9}
    assert warning(sample) is None  # what a sample lacks, the rest may have


def test_one_source_needs_no_line(config, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} " * 20}) + "\n" for n in range(80)))
    made_of = prepare(config(corpus=str(path), output=str(tmp_path / "x"), vocab_size=290)).preparation[
        "composition"
    ]
    assert list(made_of["sources"]) == ["rows.jsonl"]
    assert made_of["sources"]["rows.jsonl"]["documents"] == 80
    assert described(made_of) == []
