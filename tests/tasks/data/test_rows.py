"""Rows as users have them: read, or counted by what is wrong with them, or refused by name."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from dualroute.errors import UserError
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import divided, read_rows


def rows_of(path: Path | str, **options: Any) -> tuple[list[dict[str, Any]], Problems]:
    problems = Problems()
    return [row for _, row in read_rows(str(path), problems, **options)], problems


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a, 'quoted' \"one\"", "label": "x"}, {"text": "中文", "label": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        'text,label\n"a, \'quoted\' ""one""",x\n中文,y\n', encoding="utf-8-sig", newline="\r\n"
    )
    (tmp_path / "a.tsv").write_text("text\tlabel\na, 'quoted' \"one\"\tx\n中文\ty\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as stream:
        stream.write((tmp_path / "a.jsonl").read_bytes())
    with lzma.open(tmp_path / "b.tsv.xz", "wb") as stream:
        stream.write((tmp_path / "a.tsv").read_bytes())
    files = sorted(tmp_path.iterdir())
    for file in files:
        assert rows_of(file)[0] == rows, file.name
    folder, problems = rows_of(tmp_path)
    assert folder == rows * len(files)
    assert problems.rows == len(folder)
    assert rows_of(tmp_path, limit=3)[0] == folder[:3]


def test_conll_and_squad_become_rows(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("-DOCSTART- O\n\nBonn\tB-loc\n is\tO\n\n\nno\tO\n", encoding="utf-8")
    assert rows_of(tmp_path / "a.conll")[0] == [
        {"tokens": ["Bonn", " is"], "tags": ["B-loc", "O"]},
        {"tokens": ["no"], "tags": ["O"]},
    ]
    squad = {
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": "c d",
                        "qas": [{"id": 1, "question": "q", "answers": [{"text": "d", "answer_start": 2}]}],
                    }
                ],
            },
            {"title": "broken"},
        ]
    }
    (tmp_path / "b.json").write_text(json.dumps(squad), encoding="utf-8")
    found, problems = rows_of(tmp_path / "b.json")
    assert found[0]["context"] == "c d"
    assert found[0]["answers"] == [{"text": "d", "answer_start": 2}]
    assert problems.counts == {"no paragraphs with questions": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "squad.json"])
def test_half_a_character_that_json_spells_is_a_row_left_out(name: str, tmp_path: Path) -> None:
    """``\\ud83d`` alone reads as a text that no tokenizer and no file takes."""
    texts = ["whole \U0001f600", "half \ud83d"]
    if name == "squad.json":
        paragraphs = [{"context": text, "qas": [{"id": "1", "question": "q"}]} for text in texts]
        said = json.dumps({"data": [{"paragraphs": paragraphs}]})
    else:
        rows = [{"context": text} for text in texts]
        said = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(said, encoding="utf-8")
    read, problems = rows_of(tmp_path / name)
    assert [row["context"] for row in read] == texts[:1]
    assert (problems.rows, list(problems.counts)) == (2, ["half a character (a surrogate alone)"])


@pytest.mark.parametrize(
    ("name", "content", "good", "reasons"),
    [
        ("a.tsv", b"x\ty\n1\t2\n1\n1\t2\t3\n4\t5\n", 2, {"1 fields where", "3 fields where"}),
        ("a.csv", b"x,y\n1,2\n\xff,3\n", 1, {"not UTF-8"}),
        (
            "a.jsonl",
            b'{"x": 1}\nnonsense\n[1]\n\n{"x": \xff}\n{"x": 2}',
            2,
            {"no JSON", "not UTF-8", "no JSON object"},
        ),
        ("a.jsonl", b'{"x": 1}\n' + b"[" * 100_000 + b"\n", 1, {"no JSON"}),
        ("a.conll", b"a O\nb\n\nc O\n", 1, {"lines of different numbers"}),
    ],
)
def test_malformed_rows_are_counted_by_reason_and_place(
    name: str, content: bytes, good: int, reasons: set[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    found, problems = rows_of(tmp_path / name)
    assert len(found) == good
    assert problems.rows == good + problems.bad
    assert len(problems.counts) == len(reasons)
    assert all(any(said.startswith(reason) for said in problems.counts) for reason in reasons)
    assert all(f"{name}:" in place for places in problems.places.values() for place in places)
    with pytest.raises(UserError, match=r"data\.max_bad_rows"):
        problems.refuse_above(0.01, name)
    problems.refuse_above(1.0, name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"x,x\n1,2\n", "two columns called 'x'"),
        ("a.weights", b"x", "is not known"),
        ("a.json", b'{"x": 1}', "no list of rows"),
        ("a.json", b"{", "no JSON"),
        ("a.parquet", b"PAR1 nonsense", "cannot be read as parquet"),
        ("a.jsonl.gz", b"nonsense", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / name)
    assert name in str(caught.value)


def test_a_parquet_text_that_is_no_utf8_names_its_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array([b"a\xff"], pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet"):
        rows_of(tmp_path / "a.parquet")


def test_a_path_that_is_not_there_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv is not there"):
        rows_of(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="holds no file of rows"):
        rows_of(tmp_path)


def test_a_name_on_the_hub_is_asked_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("no route to the hub\nmore")
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of("somebody/reviews#test", hub_config="small")[0] == [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": None},
    ]
    assert asked == [("somebody/reviews", "small", "test")]
    with pytest.raises(UserError, match=r"'nobody/nothing' on the Hugging Face hub.*no route"):
        rows_of("nobody/nothing")


def test_the_division_is_by_content_and_keeps_groups_together() -> None:
    rows = [(str(k), {"text": f"{k % 500}", "document": k % 500 % 7}) for k in range(1000)]
    train, validation = divided(rows, 0.2, None)
    assert 120 < len(validation) < 280
    assert not {row["text"] for _, row in train} & {row["text"] for _, row in validation}  # equal rows
    assert divided(rows[::-1], 0.2, None)[1] == validation[::-1]
    train, validation = divided(rows, 0.5, "document")
    assert not {row["document"] for _, row in train} & {row["document"] for _, row in validation}
    assert validation
    with pytest.raises(UserError, match=r"data\.group is 'page'"):
        divided(rows, 0.2, "page")
