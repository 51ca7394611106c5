"""Which tokens are hidden: so many, whole words, the same in every process, and how words are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.masking import Masking, WordPieces, hidden_tokens, mask_id
from dualroute.data.module import ShardDataModule
from dualroute.data.reader import IGNORE_INDEX, ShardReader, WindowDataset
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError


class Stand:
    """What of a tokenizer is asked here."""

    path = Path("given")

    def __init__(self, pieces: list[str], **ids: int) -> None:
        self._pieces = pieces
        for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
            setattr(self, name, ids.get(name, -1))

    def pieces(self) -> list[str]:
        return self._pieces


def module(folder: Path, **changes: Any) -> ShardDataModule:
    options = {"context": 64, "micro_batch": 2, "tokens_per_batch": 256, "mask_share": 0.3, **changes}
    return ShardDataModule(folder, **options)


def batches(data: ShardDataModule, count: int) -> list[dict[str, Any]]:
    return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


def test_labels_are_what_was_hidden_and_their_number_is_known_before(tiny_dataset: Path) -> None:
    data, plain = module(tiny_dataset), module(tiny_dataset, mask_share=None)
    mask, tokenizer = data.masking.mask_id, Tokenizer(tiny_dataset / "tokenizer.model")
    assert mask == tokenizer.unk_id  # it reserves none
    seen = 0
    for batch, whole in zip(batches(data, 6), batches(plain, 6), strict=True):
        hidden = batch["labels"] != IGNORE_INDEX
        assert hidden.sum(1).tolist() == [hidden_tokens(64, 0.3)] * 2
        assert int(batch["num_targets"]) == 4 * hidden_tokens(64, 0.3)
        assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), whole["input_ids"])
        assert (batch["input_ids"][hidden] == mask).all()
        assert not (batch["input_ids"][~hidden] == mask).any()
        assert not torch.isin(batch["labels"], torch.tensor([tokenizer.bos_id, tokenizer.eos_id])).any()
        for key in ("segment_ids", "positions"):
            assert torch.equal(batch[key], whole[key])
        seen += int(hidden.sum())
    assert seen


def test_masks_do_not_depend_on_ranks_workers_or_stops(tiny_dataset: Path) -> None:
    whole = batches(module(tiny_dataset, micro_batch=4), 4)
    for data, skip in ((module(tiny_dataset, num_workers=2), 0), (module(tiny_dataset), 2)):
        data.samples_consumed = 4 * skip
        halves = batches(data, 2 * (4 - skip))
        for number, batch in enumerate(whole[skip:]):
            parts = halves[2 * number : 2 * number + 2]
            for key in ("input_ids", "labels"):
                assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
    other = batches(module(tiny_dataset, micro_batch=4, seed=1), 1)[0]
    assert not torch.equal(other["labels"], whole[0]["labels"])


def test_an_epoch_has_other_masks_and_validation_always_the_same(tiny_dataset: Path) -> None:
    data = module(tiny_dataset)
    window = data.sources[0].masked(WindowDataset(ShardReader(data.manifest, "train"), data.plan))
    first = window[0]
    assert np.array_equal(window[0]["labels"], first["labels"])
    segments, ids = first["segment_ids"], np.where(first["labels"] < 0, first["input_ids"], first["labels"])
    shown = [
        data.masking.hidden(ids, segments, split, n) for split, n in (("train", 0), ("train", 1), ("val", 0))
    ]
    assert np.array_equal(shown[0], first["labels"] != IGNORE_INDEX)
    assert not np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], shown[2])
    once, again = (list(module(tiny_dataset, seed=0).val_dataloader()) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert int((one["labels"] != IGNORE_INDEX).sum()) == int(one["num_targets"])


PIECES = [
    "<pad>",
    "<s>",
    "</s>",
    "<mask>",
    "\u2581wal",
    "king",
    "\u2581on",
    ",",
    "\n",
    "ice",
    "\u4e2d",
    "<0xE4>",
]
PIECES += ["<0xBD>", "<0x0A>", "\u2581", "er", "<0xC3>"]
STAND = Stand(PIECES, pad_id=0, bos_id=1, eos_id=2)


def words_of(spelled: list[str], segments: list[int] | None = None, stand: Stand = STAND) -> list[int]:
    ids = np.array([stand.pieces().index(piece) for piece in spelled])
    of = np.ones(len(ids), dtype=np.int64) if segments is None else np.array(segments)
    return WordPieces.of(stand).words(ids, of).tolist()  # type: ignore[arg-type]


def test_words_are_set_apart_by_spaces_punctuation_and_scripts_without_spaces() -> None:
    assert words_of(["\u2581wal", "king", "\u2581on", ",", "ice", "er"]) == [0, 0, 1, 2, 3, 3]
    assert words_of(["\u2581on", "\n", "ice", "<0x0A>", "ice"]) == [0, 1, 2, 3, 4]
    assert words_of(["<s>", "ice", "</s>", "<s>", "er"]) == [0, 1, 2, 3, 4]
    assert words_of(["\u2581on", "\u4e2d", "\u4e2d", "<0xE4>", "<0xBD>", "<0xBD>"]) == [0, 1, 2, 3, 3, 3]
    assert words_of(["\u2581on", "<0xC3>", "<0xBD>", "er"]) == [0, 0, 0, 0]
    assert words_of(["\u2581on", "er", "er"], [1, 1, 2]) == [0, 0, 1]
    cjk = "\u00e4\u00b8\u0143"  # the bytes E4 B8 AD
    gpt2 = Stand(["<unk>", "\u0120wal", "king", "\u010a", "a", cjk, ","], unk_id=0)
    spelled = ["\u0120wal", "king", "\u010a", "a", cjk, cjk, ","]
    assert words_of(spelled, stand=gpt2) == [0, 0, 1, 2, 3, 4, 5]
    bert = Stand(["[MASK]", "wal", "##king", ","])
    assert words_of(["wal", "##king", ",", "wal"], stand=bert) == [0, 0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(17)), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(0, 9))
def test_always_so_many_and_no_word_in_part_but_one(ids: list[int], share: float, padding: int) -> None:
    tokens = np.array([*ids, *[0] * padding])
    segments = np.array([*[1] * len(ids), *[0] * padding])
    made = Masking.of(STAND, share, "data", 3)  # type: ignore[arg-type]
    hidden = made.hidden(tokens, segments, "train", 5)
    assert int(hidden.sum()) == hidden_tokens(len(ids), share)
    assert not hidden[len(ids) :].any()
    words, special = made.words.words(tokens, segments)[: len(ids)], made.words.special[tokens[: len(ids)]]
    taken = hidden[: len(ids)]
    cut = [word for word in set(words) if 0 < taken[words == word].sum() < (words == word).sum()]
    assert len(cut) <= 1
    if taken[special].any():  # all of the text came first
        assert taken[~special].all()


def test_every_word_is_hidden_equally_often() -> None:
    ids = np.array(
        [PIECES.index(piece) for piece in ["\u2581on", "\u2581wal", "king", ",", "ice", "\n"] * 10]
    )
    made = Masking.of(STAND, 0.3, "data", 0)  # type: ignore[arg-type]
    shares = np.mean([made.hidden(ids, np.ones(60), "train", n) for n in range(800)], axis=0)
    assert abs(shares.mean() - 0.3) < 1e-9
    assert shares.min() > 0.22
    assert shares.max() < 0.38


@pytest.mark.parametrize(
    ("pieces", "ids", "wanted"),
    [
        (["a", "[MASK]", "<reserved_0>"], {}, 1),
        (["<pad>", "<unk>", "<reserved_0>", "<reserved_1>", "a"], {"pad_id": 0, "unk_id": 1}, 3),
        (["a", "<|reserved_special_token_0|>", "<|reserved_special_token_7|>"], {}, 2),
        (["<pad>", "<unk>", "a"], {"pad_id": 0, "unk_id": 1}, 1),
        (["<pad>", "<s>", "a"], {"pad_id": 0, "bos_id": 1}, 0),
    ],
)
def test_what_stands_for_a_hidden_token(pieces: list[str], ids: dict[str, int], wanted: int) -> None:
    assert mask_id(Stand(pieces, **ids)) == wanted  # type: ignore[arg-type]


def test_a_tokenizer_without_one_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"tokenizer given has no id for a masked token"):
        mask_id(Stand(["a", "</s>"], eos_id=1, pad_id=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float, tiny_dataset: Path) -> None:
    with pytest.raises(UserError, match="mask_share must be above 0"):
        module(tiny_dataset, mask_share=share)
