"""Data sets of the hub, with a folder in the place of one."""

from __future__ import annotations

import json

import pytest

from data_prep import corpora
from data_prep.readers.documents import ReadOptions
from data_prep.readers.hub import HubSet
from dualroute.errors import UserError

pytest.importorskip("datasets", reason="the hub needs datasets (extra prepare)")


def test_rows_become_documents(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"Text {number} 你好", "id": number} for number in range(7)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = corpora.open_corpus(f"hf:{folder}@train")
    assert corpus.files[0].fingerprint() == corpora.open_corpus(f"hf:{folder}@train").files[0].fingerprint()
    documents = list(corpora.documents(corpus, ReadOptions(), tmp_path))
    assert [document.text for document in documents] == [row["text"] for row in rows]
    assert documents[0].name == "set@train:1"
    with pytest.raises(UserError, match=r"no column 'body'.*text, id.*set text_key"):
        list(corpora.documents(corpus, ReadOptions(text_key="body"), tmp_path))
    with pytest.raises(UserError, match=r"cannot be read.*check its name"):
        list(corpora.documents(corpora.open_corpus(f"hf:{folder}@nothing"), ReadOptions(), tmp_path))


def test_spelling() -> None:
    assert HubSet.parse("hf:a/b") == HubSet("a/b", None, "train")
    assert HubSet.parse("hf:a/b:c.zh@test") == HubSet("a/b", "c.zh", "test")
    for wrong in ("hf:", "hf:a/b:c:d", "hf:a@b@c"):
        with pytest.raises(UserError, match="write hf:OWNER/NAME"):
            HubSet.parse(wrong)
