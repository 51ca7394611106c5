"""Texts told of the other gender: pronouns, names and titles agree, in English and Chinese."""

import pytest

from data_prep.clean import Selection, select
from data_prep.counterfactual import Swaps, with_counterfactuals
from data_prep.prepare import PrepareConfig, prepare
from data_prep.readers.documents import Document
from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

PAIRS = [
    ("John took his coat; he was alone.", "Mary took her coat; she was alone."),
    ("Mary saw him, and HER FATHER saw her.", "John saw her, and HIS MOTHER saw him."),
    ("She gave her the book that was hers.", "He gave him the book that was his."),
    ("“Mr Smith’s wife,” he said to her.", "“Mrs Smith’s husband,” she said to him."),
    ("The king's sons told her to wait; other here.", "The queen's daughters told him to wait; other here."),
    ("She's herself.", "He's himself."),
]
CHINESE = [
    ("他的爸爸说：小明和其他男孩都来了。", "她的妈妈说：小红和其他女孩都来了。"),
    ("她们是姐妹，他弹吉他。", "他们是兄弟，她弹吉他。"),
]


@pytest.mark.parametrize(("text", "swapped"), PAIRS + CHINESE)
def test_words_agree_and_come_back(text, swapped):
    swaps = Swaps(["english", "chinese"])
    assert swaps.swap(text) == swapped
    assert swaps.swap(swapped) == text


def test_a_text_without_such_words_stays_as_it_is():
    text = "The theme of Hershey is shepherding; 其他人。\n\n  x"
    assert Swaps(["english", "chinese"]).swap(text) == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("he she", "is no rule"),
        ("a b <-> c", "is no rule"),
        ("he <-> she | before *", "a condition goes with -> alone"),
        ("he -> she\nhe -> her", "an earlier rule takes every 'he'"),
        ("他 -> 她 | before *", "has no word behind '他'"),
        ("他 -> 她\n他 -> 它", "is swapped already"),
        ("# nothing", "there is no rule in it"),
    ],
)
def test_a_line_that_is_no_rule_is_named(tmp_path, line, said):
    path = tmp_path / "list.txt"
    path.write_text(line)
    with pytest.raises(UserError, match=said):
        Swaps([str(path)])


def test_only_the_training_side_is_told_anew():
    texts = [Document(f"{number}", f"he saw bird {number}") for number in range(40)]
    texts.append(Document("stone", "a stone"))
    chosen = list(select(texts, Selection(val_fraction=0.3), {}))
    held_out = [document for document in chosen if document.split == "val"]
    assert 0 < len(held_out) < 30
    added = list(with_counterfactuals(chosen, Swaps(["english"]), "add"))
    changed = [document for document in added if document.name.endswith("#counterfactual")]
    assert len(changed) == len([d for d in chosen if d.split == "train" and d.text.startswith("he")])
    assert all(document.text.startswith("she") and document.split == "train" for document in changed)
    assert [document for document in added if document.split == "val"] == held_out
    replaced = list(with_counterfactuals(chosen, Swaps(["english"]), "replace"))
    assert len(replaced) == len(chosen)
    share = sum(document.text.startswith("she") for document in replaced) / len(changed)
    assert 0.2 < share < 0.8


def test_a_data_set_holds_both(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"he saw the old bird number {number} " * 20)
    swaps = tmp_path / "own.txt"
    swaps.write_text("he <-> she\n")

    def made(name, **options):
        config = PrepareConfig(
            str(tmp_path / "corpus"), str(tmp_path / name), vocab_size=300, reserved_tokens=0,
            val_fraction=0.2, progress=False, **options,
        )  # fmt: skip
        return prepare(config)

    plain, both = made("plain"), made("both", counterfactual=[str(swaps)])
    assert both.split("train").documents == 2 * plain.split("train").documents
    assert both.split("val").documents == plain.split("val").documents
    assert Tokenizer(both.folder / "tokenizer.model").encode("she")
    assert made("both", counterfactual=[str(swaps)]).fingerprint == both.fingerprint
    swaps.write_text("he <-> it\n")
    with pytest.raises(UserError, match="prepared with other options"):
        made("both", counterfactual=[str(swaps)])
    assert Manifest.load(both.folder).preparation["options"]["counterfactual_mode"] == "add"
