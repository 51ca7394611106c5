"""A command of dualroute whose ranks say what they hold: called as ``sharded_ranks.py RESULTS ARGUMENTS…``.

Each rank writes RESULTS/rank-N.json: resident memory in bytes before the model gets its weights, its peak
while it does, and from then on until the optimizer has its state; and a digest of every whole parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dualroute.cli import main
from dualroute.training.checkpointing.publishing.publisher import gather_weights
from dualroute.training.parallel.sharded_weights import InitialWeights
from dualroute.training.parallel.strategy import DualRouteDeepSpeedStrategy


def memory(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


said: dict[str, Any] = {"digests": {}}
upstream = DualRouteDeepSpeedStrategy.shard


def shard(self: Any, module: Any, weights: Any, prefix: str) -> None:
    few = InitialWeights(["weight"])
    upstream(self, torch.nn.Linear(8, 8, bias=False, device="meta"), few, "")  # libraries and connections
    forget_peak()
    said["before"] = memory("VmRSS")
    upstream(self, module, weights, prefix)
    said["peak"] = memory("VmHWM")
    for name, value in gather_weights(module.model):
        said["digests"][name] = hashlib.sha256(value.float().numpy().tobytes()).hexdigest()
    forget_peak()


def set_up(self: Any, *arguments: Any) -> Any:
    made = of_strategy(self, *arguments)
    said["state"] = memory("VmHWM")
    return made


of_strategy = DualRouteDeepSpeedStrategy._setup_model_and_optimizer
DualRouteDeepSpeedStrategy.shard = shard  # type: ignore[method-assign]
DualRouteDeepSpeedStrategy._setup_model_and_optimizer = set_up  # type: ignore[method-assign]
folder, *arguments = sys.argv[1:]
status = main(arguments)
Path(folder, f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(said))
sys.exit(status)
