"""What stands beside a tokenizer: read from a Hugging Face folder, written beside a checkpoint's."""

from __future__ import annotations

import json
import pickle

import pytest

from data_prep.train_tokenizer import train_tokenizer
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import GENERATION, SETTINGS, TEMPLATE, TokenizerSettings, read_settings
from dualroute.errors import UserError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(["some words\n"] * 50, 285, reserved_tokens=4))
    return path


def test_what_a_folder_says(path):
    assert not Tokenizer(path).settings
    assert Tokenizer(path).eos_ids == (2,)
    (path.parent / SETTINGS).write_text(
        json.dumps({"eos_token": {"content": "<reserved_1>"}, "chat_template": "old", "bos_token": None})
    )
    (path.parent / GENERATION).write_text(json.dumps({"eos_token_id": [6, 2, 5]}))
    tokenizer = Tokenizer(path)
    assert tokenizer.settings == TokenizerSettings("old", {"eos_token": "<reserved_1>"}, (6, 2, 5))
    assert tokenizer.eos_id == 2  # a document of the training data
    assert tokenizer.eos_ids == (2, 5, 6)
    (path.parent / TEMPLATE).write_text("new")
    tokenizer = Tokenizer(path)
    assert tokenizer.settings.chat_template == "new"
    assert pickle.loads(pickle.dumps(tokenizer)).settings == tokenizer.settings
    assert not Tokenizer(path, TokenizerSettings()).settings
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (path.parent / TEMPLATE).unlink()
    (path.parent / SETTINGS).write_text(json.dumps({"chat_template": named}))
    assert read_settings(path).chat_template == "b"


def test_what_is_written_is_read_again(tmp_path):
    settings = TokenizerSettings("{{ '水' }}\n", {"bos_token": "<s>", "eos_token": "</s>"}, (7, 9))
    (tmp_path / SETTINGS).write_bytes(settings.to_bytes())
    assert read_settings(tmp_path / "tokenizer.model") == settings


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (SETTINGS, b"[]", "is no table of keys and values"),
        (SETTINGS, b"{", "is damaged"),
        (SETTINGS, b'{"chat_template": 5}', "chat_template is '5': a jinja template is needed"),
        (GENERATION, b'{"eos_token_id": ["x"]}', r"eos_token_id is \['x'\]: token ids are needed"),
        (TEMPLATE, b"\xff\xfe", "is not UTF-8 text"),
        (TEMPLATE, b"x" * (1 << 20 | 1), "longer than the"),
        (
            SETTINGS,
            json.dumps({"chat_template": "x" * (1 << 20 | 1)}).encode(),
            "chat_template has 1,048,577",
        ),
    ],
)
def test_damaged_files_are_named(path, name, content, said):
    (path.parent / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{said}") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)
