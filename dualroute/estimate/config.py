"""The options of ``dualroute estimate``, and the table of machines.  No torch is imported here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dualroute.configuration.names import nearest
from dualroute.configuration.shipped import shipped_folder
from dualroute.errors import UserError, one_line
from dualroute.files import read_limited, require_regular
from dualroute.paths import LocalPath
from dualroute.settings import SEEDS, Range, above, at_least, check_fields
from dualroute.training.config import PretrainConfig

MOST_BYTES = 2**18
#: Of a row of the table → the option that it stands for.
COLUMNS = {
    "memory": "gpu_memory",
    "peak_tflops": "peak_tflops",
    "gpus_per_node": "gpus_per_node",
    "node_bandwidth": "node_bandwidth",
    "network_bandwidth": "network_bandwidth",
    "price": "price",
    "device": "device",
}


@dataclass
class EstimateConfig(PretrainConfig):
    """Estimate a run from its configuration, which may be one of configs/pretrain.

    Args:
        gpus: GPUs, one process each.
        hardware: A row of the table of machines, whose numbers hold where no option says otherwise: h100,
            h200, a100, a100-40, l40s, rtx4090 or laptop; null is an H100.
        hardware_table: The table, a YAML file like configs/hardware/gpus.yaml, which is the one that is meant
            without this.
        gpu_memory: Memory of one, GiB.
        headroom: Share of that memory that stays free.
        peak_tflops: Dense bfloat16 peak of one GPU (H100 SXM: 989, A100: 312).
        mfu: Assumed: share of the peak at which the arithmetic runs, what is computed again included; what is
            waited for comes on top of it.  A short run says what yours comes to in all (`speed/mfu`).
        launches_forward: Assumed: kernels that one layer launches in its forward pass.
        launches_backward: The same in its backward pass.
        launch_microseconds: Assumed: time of the host for one launch.
        gpus_per_node: GPUs that node_bandwidth connects.
        node_bandwidth: Assumed: GB/s that one GPU sends to others of its node (NVLink, H100: 450 at most).
        network_bandwidth: Assumed: GB/s that one GPU sends to other nodes (400 Gbit/s a GPU: 50 at most).
        overlap: Assumed: share of the time of the arithmetic in which gradients and weights can travel.
        storage_bandwidth: Assumed: GB/s that the file system takes from all ranks together.
        rank_bandwidth: Assumed: GB/s that one process writes and hashes.
        price: Of one GPU for an hour; null leaves the cost out.
        device: What a process trains on.
        teacher: Of a distillation: its checkpoint or run folder, or a YAML file with a model's shape.
        teacher_dtype: Of the teacher's weights and arithmetic.
        tokens_per_parameter: Training tokens for each parameter that are compute-optimal (about 20, Hoffmann
            et al. 2022, https://arxiv.org/abs/2203.15556).
    """

    gpus: int = 1
    hardware: str | None = None
    hardware_table: LocalPath | None = None
    gpu_memory: float = 80.0
    headroom: float = 0.05
    peak_tflops: float = 989.0
    mfu: float = 0.35
    launches_forward: int = 60
    launches_backward: int = 90
    launch_microseconds: float = 5.0
    gpus_per_node: int = 8
    node_bandwidth: float = 300.0
    network_bandwidth: float = 40.0
    overlap: float = 0.5
    storage_bandwidth: float = 50.0
    rank_bandwidth: float = 1.5
    price: float | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    teacher: LocalPath | None = None
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    tokens_per_parameter: float = 20.0

    def __post_init__(self) -> None:
        ranges = {
            "gpus": at_least(1, 2**24),
            "gpu_memory": above(0),
            "headroom": Range(0, 1, without_most=True),
            "peak_tflops": above(0),
            "mfu": above(0, 1),
            **dict.fromkeys(("launches_forward", "launches_backward"), at_least(0, 10**6)),
            "launch_microseconds": at_least(0, 1e6),
            "gpus_per_node": at_least(1, 2**20),
            **dict.fromkeys(
                ("node_bandwidth", "network_bandwidth", "storage_bandwidth", "rank_bandwidth"), above(0)
            ),
            "overlap": at_least(0, 1),
            "price": at_least(0, 1e6),
            "tokens_per_parameter": above(0, 1e6),
            "seed": SEEDS,
        }
        check_fields(self, "", ranges)
        if self.hardware_table is not None and self.hardware is None:
            raise UserError("hardware_table is given without hardware: name one of its rows")


def with_hardware(config: EstimateConfig) -> EstimateConfig:
    """With the numbers of the row that ``hardware`` names, but for those that were given.

    Raises:
        UserError: The table cannot be read, or has no such row.
    """
    if config.hardware is None:
        return config
    path = Path(config.hardware_table or shipped_folder("configs") / "hardware" / "gpus.yaml")
    row = _row(_table(path), config.hardware, path)
    given: frozenset[str] = getattr(config, "given", frozenset())
    values = {COLUMNS[name]: value for name, value in row.items() if COLUMNS[name] not in given}
    try:
        return dataclasses.replace(config, **values)
    except UserError as error:
        raise UserError(f"{path}: {config.hardware}: {error}") from error


def _table(path: Path) -> dict[Any, Any]:
    require_regular(path, "hardware_table")
    try:
        table = yaml.safe_load(read_limited(path, MOST_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"hardware_table {path} is no YAML ({one_line(str(error))}): mend it") from error
    if not isinstance(table, dict) or not table:
        raise UserError(f"hardware_table {path} holds no table of machines: see configs/hardware/gpus.yaml")
    return table


def _row(table: dict[Any, Any], name: str, path: Path) -> dict[str, Any]:
    names = [str(key) for key in table]
    if name not in table:
        near = nearest(name, names)
        hint = f"; did you mean {near}?" if near else f"; there are {', '.join(names[:20])}"
        raise UserError(f"hardware is {name!r}, which is no row of {path}{hint}")
    row = table[name]
    if not isinstance(row, dict):
        raise UserError(f"{path}: {name} is no table of numbers: see configs/hardware/gpus.yaml")
    unknown = [str(key) for key in row if key not in COLUMNS]
    if unknown:
        raise UserError(f"{path}: {name} has {unknown[0]!r}: choose among {', '.join(COLUMNS)}")
    whole = {
        key: int(value) if key == "gpus_per_node" and value == int(value) else value
        for key, value in row.items()
    }
    return {
        key: float(value) if isinstance(value, int) and key != "gpus_per_node" else value
        for key, value in whole.items()
    }
