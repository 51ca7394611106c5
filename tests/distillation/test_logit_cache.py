"""A cache of a teacher's logits: the same training as online, whole whatever interrupts it, refused where it
does not fit."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.data.plan import BatchPlan
from dualroute.data.reader import ShardReader, WindowDataset, open_stream
from dualroute.distillation import cache_logits
from dualroute.distillation.logit_cache import Identity, ShardWriter, claim, finish
from dualroute.distillation.logit_reader import CachedWindows, CacheFaults, LogitCache, told
from dualroute.distillation.losses import TopK
from dualroute.errors import UserError
from tests.distillation.test_run import FEW, arguments, close, distil, teacher
from tests.training.step.test_module import curve

__all__ = ["distil", "teacher"]  # fixtures

K, SHARD = 8, 20
SAMPLES = FEW * 512 // 64


def cache_arguments(dataset, teacher, output, *more):
    return [
        *("cache-logits", "--teacher", str(teacher), "--data.path", str(dataset), "--data.context", "64"),
        *("--output", str(output), "--top_k", str(K), "--shard_samples", str(SHARD), "--micro_batch", "2"),
        *("--max_tokens", str(FEW * 512), *map(str, more)),
    ]


@pytest.fixture(scope="module")
def cache(tiny_dataset, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "exact"
    assert main(cache_arguments(tiny_dataset, teacher, output, "--dtype", "float32")) == 0
    return output


def student_arguments(dataset, cache, output, *more, steps=FEW):
    words = arguments(dataset, "none", output, "--distill.cached_logits", cache, *more, steps=steps)
    place = words.index("--teacher")
    return words[:place] + words[place + 2 :]


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(cache, distil, tiny_dataset, tmp_path, monkeypatch):
    online = distil("--distill.top_k", K, steps=FEW)
    monkeypatch.setattr("dualroute.distillation.run.load_teacher", lambda *_, **__: 1 / 0)
    assert main(student_arguments(tiny_dataset, cache, tmp_path / "run")) == 0
    assert close(curve(tmp_path / "run"), curve(online)) < 1e-5
    assert close(curve(tmp_path / "run", "validation"), curve(online, "validation")) < 1e-5
    # the order of the samples is the plan's, whatever makes up a batch
    other_way = ("--train.micro_batch", 8, "--data.num_workers", 1)
    assert main(student_arguments(tiny_dataset, cache, tmp_path / "other", *other_way)) == 0
    assert close(curve(tmp_path / "other"), curve(online)) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_and_takes_what_it_says(
    dtype, cache, teacher, tiny_dataset, tmp_path, capsys
):
    output = tmp_path / "half"
    assert main(cache_arguments(tiny_dataset, teacher, output, "--dtype", dtype)) == 0
    assert f"{SAMPLES * 64:,} tokens, {K * 4 + 2} bytes each" in capsys.readouterr().out
    exact, rough = LogitCache(cache), LogitCache(output)
    for number in (0, SHARD, SAMPLES - 1):
        one, other = exact.read(number), rough.read(number)
        assert np.array_equal(one["teacher_ids"], other["teacher_ids"])
        tolerance = 1e-3 if dtype == "float16" else 1e-2
        for name in ("teacher_log_probs", "teacher_rest"):
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=1e-3)
    # headers and padding of a tar apart: 3 × 512, and up to 3 × (512 + 128)
    whole = sum((output / shard["file"]).stat().st_size for shard in rough.shards)
    assert whole / SAMPLES < 64 * (K * 4 + 2) + 3 * 512 + 3 * 640 + 10240


def test_the_shards_are_webdataset_tars(cache):
    with tarfile.open(cache / "logits-00001.tar") as tar:
        names = tar.getnames()
        assert names[:3] == [f"{SHARD:010d}.{part}.npy" for part in ("log_probs", "ids", "rest")]
        log_probs = np.load(io.BytesIO(tar.extractfile(names[0]).read()))
    assert np.array_equal(log_probs, LogitCache(cache).read(SHARD)["teacher_log_probs"])
    mass = np.exp(log_probs).sum(1) + np.exp(LogitCache(cache).read(SHARD)["teacher_rest"])
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_an_interrupted_cache_is_continued_and_a_finished_shard_is_kept(
    cache, teacher, tiny_dataset, tmp_path, monkeypatch
):
    output, asked = tmp_path / "again", cache_logits._asked
    command = cache_arguments(tiny_dataset, teacher, output, "--dtype", "float32")

    def interrupted(teacher, windows, ids, config):
        for count, sample in enumerate(asked(teacher, windows, ids, config)):
            if len(list(output.glob("*.json"))) == 3 and count == 5:  # identity and two shards
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(cache_logits, "_asked", interrupted)
    assert main(command) == 130
    assert sorted(path.name for path in output.glob("*.tar")) == ["logits-00000.tar", "logits-00001.tar"]
    assert not (output / "manifest.json").exists()
    with pytest.raises(UserError, match="not a finished cache"):
        LogitCache(output)
    (output / ".logits-00002.tar.partial-1").write_bytes(b"half a shard of a killed writer")
    before = (output / "logits-00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(cache_logits, "_asked", asked)
    assert main(command) == 0
    assert (output / "logits-00000.tar").stat().st_mtime_ns == before
    assert LogitCache(output).shards == LogitCache(cache).shards
    assert not list(output.glob(".*partial*"))


def test_two_commands_do_not_write_one_cache(cache, teacher, tiny_dataset, tmp_path, monkeypatch, capsys):
    """Locks are of processes: another one holds this rank's while this one starts."""
    monkeypatch.setattr("dualroute.files.lock_of_process", lambda descriptor: False)
    output = tmp_path / "taken"
    output.mkdir()
    (output / ".lock-rank-0").write_text("process 4711 on n7\n")
    assert main(cache_arguments(tiny_dataset, teacher, output)) == 2
    assert f"--output {output} is being written by process 4711 on n7" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [".lock-rank-0"]


def test_ranks_write_disjoint_shards_and_the_last_one_finishes(
    cache, teacher, tiny_dataset, tmp_path, monkeypatch
):
    output = tmp_path / "ranks"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for rank, written in ((1, [1]), (0, [0, 1, 2])):
        for name, value in {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)
        assert main(cache_arguments(tiny_dataset, teacher, output, "--dtype", "float32")) == 0
        assert sorted(int(path.stem[-5:]) for path in output.glob("*.tar")) == written
        assert (output / "manifest.json").exists() == (rank == 0)
    assert LogitCache(output).shards == LogitCache(cache).shards


def test_a_longer_cache_only_adds_to_it(cache, teacher, tiny_dataset, tmp_path):
    output = tmp_path / "longer"
    shutil.copytree(cache, output)
    before = (output / "logits-00000.tar").stat().st_mtime_ns
    more = ("--dtype", "float32", "--max_tokens", FEW * 512 + 640)
    assert main(cache_arguments(tiny_dataset, teacher, output, *more)) == 0
    assert (output / "logits-00000.tar").stat().st_mtime_ns == before
    longer = LogitCache(output)
    assert longer.samples == SAMPLES + 10
    longer.verify("sha256")
    for number in (0, SAMPLES - 1):
        assert np.array_equal(
            longer.read(number)["teacher_ids"], LogitCache(cache).read(number)["teacher_ids"]
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", 1), "seed 0 and 1"),
        (("--data.context", 32), "context 64 and 32"),
        (("--distill.temperature", 2), "temperature 1.0 and 2.0"),
        (("--distill.top_k", 4), "top_k 8 and 4"),
        (("--train.max_steps", FEW + 1), f"--max_tokens {(FEW + 1) * 512}"),
        (("--distill.hidden_weight", 1), "distill.hidden_weight needs the teacher itself"),
        (("--distill.on_policy_fraction", 0.5), "distill.on_policy_fraction needs the teacher itself"),
        (("--distill.cached_logits", "/nowhere"), "/nowhere is not a finished cache"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_training(
    more, message, cache, tiny_dataset, tmp_path, capsys
):
    assert main(student_arguments(tiny_dataset, cache, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_teacher_that_is_named_must_be_the_one_of_the_cache(cache, tiny_dataset, distil, tmp_path, capsys):
    other = distil(steps=FEW)
    more = ("--distill.cached_logits", cache)
    assert main(arguments(tiny_dataset, other, tmp_path / "run", *more, steps=FEW)) == 2
    assert "teacher" in capsys.readouterr().err


def test_damage_is_found_before_training_or_at_the_sample(cache, tiny_dataset, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    (broken / ".verified.json").unlink(missing_ok=True)
    path = broken / "logits-00001.tar"
    content = bytearray(path.read_bytes())
    stride = LogitCache(broken)._places[""][1]
    content[3 * stride : 3 * stride + 512] = bytes(512)
    path.write_bytes(content)
    run = student_arguments(tiny_dataset, broken, tmp_path / "run")
    assert main(run) == 2
    assert "logits-00001.tar: contents differ" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"logits-00001.tar: sample {SHARD + 3} is damaged"):
        LogitCache(broken).read(SHARD + 3)
    LogitCache(broken).read(SHARD + 2)
    path.write_bytes(content[:-512])
    assert main([*run, "--data.verify", "size"]) == 2
    assert "logits-00001.tar" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        LogitCache(broken).verify("size")
    (broken / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        LogitCache(broken)


def test_a_sha256_that_was_found_right_is_not_computed_again(cache, monkeypatch):
    LogitCache(cache).verify("sha256")
    monkeypatch.setattr("dualroute.distillation.logit_reader.file_sha256", lambda *_: "never")
    LogitCache(cache).verify("sha256")
    os.utime(cache / "logits-00000.tar", ns=(0, 0))
    with pytest.raises(UserError, match="contents differ"):
        LogitCache(cache).verify("sha256")


def test_changed_data_and_another_cache_in_the_folder_are_refused(cache, tiny_dataset, teacher, capsys):
    identity = LogitCache(cache).identity
    with pytest.raises(UserError, match="fingerprint"):
        LogitCache(cache).check(Identity(**{**vars(identity), "fingerprint": "changed"}), 1)
    assert main(cache_arguments(tiny_dataset, teacher, cache, "--seed", 3)) == 2
    assert "holds another cache (seed 0 and 3; dtype float32 and float16)" in capsys.readouterr().err


def test_past_its_end_the_cache_says_so(cache, tiny_dataset):
    with pytest.raises(IndexError, match=f"holds {SAMPLES} samples, number {SAMPLES}"):
        LogitCache(cache).read(SAMPLES)
    manifest = Manifest.load(tiny_dataset)
    plan = BatchPlan(open_stream(manifest, "train"), manifest.fingerprint, 0, 64, 1)
    windows = WindowDataset(ShardReader(manifest, "train"), plan)
    extended = CachedWindows(windows, LogitCache(cache), plan)
    first, last, after = plan.sample_ids(SAMPLES - 2, 3).tolist()
    add = (CacheFaults(),)
    batch = cache_logits.collate([extended[sample] for sample in (first, last)], additions=add)
    assert told(batch).ids.shape == (2, 64, K)
    with pytest.raises(UserError, match="ends before this run"):
        told(cache_logits.collate([extended[sample] for sample in (last, after)], additions=add))
    batch["teacher_rest"][0, 0] = -float("inf")
    assert not CacheFaults()(batch)["cache_fault"]
    with pytest.raises(UserError, match="reverse_kl is infinite"):
        told(batch | CacheFaults(needs_rest=True)(batch))


def test_a_vocabulary_that_needs_it_is_stored_wide(tmp_path):
    identity = Identity("f", 0, 4, 100_000, "t", "w", 3, 1.0, "bfloat16", 2)
    assert identity.bytes_per_token == 3 * (2 + 4) + 2
    claim(tmp_path, identity)
    draw = torch.Generator().manual_seed(0)
    samples = [
        TopK(
            -torch.rand(4, 3, generator=draw),
            torch.randint(100_000, (4, 3), generator=draw),
            torch.full((4,), -float("inf")),
        )
        for _ in range(3)
    ]
    assert not finish(tmp_path, identity, 3)
    ShardWriter(tmp_path, identity, 0).write(iter(samples[:2]))
    ShardWriter(tmp_path, identity, 1).write(iter(samples[2:]))
    assert finish(tmp_path, identity, 3)
    read = LogitCache(tmp_path).read(2)
    assert np.array_equal(read["teacher_ids"], samples[2].ids.numpy())
    assert np.array_equal(read["teacher_log_probs"], samples[2].log_probs.bfloat16().float().numpy())
    assert np.isneginf(read["teacher_rest"]).all()
    assert json.loads((tmp_path / "manifest.json").read_text())["bytes_per_token"] == 20


def test_samples_lie_in_the_order_of_the_plan(cache, tiny_dataset, teacher):
    """The cache's number s is the plan's sample s: asked again, the teacher says the same."""
    manifest = Manifest.load(tiny_dataset)
    plan = BatchPlan(open_stream(manifest, "train"), manifest.fingerprint, 0, 64, 1)
    config = cache_logits.CacheLogitsConfig(top_k=K, micro_batch=1)
    windows = WindowDataset(ShardReader(manifest, "train"), plan)
    model = cache_logits.load_teacher(
        str(teacher), manifest.tokenizer.opened(manifest.folder), str(tiny_dataset), 64
    )
    number = SAMPLES - 2
    (again,) = cache_logits._asked(model, windows, plan.sample_ids(number, 1).tolist(), config)
    read = LogitCache(cache).read(number)
    np.testing.assert_allclose(again.log_probs.numpy(), read["teacher_log_probs"], atol=1e-5)
