"""One row times int8 weights, as a step of decoding does it: the kernel of this project against torch's.

    python benchmarks/decoding/int8_product.py --threads 1

Both in compiled programs with frozen weights.  A program multiplies one row by `--megabytes` of weights of a
shape, different ones, so that they come from where those of a model come from.  A figure is the median of
programs that take turns; what `torch.compile` checks before each call is in it, on both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.model.decoding.compiled_decode import freezing
from dualroute.model.quantized import QuantizedLinear

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import medians, prepare, show

#: (N, K): the layers and the vocabulary of the model of docs/results.md, and layers of a usual width
SHAPES = ((768, 256), (256, 704), (1408, 256), (8192, 256), (3072, 1024), (5632, 1024))


class Products(nn.Module):
    """One row times each of several int8 weights."""

    def __init__(self, rows: int, inner: int, count: int, packed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QuantizedLinear(inner, rows) for _ in range(count))
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            assert isinstance(layer, QuantizedLinear)
            layer.qdata.random_(-128, 128, generator=generator)
            layer.scale.uniform_(0.01, 0.02, generator=generator)
            if packed:
                layer.pack_for_cpu()
                if layer.packed is None:
                    raise SystemExit("there is no kernel to compare: see `dualroute doctor`, or no AVX2 here")

    def forward(self, row: Tensor) -> list[Tensor]:
        return [layer(row) for layer in self.layers]


def program(products: nn.Module, row: Tensor) -> Callable[[], list[Tensor]]:
    """The products, compiled."""
    compiled = torch.compile(products.eval(), fullgraph=True, dynamic=False)
    with freezing():
        compiled(row)
    return lambda: compiled(row)


def compare(rows: int, inner: int, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """A line of the table."""
    row = torch.randn(1, inner, dtype=torch.bfloat16)
    ours, theirs = (program(Products(rows, inner, count, packed), row) for packed in (True, False))
    for mine, other in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-2, atol=3e-2 * other.abs().max().item())
    times = medians({"ours": ours, "theirs": theirs}, options.repeats, torch.device("cpu"))
    size = rows * inner * count
    return {
        "weight": f"{rows} x {inner}",
        "products": str(count),
        "torch us": f"{times['theirs'] / count * 1e6:.1f}",
        "torch GB/s": f"{size / times['theirs'] / 1e9:.1f}",
        "kernel us": f"{times['ours'] / count * 1e6:.1f}",
        "kernel GB/s": f"{size / times['ours'] / 1e9:.1f}",
        "ratio": f"{times['theirs'] / times['ours']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    prepare(options.threads, "cpu")
    torch.set_grad_enabled(False)
    rows = [
        compare(rows, inner, max(1, round(options.megabytes * 1e6 / (rows * inner))), options)
        for rows, inner in SHAPES
    ]
    show(f"int8 products, one row, {torch.get_num_threads()} threads", rows, options.output, "int8_product")


if __name__ == "__main__":
    main()
