"""Chats as documents: `--chats`."""

from __future__ import annotations

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cleaning.stage import Cleaner, CleaningOptions
from data_prep.prepare import prepare
from data_prep.readers.chats import NoChat, NoMessages, chat_text, rewritten, said_in
from data_prep.readers.documents import Document
from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }} t{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant t{% endif %}"
)


def chat(number: int) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": f"Question {number}\r\nof a <s> user, known as bob{number}@corp.com?",
        },
        {"role": "assistant", "content": f"he answer {number}."},
    ]


@pytest.fixture
def tokenizer(config, tmp_path: Path) -> Tokenizer:
    """One with a chat template beside it."""
    made = prepare(config(output=str(tmp_path / "texts")))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(made.tokenizer_path, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture
def chats(config, tokenizer, tmp_path: Path):
    """Make a set of chats."""

    def make(corpus: Path, output: str, **settings: Any) -> Manifest:
        place = str(tmp_path / output)
        return prepare(
            config(
                corpus=str(corpus), output=place, chats=True, tokenizer=str(tokenizer.path), val_fraction=0.2,
                **{"text_key": "messages", **settings},
            )
        )  # fmt: skip

    return make


def documents(manifest: Manifest) -> dict[str, list[int]]:
    """Ids of each document, by its name."""
    found = {}
    for shard in [shard for split in manifest.splits.values() for shard in split.shards]:
        with tarfile.open(manifest.folder / shard.file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".json"):
                ids = np.load(BytesIO(members[name.replace(".json", ".npy")]))
                found[json.loads(data)["source"]] = ids.tolist()
    return found


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_are_those_that_training_on_chats_gives(chats, tokenizer, tmp_path: Path) -> None:
    corpus = written(tmp_path / "c.jsonl", [{"messages": chat(number)} for number in range(40)])
    manifest = chats(corpus, "out")
    found = documents(manifest)
    assert len(found) == 40
    clean = [{**message, "content": message["content"].replace("\r", "")} for message in chat(7)]
    expected = tokenizer.chat(clean).ids
    assert found["c.jsonl:8"] == expected
    assert tokenizer.chat(clean, answers=False).ids != expected  # whose answer is not cut from its prompt
    assert expected[0] == tokenizer.bos_id
    assert expected[-1] == tokenizer.eos_id
    assert expected.count(tokenizer.bos_id) == 2  # a message that spells one stays text
    # the template stays with the set, wherever it goes
    moved = shutil.move(manifest.folder, tmp_path / "moved")
    again = Manifest.load(moved)
    assert again.tokenizer.opened(again.folder).settings.chat_template == TEMPLATE


def test_columns_csv_and_json_hold_the_same_chats(chats, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": chat(number)} for number in range(30)]
    lines = chats(written(tmp_path / "c.jsonl", rows), "lines")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    csv = "messages\n" + "".join(
        '"{}"\n'.format(json.dumps(row["messages"]).replace('"', '""')) for row in rows
    )
    (tmp_path / "c.csv").write_text(csv)
    expected = sorted(documents(lines).values())
    for name in ("c.parquet", "c.csv"):
        assert sorted(documents(chats(tmp_path / name, f"of {name}")).values()) == expected


def test_what_is_no_chat_is_counted_and_another_column_refused(chats, tmp_path: Path) -> None:
    bad: list[Any] = [
        chat(0)[::-1],
        [{"role": "narrator", "content": "x"}],
        [{"role": "umpire", "content": "x"}],
        [*chat(0), {"role": "system", "content": "late"}],
        [{"role": "user", "content": 5}],
        [*chat(1), chat(1)[1]],
        [],
    ]
    rows = [{"messages": value, "id": 3} for value in [*bad, None, *map(chat, range(20))]]
    corpus = written(tmp_path / "c.jsonl", rows)
    dropped = chats(corpus, "out").preparation["dropped"]
    assert dropped == {
        "empty": 1,
        "turns of one side joined (kept)": 1,
        "no chat: messages is the assistant's": 1,
        "no chat: a message of an unknown role": 2,
        "no chat: a message of the system that is not the first one": 1,
        "no chat: the content of a message is no text": 1,
        "no chat: no messages": 1,
    }
    for key, message in (("id", "'id' is int, not the messages of a chat"), ("text", "no key 'text'")):
        with pytest.raises(UserError, match=message):
            chats(corpus, key, text_key=key)
    (tmp_path / "c.txt").write_text("no chat at all")
    with pytest.raises(UserError, match="plain text"):
        chats(tmp_path / "c.txt", "text")
    with pytest.raises(NoMessages, match="no JSON"):
        chat_text("hello")
    with pytest.raises(NoChat, match="a message is no table"):
        chat_text(["hello"])


def test_rules_that_are_made_for_texts_are_refused(config, chats, tokenizer, tmp_path: Path) -> None:
    corpus = written(tmp_path / "c.jsonl", [{"messages": chat(0)}])
    for settings, message in (
        ({"quality": ["gopher"]}, "quality"),
        ({"decontaminate_action": "passage"}, "decontaminate_action passage"),
        ({"separator": "x", "counterfactual": ["english"]}, "counterfactual, separator"),
    ):
        with pytest.raises(UserError, match=f"^{message}: made for texts, not for chats"):
            chats(corpus, "out", **settings)
    with pytest.raises(UserError, match="chats needs the tokenizer"):
        prepare(config(corpus=str(corpus), text_key="messages", chats=True))


def test_cleaning_looks_at_what_is_said(tmp_path: Path) -> None:
    text, _ = chat_text(chat(3))
    assert said_in(text) == ("Question 3\nof a <s> user, known as bob3@corp.com?\nhe answer 3.")
    # in the JSON a letter of the line break stands before the address
    address, _ = chat_text([{"role": "user", "content": "write to\nbob@corp.com"}])
    cleaner = Cleaner(CleaningOptions(scrub=("email",), chats=True))
    outcomes, _ = cleaner.clean([Document("one", address)])
    assert json.loads(outcomes[0].text)[0]["content"] == "write to\nemail@example.com"
    assert outcomes[0].counts == {"email replaced": 1}
    shared = chat_text([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
    assert shared == chat_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert json.loads(rewritten(str.upper, shared[0]))[1]["content"] == "B"
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text("one two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    cleaner = Cleaner(CleaningOptions(decontaminate=(str(evaluation),), chats=True))
    words = evaluation.read_text().replace(" seven ", "\nseven ")  # no run of 13 words with "nseven" in it
    outcomes, _ = cleaner.clean([Document("it", chat_text([{"role": "user", "content": words}])[0])])
    assert outcomes[0].why == "contaminated"


def test_near_duplicates_are_found_by_what_is_said(chats, tmp_path: Path) -> None:
    said = [" ".join(f"word{number}x{place}" for place in range(60)) for number in range(20)]
    rows = [[{"role": "user", "content": text}] for text in said]
    rows += [[{"role": "user", "content": text + " more"}] for text in said[:3]]
    corpus = written(tmp_path / "c.jsonl", [{"messages": row} for row in rows])
    manifest = chats(corpus, "out", near_duplicates=True)
    assert sum(split.documents for split in manifest.splits.values()) == 20
    assert manifest.preparation["dropped"] == {"near_duplicate": 3}
