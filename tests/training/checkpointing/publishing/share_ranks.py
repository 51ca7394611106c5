"""Ranks that train legs of a run and count what each of them reads, writes and hashes for checkpoints.

test_shares.py starts them.  At the start of a leg, before its first step, each also writes down what it has
loaded: the training state and the weights, in ``LEG.loaded`` beside the run.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dualroute.cli import parse_stage
from dualroute.model.checkpoint import tree_hash
from dualroute.model.checkpoint.folder import STATE, WEIGHTS
from dualroute.model.checkpoint.tree_hash import TRAFFIC
from dualroute.training.checkpointing.publishing.capture import captured
from dualroute.training.checkpointing.publishing.own_part import OwnPart
from dualroute.training.checkpointing.publishing.publisher import (
    CheckpointPublisher,
    _weights_layout,
    gather_weights,
)
from dualroute.training.run import run_pretraining


def main(cases: str) -> None:
    tree_hash.CHUNK = 2**17  # so that files of megabytes have many, as large ones have
    counted: dict[str, Any] = {}
    begin = CheckpointPublisher.on_train_start

    def on_train_start(self: CheckpointPublisher, trainer: Any, module: Any) -> None:
        begin(self, trainer, module)
        counted["resume"] = asdict(TRAFFIC)
        if trainer.global_step:
            loaded = self.folder.parent.with_name(f"{self.folder.parent.name}-{trainer.global_step}.loaded")
            loaded.mkdir(exist_ok=True)
            part = OwnPart(loaded, trainer.global_rank, trainer.world_size, later=False)
            with captured(trainer, part):
                trainer.save_checkpoint(loaded / STATE, weights_only=False)
            part.take_weights(loaded / WEIGHTS, _weights_layout(module.model), gather_weights(module.model))
            part.write()
        TRAFFIC.reset()

    CheckpointPublisher.on_train_start = on_train_start  # type: ignore[method-assign]
    found = []
    for arguments in json.loads(Path(cases).read_text()):
        TRAFFIC.reset()
        run_pretraining(parse_stage("pretrain", arguments))
        counted["save"] = asdict(TRAFFIC)
        found.append(dict(counted))
        gc.collect()
    torch.distributed.destroy_process_group()
    print("COUNTED", json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
