"""The order is the same for every division of the work; a run that stops goes on where it was."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_utilities.core.apply_func import apply_to_collection

from dualroute.attention.core.layout import Layout, LayoutPlan
from dualroute.data import verify as verify_under_test
from dualroute.data.manifest import Manifest, verify_shards
from dualroute.data.module import ShardDataModule
from dualroute.data.reader import IGNORE_INDEX, label_rows
from dualroute.data.verify import VERIFIED_FILE, verify_once
from dualroute.errors import UserError
from tests.data.shards import numbered, write_dataset

LENGTHS = [5, 2, 17, 9, 1, 30, 4, 8, 3, 3, 12]  # 94 tokens
CONTEXT, TOKENS_PER_BATCH = 8, 96  # 11 windows an epoch, 12 samples a batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, numbered(LENGTHS), val=numbered([6, 11, 3, 9], first=1000))
    return folder


def datamodule(folder: Path, rank: int = 0, world: int = 1, **kwargs: Any) -> ShardDataModule:
    """A data module on one rank of a pretended group."""
    kwargs = {"context": CONTEXT, "micro_batch": 2, "tokens_per_batch": TOKENS_PER_BATCH, **kwargs}
    data = ShardDataModule(folder, **kwargs)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        lightning_module=SimpleNamespace(automatic_optimization=True),
    )
    data.trainer.accumulate_grad_batches = data.accumulation
    data.setup("fit")
    return data


def stream(folder: Path, steps: int, world: int = 1, start: int = 0, **kwargs: Any) -> list[list[list[int]]]:
    """Per step, the rows (input_ids + labels) of its global batch, in the plan's order."""
    ranks = [datamodule(folder, rank, world, **kwargs) for rank in range(world)]
    for data in ranks:
        data.samples_consumed = start
    loaders = [iter(data.train_dataloader()) for data in ranks]
    result = []
    for _ in range(steps):
        micro = [next(loader) for _ in range(ranks[0].accumulation) for loader in loaders]
        rows = [torch.cat([batch["input_ids"], batch["labels"]], dim=1) for batch in micro]
        result.append(torch.cat(rows).tolist())
    return result


class TestOrder:
    @pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 4), (3, 2), (4, 1)])
    def test_is_the_same_for_every_division(self, folder: Path, world: int, micro_batch: int) -> None:
        assert stream(folder, 4, world, micro_batch=micro_batch) == stream(folder, 4, micro_batch=2)

    def test_is_the_same_for_every_number_of_workers(self, folder: Path) -> None:
        assert stream(folder, 3, num_workers=2) == stream(folder, 3)

    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.tuples(st.integers(1, 3), st.sampled_from([(1, 2), (2, 2), (3, 1), (2, 6)])), max_size=4)
    )
    def test_is_the_same_however_often_it_was_stopped(
        self, folder: Path, legs: list[tuple[int, tuple[int, int]]]
    ) -> None:
        state: dict[str, Any] | None = None
        seen: list[list[list[int]]] = []
        for steps, (world, micro_batch) in legs:
            data = datamodule(folder, 0, world, micro_batch=micro_batch)
            if state is not None:
                data.load_state_dict(json.loads(json.dumps(state)))
            seen += stream(folder, steps, world, start=data.samples_consumed, micro_batch=micro_batch)
            for _ in range(steps):
                data.advance()
            state = data.state_dict()
        assert seen == stream(folder, len(seen))

    def test_another_seed_is_another_order(self, folder: Path) -> None:
        assert stream(folder, 2, seed=1) != stream(folder, 2, seed=0)

    def test_a_loader_asked_again_starts_at_the_samples_consumed(self, folder: Path) -> None:
        data = datamodule(folder)
        loader = data.train_dataloader()
        everything = [batch["input_ids"] for batch in itertools.islice(loader, 18)]
        for _ in range(2):
            data.advance()
        again = [batch["input_ids"] for batch in itertools.islice(loader, 6)]  # a step has 6 micro batches
        assert torch.equal(torch.cat(again), torch.cat(everything[12:]))
        assert data.epoch == pytest.approx(24 / 11)


class Recorder(pl.LightningModule):
    """Trains one number, and writes down which tokens each optimizer step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[list[list[int]]] = [[]]
        self.validated: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.steps[-1] += batch["input_ids"].tolist()
        return self.weight * batch["input_ids"].float().mean() / batch["num_targets"]

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated += batch["labels"].tolist()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        data: ShardDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        if (batch_idx + 1) % data.accumulation == 0:
            data.advance()
            self.steps.append([])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, root: Path, max_steps: int, resume: Path | None = None) -> tuple[Recorder, pl.Trainer]:
    trainer = pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=6,
        val_check_interval=12,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder()
    data = ShardDataModule(folder, CONTEXT, micro_batch=2, tokens_per_batch=TOKENS_PER_BATCH)
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=False)
    return recorder, trainer


class TestLightning:
    def test_resume_is_exact(self, folder: Path, tmp_path: Path) -> None:
        whole, _ = fit(folder, tmp_path, max_steps=5)
        assert [len(step) for step in whole.steps] == [12] * 5 + [0]
        first, trainer = fit(folder, tmp_path, max_steps=3)
        trainer.save_checkpoint(tmp_path / "three.ckpt")
        rest, trainer = fit(folder, tmp_path, max_steps=5, resume=tmp_path / "three.ckpt")
        assert first.steps[:3] + rest.steps[:2] == whole.steps[:5]
        assert trainer.datamodule.samples_consumed == 5 * 12  # type: ignore[attr-defined]
        assert whole.validated

    def test_refuses_a_trainer_that_accumulates_another_number(self, folder: Path, tmp_path: Path) -> None:
        data = ShardDataModule(folder, CONTEXT, micro_batch=4, tokens_per_batch=TOKENS_PER_BATCH)
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
        )
        with pytest.raises(UserError, match="accumulate_grad_batches=1, but tokens_per_batch=96 needs 3 "):
            trainer.fit(Recorder(), datamodule=data)


class TestState:
    def test_is_plain_json(self, folder: Path) -> None:
        data = datamodule(folder)
        data.advance()
        assert json.loads(json.dumps(data.state_dict())) == {
            "fingerprint": Manifest.load(folder).fingerprint,
            "seed": 0,
            "context": 8,
            "samples_per_batch": 12,
            "samples_consumed": 12,
        }

    def test_position_survives_another_batch_size(self, folder: Path) -> None:
        state = {**datamodule(folder).state_dict(), "samples_consumed": 36}
        data = datamodule(folder, tokens_per_batch=48)
        data.load_state_dict(state)
        (first, second) = stream(folder, 2, start=data.samples_consumed, tokens_per_batch=48)
        assert first + second == stream(folder, 4)[3]

    @pytest.mark.parametrize(
        ("key", "saved", "opened"),
        [("fingerprint", "'beef'", "'.{64}'"), ("seed", "5", "0"), ("context", "16", "8")],
    )
    def test_of_other_data_is_refused_naming_both(
        self, folder: Path, key: str, saved: str, opened: str
    ) -> None:
        data = datamodule(folder)
        state = {
            **data.state_dict(),
            key: saved.strip("'") if "'" in saved else int(saved),
            "samples_consumed": 99,
        }
        with pytest.raises(UserError, match=rf"data {key} {saved}, but {folder} is opened with {opened}: "):
            data.load_state_dict(state)
        assert data.samples_consumed == 0

    def test_without_a_key_is_refused(self, folder: Path) -> None:
        data = datamodule(folder)
        state = data.state_dict()
        del state["samples_consumed"]
        with pytest.raises(UserError, match="has no 'samples_consumed'"):
            data.load_state_dict(state)

    @pytest.mark.parametrize("key", ["fingerprint", "seed", "context", "samples_consumed", "left_out"])
    @pytest.mark.parametrize(
        "value", [None, True, -1, 1.5, "12", 10**30, [], {}, [[1]], [[5, 2]], [[0, None]]]
    )
    def test_with_a_wrong_value_is_refused_and_changes_nothing(
        self, folder: Path, key: str, value: Any
    ) -> None:
        data = datamodule(folder)
        if (key, value) == ("left_out", []):
            return
        with pytest.raises(UserError) as error:
            data.load_state_dict({**data.state_dict(), "samples_consumed": 24, key: value})
        assert key in str(error.value)
        assert "\n" not in str(error.value)
        assert (data.samples_consumed, data.skipped_samples) == (0, [])


class TestValidation:
    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize(("val_tokens", "targets"), [(None, 25), (16, 15), (9, 8), (10**9, 25)])
    def test_every_target_once_and_equal_counts(
        self, folder: Path, world: int, val_tokens: int | None, targets: int
    ) -> None:
        ranks = [
            list(datamodule(folder, rank, world, val_tokens=val_tokens).val_dataloader())
            for rank in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        labels = torch.cat([batch["labels"] for batches in ranks for batch in batches]).flatten()
        labels = labels[labels != IGNORE_INDEX]
        assert len(set(labels.tolist())) == len(labels) == targets
        for step in zip(*ranks, strict=True):
            count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in step)
            assert {int(batch["num_targets"]) for batch in step} == {count}

    def test_does_not_depend_on_the_position(self, folder: Path) -> None:
        data = datamodule(folder)
        before = [batch["input_ids"].tolist() for batch in data.val_dataloader()]
        data.advance()
        assert [batch["input_ids"].tolist() for batch in data.val_dataloader()] == before

    def test_without_documents_is_refused(self, tmp_path: Path) -> None:
        write_dataset(tmp_path, numbered(LENGTHS))
        with pytest.raises(UserError, match=r"the split 'val' has no documents; .*limit_val_batches=0"):
            datamodule(tmp_path).val_dataloader()

    def test_targets_per_byte(self, folder: Path) -> None:
        assert datamodule(folder).targets_per_byte("val") == pytest.approx(25 / (29 * 3))


class TestRefusals:
    def test_contradicting_arithmetic_before_anything_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nearest valid values"):
            ShardDataModule(tmp_path / "nowhere", context=8, micro_batch=3, tokens_per_batch=100)

    def test_contradicting_world_size_at_setup(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"= 8 \* 4 \* 2 = 64: .* or keep it and set micro_batch=3"):
            datamodule(folder, world=2, micro_batch=4)

    def test_context_longer_than_the_data(self, folder: Path) -> None:
        with pytest.raises(UserError, match="context=95 is longer than the training data of 94 tokens"):
            datamodule(folder, context=95, tokens_per_batch=95, micro_batch=1)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("num_workers", -1), ("num_workers", 10**6), ("verify", "md5")],
    )
    def test_bad_option(self, folder: Path, key: str, value: Any) -> None:
        with pytest.raises(UserError, match=f"^{key} must be"):
            datamodule(folder, **{key: value})

    def test_a_batch_beyond_memory(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"makes more than 16,777,216 samples of 8 tokens: lower it"):
            datamodule(folder, tokens_per_batch=1 << 60)

    def test_a_bad_shard_is_named_from_a_worker_too(self, tmp_path: Path) -> None:
        manifest = write_dataset(tmp_path, numbered(LENGTHS))
        path = manifest.shard_paths("train")[0]
        os.truncate(path, 512)
        with pytest.raises(UserError, match=f"{path}: 512 bytes"):
            stream(tmp_path, 1, num_workers=1)


class TestVerify:
    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Splits that were hashed."""
        calls: list[str] = []

        def spy(manifest: Manifest, split: str, level: Any) -> None:
            if level == "sha256":
                calls.append(split)
            verify_shards(manifest, split, level)

        monkeypatch.setattr(verify_under_test, "verify_shards", spy)
        return calls

    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        return write_dataset(tmp_path, numbered(LENGTHS), val=numbered([4, 4]))

    def test_hashes_once(self, manifest: Manifest, hashed: list[str]) -> None:
        verify_once(manifest, "sha256")
        assert hashed == ["train", "val"]
        verify_once(manifest, "sha256")
        assert hashed == ["train", "val"]

    @pytest.mark.parametrize("change", ["touch", "note"])
    def test_hashes_again_after_a_change(self, manifest: Manifest, hashed: list[str], change: str) -> None:
        verify_once(manifest, "sha256")
        if change == "touch":
            os.utime(manifest.shard_paths("val")[0], ns=(1, 1))
        else:
            (manifest.folder / VERIFIED_FILE).write_text('{"fingerprint"')
        verify_once(manifest, "sha256")
        assert hashed == ["train", "val"] * 2

    def test_a_folder_that_cannot_be_written_is_hashed_each_time(
        self, manifest: Manifest, hashed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path, data: bytes) -> None:
            raise PermissionError(path)

        monkeypatch.setattr(verify_under_test, "write_bytes_atomically", refuse)
        verify_once(manifest, "sha256")
        verify_once(manifest, "sha256")
        assert hashed == ["train", "val"] * 2
        assert not (manifest.folder / VERIFIED_FILE).exists()

    def test_damaged_contents_are_found_and_never_noted(self, manifest: Manifest) -> None:
        path = manifest.shard_paths("train")[1]
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
        data = datamodule(manifest.folder, verify="sha256")
        for _ in range(2):
            with pytest.raises(UserError, match=rf"^{path}: contents differ"):
                data.prepare_data()
        datamodule(manifest.folder, verify="size").prepare_data()

    def test_a_truncated_shard_is_found_even_after_a_note(self, manifest: Manifest) -> None:
        verify_once(manifest, "sha256")
        path = manifest.shard_paths("train")[0]
        os.truncate(path, 100)
        with pytest.raises(UserError, match=rf"^{path}: 100 bytes"):
            verify_once(manifest, "size")


def test_the_loaders_processes_lay_out_the_documents(folder: Path) -> None:
    """And the batch goes to the device as a whole, but for the number that the host divides by."""
    data = datamodule(folder, num_workers=1)
    data.layout_plan = LayoutPlan(2, (1, 2))
    batch = next(iter(data.train_dataloader()))
    expected = Layout.build(2, CONTEXT, 2, batch["segment_ids"], batch["segment_ids"] != 0)
    assert torch.equal(batch["layout"].documents, expected.documents)
    rows = (batch["labels"] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    assert torch.equal(batch["label_rows"], rows)
    # what strategies do to a batch at a lower precision leaves the layout as it is
    converted = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to(torch.bfloat16))
    assert converted["layout"] is batch["layout"]
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["num_targets"].device.type == "cpu"
    assert moved["layout"].stream.device.type == "meta"
    assert {moved[name].device.type for name in ("input_ids", "label_rows", "labels")} == {"meta"}
    assert moved["layout"].stream.split(1)[1].first_blocks().device.type == "meta"


@pytest.mark.parametrize("length", [12, 13])
def test_rows_of_labels_in_a_part_of_each_text_are_those_that_its_rank_finds(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    labels = torch.where(torch.rand(3, length, generator=draw) < 0.5, IGNORE_INDEX, 7)
    width = -(-length // 4)
    padded = torch.nn.functional.pad(labels, (0, 4 * width - length), value=IGNORE_INDEX)
    for rank, own in enumerate(padded.chunk(4, dim=1)):
        expected = (own != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        assert torch.equal(label_rows(labels.numpy(), (rank, 4)), expected)
    assert torch.equal(label_rows(labels.numpy()), (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1))


def test_the_loader_counts_what_it_was_waited_for(folder: Path) -> None:
    data = datamodule(folder)

    def slow(batch: Any) -> dict[str, Any]:
        time.sleep(0.02)
        return {}

    data.additions = (slow,)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
        time.sleep(0.05)  # a step, which is no wait
    assert 0.06 <= loader.waited < 0.06 + 3 * 0.05
