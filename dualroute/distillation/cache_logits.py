"""``dualroute cache-logits``: ask the teacher once, and train any number of students from what it said.

In: a teacher and the settings of the run to come (data, seed, context, length).  Here: the samples of that
run's plan go through the teacher in its order, and its top k with the mass of the rest are written shard by
shard.  Next: ``dualroute distill --distill.cached_logits FOLDER`` needs no teacher in memory.

Ranks (of torchrun, deepspeed, srun or the environment's RANK and WORLD_SIZE) take every n-th shard and
never talk: the one that finds all shards there writes the manifest.

Batch size, accumulation and the number of ranks of the training do not matter.  The
order of the samples depends on data, seed and context alone, so one cache serves them all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dualroute.data.reader import collate
from dualroute.distillation.config import CacheLogitsConfig
from dualroute.distillation.logit_cache import Identity, ShardWriter, claim, finish
from dualroute.distillation.losses import Logits, TopK, top_k_of
from dualroute.distillation.teacher import Teacher, load_teacher
from dualroute.errors import UserError
from dualroute.files import sole_writer
from dualroute.training.parallel.environment import detect_world, refuse_forgotten_srun
from dualroute.training.prepare import shard_module

log = logging.getLogger(__name__)


def cache_logits(config: CacheLogitsConfig) -> int:
    """Write, continue, lengthen or recognise as finished; see the module's docstring.

    Raises:
        UserError: Anything that the person who started it can mend.
    """
    if config.teacher is None:
        raise UserError("teacher is not given: name its checkpoint or run folder (--teacher)")
    if config.max_tokens is None:
        raise UserError("max_tokens is not given: the tokens of the run, its steps × train.tokens_per_batch")
    world = detect_world()
    refuse_forgotten_srun(world)
    context = config.data.context
    if config.data.on_bad_data == "skip":
        raise UserError("data.on_bad_data skip would cache what a teacher says of padding: use fail here")
    data = shard_module(config.data, config.seed, micro_batch=1, tokens_per_batch=context)
    manifest, plan = data.manifest, data.plan
    if world.local_rank == 0:
        data.prepare_data()
    tokenizer = manifest.tokenizer.opened(manifest.folder)
    teacher = load_teacher(config.teacher, tokenizer, config.data.path, context, dtype=config.teacher_dtype)
    if config.top_k > tokenizer.vocab_size:
        raise UserError(f"top_k {config.top_k} is above the vocabulary of {tokenizer.vocab_size} ids")
    identity = Identity(
        data.order_fingerprint, config.seed, context, tokenizer.vocab_size, tokenizer.sha256, teacher.digest,
        config.top_k, config.temperature, config.dtype, config.shard_samples,
    )  # fmt: skip
    default = f"logits-{teacher.digest[:8]}-seed{config.seed}-context{context}-top{config.top_k}"
    if config.output is None and manifest.mirror is not None:
        raise UserError(
            f"output is not given, and the data lie elsewhere ({manifest.place}): name a folder here"
        )
    folder = Path(config.output) if config.output is not None else manifest.folder / default
    samples = -(-config.max_tokens // context)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda cannot be used here: no CUDA device is there; use auto")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    teacher.to(torch.device("cuda", world.local_rank) if on_cuda else torch.device("cpu"))
    # each rank has a lock of its own: ranks share the folder, two commands do not
    with sole_writer(folder / f".lock-rank-{world.rank}", folder):
        claim(folder, identity)
        windows = data.train_windows()
        shards = -(-samples // config.shard_samples)
        for number in range(world.rank, shards, world.world_size):
            first = number * config.shard_samples
            count = min(config.shard_samples, samples - first)
            writer = ShardWriter(folder, identity, number)
            if writer.is_whole(count):
                continue
            began = time.monotonic()
            ids = plan.ids(np.arange(first, first + count, dtype=np.int64)).tolist()
            writer.write(_asked(teacher, windows, ids, config))
            speed = count * context / (time.monotonic() - began)
            log.info("%s", f"{writer.path} ({number + 1} of {shards})  {speed:,.0f} tokens/s")
        if finish(folder, identity, samples):
            log.info(
                "%s",
                f"{folder} holds {samples * context:,} tokens, {identity.bytes_per_token} bytes each: train "
                f"with --distill.cached_logits {folder} --seed {config.seed} --data.context {context}",
            )
    return 0


def _asked(
    teacher: Teacher, windows: Dataset[Any], ids: list[int], config: CacheLogitsConfig
) -> Iterator[TopK]:
    """What the teacher says of the samples ``ids``, one after the other."""
    loader: DataLoader[Any] = DataLoader(
        windows,
        batch_size=config.micro_batch,
        sampler=ids,
        collate_fn=partial(collate, layout=teacher.layout_plans().get("layout")),
        num_workers=config.data.num_workers,
    )
    for batch in loader:
        hidden = teacher.hidden_states({name: part.to(teacher.device) for name, part in batch.items()})
        whole = top_k_of(Logits(hidden.flatten(0, 1), teacher.weight), config.top_k, config.temperature)
        for parts in zip(*(part.unflatten(0, hidden.shape[:2]) for part in whole), strict=True):
            yield TopK(*parts)
