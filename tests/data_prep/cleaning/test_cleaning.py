"""Rules, languages, evaluation sets and personal data, document by document."""

from __future__ import annotations

import json
import random
import time

import pytest

pytest.importorskip("datatrove", reason="cleaning needs the extra prepare")
pytest.importorskip("rjieba", reason="cleaning needs the extra prepare")

from data_prep.cleaning.contamination import Contamination
from data_prep.cleaning.language import language_of, require_languages
from data_prep.cleaning.quality import RULES, judge
from data_prep.cleaning.scrub import KINDS, scrub
from data_prep.cleaning.stage import Cleaner, CleaningOptions
from data_prep.cleaning.words import sentence_spans, words_of
from data_prep.readers.documents import Document
from dualroute.errors import UserError

ENGLISH = """The river had been rising since the morning, and by noon the lower fields were under water.
Nobody in the village could remember a spring like that one, but the older people said it would pass.
They carried the furniture to the upper floors and waited with their children at the windows.
In the evening a boat came down from the mill, and the miller told them that the dam was safe.
After that they slept, for the first time in three days, and the rain stopped before the sun rose.
"""
CHINESE = """这条河从早上开始就一直在上涨，到了中午，低处的田地已经被水淹没了。
村里没有人记得有过这样的春天，但是年纪大的人说，很快就会过去的。
他们把家具搬到楼上，和孩子们一起在窗边等待，希望雨能够早一点停下来。
傍晚的时候，一条船从磨坊那边开了过来，磨坊主人告诉他们，大坝是安全的。
在那之后，他们三天以来第一次睡着了，太阳升起之前，雨终于停了。
"""
CODE = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\n"


def fault(text: str, *rules: str, name: str = "x.txt", language: str | None = None) -> str | None:
    return judge(text, name, rules or RULES, language)[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_good_text_passes_every_rule(text) -> None:
    assert judge(text, "x.txt", RULES, None) == (text.strip(), None)


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("Too few words here.", "gopher", "gopher: short_doc"),
        ("短文。", "gopher", "gopher: short_doc"),
        (ENGLISH.replace(" ", " # "), "gopher", "gopher: too_many_hashes"),
        ("".join(f"- {line}\n" for line in ENGLISH.splitlines()), "gopher", "gopher: too_many_bullets"),
        ("Lorem words dolor sit amet vero eos " * 20, "gopher", "gopher: enough_stop_words"),
        (ENGLISH * 3, "gopher_repetition", "gopher_repetition: dup_line_frac"),
        (CHINESE * 3, "gopher_repetition", "gopher_repetition: dup_line_frac"),
        (ENGLISH + "Use { and } in the text.\n", "c4", "c4: curly_bracket"),
        (CHINESE + "Lorem ipsum dolor sit amet.\n", "c4", "c4: lorem_ipsum"),
        ("One line. Two words.", "c4", "c4: too_few_sentences"),
        (
            "\n".join(["no mark at the end of a line that is long enough"] * 3),
            "fineweb",
            "fineweb: line_punct_ratio",
        ),
        ("\n".join(f"短行{n}。" for n in range(40)), "fineweb", "fineweb: short_line_ratio"),
    ],
)
def test_each_rule_drops_what_it_is_for(text, rule, expected) -> None:
    assert fault(text, rule) == expected


def test_c4_keeps_lines_with_marks_of_any_script() -> None:
    menu = "Home | About | Contact\n"
    for text in (ENGLISH.replace("passed.", "passed.”"), CHINESE.replace("安全的。", "安全的。”")):
        assert judge(menu + text + menu, "x", ("c4",), None) == (text.strip(), None)


def test_stop_words_are_not_asked_of_other_languages() -> None:
    german = "Der Fluss stieg seit dem Morgen, und am Mittag standen die unteren Felder unter Wasser. " * 5
    assert fault(german, "gopher") == "gopher: enough_stop_words"
    assert fault(german, "gopher", language="de") is None


def test_source_code_has_rules_of_its_own() -> None:
    assert fault(CODE, name="a.tar!b/x.py") is None
    assert fault(CODE, name="x.txt") is not None
    assert fault("x = 1\n" + "y" * 2000, name="x.py") == "code: long_line"
    assert fault("!!! ((( )))\n" * 9, name="x.c:3") == "code: few_letters"


def test_words_need_no_spaces() -> None:
    assert words_of("我们今天去公园。") == ["我们", "今天", "去", "公园", "。"]
    assert words_of("Don't e-mail 3.14!") == ["Don't", "e-mail", "3.14", "!"]
    assert [
        text for start, end in sentence_spans("你好。A b! C d") if (text := "你好。A b! C d"[start:end])
    ] == ["你好。", "A b!", " C d"]


def test_languages_come_without_a_download() -> None:
    assert language_of(ENGLISH, "x.txt")[0] == "en"
    assert language_of(CHINESE, "x.txt")[0] == "zh"
    assert language_of(ENGLISH, "x.py") == ("code", 1.0)
    with pytest.raises(UserError, match="languages: 'english' is not known; did you mean 'en'"):
        require_languages(["english"])


@pytest.fixture
def evaluation(tmp_path):
    rows = [
        {
            "question": "Which animal was carried to the upper floor of the old mill "
            "by the miller and his daughter?"
        },
        {"问题": ["太阳升起之前，村里的人们把所有的家具都搬到了楼上，然后在窗边等待了三天三夜。", "雨"]},
        {"question": "Too short?"},
    ]
    path = tmp_path / "evaluation" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stretches_of_evaluation_sets_are_found_and_cut(evaluation) -> None:
    contamination = Contamination([str(evaluation.parent)], 13)
    assert (contamination.examples, contamination.too_short) == (3, 1)
    assert contamination.hits(ENGLISH + CHINESE) == []
    english = (
        "He asked: which animal was CARRIED to the upper\n floor of the old mill, by the miller and another?"
    )
    chinese = "有人说，太阳升起之前，村里的人们把所有的家具都搬到了楼上然后在窗边。"
    text = f"first\n{english}\nmiddle\n{chinese}\nlast"
    hits = contamination.hits(text)
    assert [hit.example for hit in hits] == ["test.jsonl:1", "test.jsonl:2"]
    assert contamination.without(text, hits) == "first\nmiddle\nlast"
    assert contamination.hits(english.replace("old", "new")) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "no such file"), ("empty", "holds no text"), ("short.txt", "none of 1 texts has 13 words")],
)
def test_evaluation_sets_that_cannot_be_used(path, message, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("two words")
    with pytest.raises(UserError, match=f"decontaminate.*{message}"):
        Contamination([str(tmp_path / path)], 13)


def test_a_document_goes_or_a_passage(evaluation) -> None:
    text = (
        ENGLISH + "Which animal was carried to the upper floor of the old mill by the miller and his son?\n"
    )
    for action, stays in (("document", None), ("passage", ENGLISH)):
        cleaner = Cleaner(CleaningOptions(decontaminate=(str(evaluation),), decontaminate_action=action))
        (outcome,), _ = cleaner.clean([Document("x", text)])
        assert (outcome.why, outcome.text) == (("contaminated", text) if stays is None else (None, stays))
        assert outcome.hit["of"] == ["test.jsonl:1"]
        assert outcome.hit["first"].startswith("Which animal was carried")


def test_personal_data_gives_way() -> None:
    text = (
        "Mail john.doe+x@mail.example.co.uk or 王@b.cn。联系13812345678，010-62345678, +49 (0)89 123456, "
        "(212) 555-1234; 8.8.8.8 and 2606:4700:4700::1111."
    )
    clean, counts = scrub(text, KINDS)
    assert counts == {"email": 1, "phone": 4, "ip": 2}
    assert not any(value in clean for value in ("doe", "138", "6234", "123456", "1234", "8.8", "4700"))
    assert scrub(clean, KINDS) == (clean, {})
    assert scrub(text, ("ip",))[1] == {"ip": 2}


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1 127.0.0.1", "version 1.2.3 or 1.2.3.4.5", "12:30:45", "std::vector a::b", "2026-11-29",
     "1,234,567.89", "@property", "a @ b", "ISBN 978-3-16-148410-0", "3.14159265358979", "print(f'{x:>10}')"],
)  # fmt: skip
def test_what_is_no_personal_data_stays(text) -> None:
    assert scrub(text, KINDS) == (text, {})


@pytest.mark.parametrize("unit", ["a", "a@", "1", "1.2.", ":", "2001:", "+1 ", "1-", "a.b-", "(1", "@"])
def test_time_grows_with_the_text(unit) -> None:
    times = []
    for size in (50_000, 400_000):
        text = unit * (size // len(unit))
        start = time.process_time()
        scrub(text, KINDS)
        times.append(time.process_time() - start)
    assert times[1] < 30 * max(times[0], 0.02)  # eight times the text; the square would be 64


def test_outcomes_do_not_depend_on_what_else_is_cleaned() -> None:
    texts = [ENGLISH, CHINESE, CODE, "short", ENGLISH * 3, "mail a@b.org " + ENGLISH]
    documents = [Document(f"{number}.txt", text) for number, text in enumerate(texts)]
    options = CleaningOptions(languages=("en", "zh"), quality=RULES, scrub=KINDS)
    cleaner = Cleaner(options)
    together = {outcome.name: outcome for outcome in cleaner.clean(documents)[0]}
    random.Random(0).shuffle(documents)
    for document in documents:
        assert cleaner.clean([document])[0] == [together[document.name]]
    assert together["0.txt"].why is None
    assert together["0.txt"].language == "en"
    assert together["5.txt"].counts["email replaced"] == 1
