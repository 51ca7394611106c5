"""A teacher whose layers are divided among ranks, against a whole one; started by test_teacher.py.

torchrun --nproc_per_node N tests/distillation/teacher_ranks.py FOLDER
"""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dualroute.distillation.intermediate import recording
from dualroute.distillation.teacher import Teacher, open_divided
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint_format import load_model, read_checkpoint, save_model
from dualroute.training.parallel.sequence import new_sequence_group


def model() -> DualRoutingTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, dim=128, num_layers=6, num_heads=8, num_kv_heads=4, window=8, block=16, top_k=1,
        max_context=200, global_mode="routed", gate=True, qk_norm=True,
    )  # fmt: skip
    return DualRoutingTransformer(config)


def texts(seed: int, length: int) -> dict[str, Tensor]:
    """Two rows of two documents and padding."""
    segments = torch.ones(2, length, dtype=torch.long)
    segments[0, length // 3 :], segments[1, length // 2 :], segments[:, -5:] = 2, 2, 0
    return {
        "input_ids": torch.randint(40, (2, length), generator=torch.Generator().manual_seed(seed)),
        "segment_ids": segments,
        "positions": torch.arange(length).expand(2, length),
    }


def alive() -> int:
    """Bytes of all tensors that this process can reach."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storage = (thing.to_local() if isinstance(thing, DTensor) else thing).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def says_what_a_whole_one_says(dtype: str, offload: bool) -> None:
    whole = Teacher(model(), dtype=dtype)
    divided = Teacher(copy.deepcopy(whole.model), dtype=dtype, offload=offload, sharded=True)
    divided.shard()
    divided.shard()
    assert divided.weight.shape == (40, 128)
    for number in range(3):
        batch = texts(10 * number + dist.get_rank(), 60 + 7 * dist.get_rank())  # each rank has its own
        seen = []
        for teacher in (whole, divided):
            with recording(teacher.model, (0, 5), heads=True) as inside:
                hidden = teacher.hidden_states(batch)
            assert not hidden.requires_grad
            seen.append([hidden, *inside.outputs.values(), *inside.heads.values()])
        assert len(seen[1]) == 5
        assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def shares_texts() -> None:
    whole, divided = (Teacher(model(), sharded=sharded) for sharded in (False, True))
    divided.shard()
    group = new_sequence_group(2)  # of four ranks two pairs, each with a text of its own
    for teacher in (whole, divided):
        teacher.set_sequence_group(group)
    batch = texts(dist.get_rank() // 2, 101)
    hidden = divided.hidden_states(batch)
    assert hidden.shape[1] == 51
    assert torch.equal(hidden, whole.hidden_states(batch))


def holds_its_share() -> None:
    """Before, between and after layers, counted over all tensors of the process."""
    before = alive()
    teacher = Teacher(model(), sharded=True)
    layers, batch, inside = teacher.model.layers, texts(0, 60), []
    of_layer = sum(p.nbytes for p in layers[0].parameters())
    others = alive() - before - len(layers) * of_layer
    share = len(layers) * of_layer / dist.get_world_size()
    teacher.shard()
    pieces = sum(p.to_local().untyped_storage().nbytes() for p in layers.parameters())
    assert share <= pieces < 1.02 * share  # a row more of parameters whose rows N does not divide
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: inside.append(alive() - before - others))
    for _ in range(2):
        teacher.hidden_states(batch)
        assert alive() - before - others < pieces + of_layer / 10  # caches of positions, and the text
    # beside the pieces: one layer, and what the ranks sent of it
    assert len(inside) == 2 * len(layers)
    assert max(inside) < pieces + 2.2 * of_layer < 0.9 * len(layers) * of_layer


def reads_its_rows_alone(dtype: str, offload: bool, folder: Path) -> None:
    """A teacher of a checkpoint: layers come from the file, to each rank its part, and never as a whole."""
    checkpoint = read_checkpoint(folder / "teacher")
    whole = Teacher(load_model(checkpoint), dtype=dtype)
    before = alive()
    made, file = open_divided(checkpoint)
    others = sum(p.nbytes for p in made.parameters() if not p.is_meta)
    assert alive() - before == others < sum(p.nbytes for p in whole.model.parameters()) / 2
    divided = Teacher(made, dtype=dtype, offload=offload, sharded=True, weights=file)
    read, of_file = [], file.read

    def noted(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        read.append(of_file(name, rows))
        return read[-1]

    file.read = noted  # type: ignore[method-assign]
    divided.shard()
    pieces = sum(p.to_local().numel() for p in divided.model.layers.parameters())
    assert sum(tensor.numel() for tensor in read) == pieces
    batch = texts(dist.get_rank(), 60)
    assert torch.equal(divided.hidden_states(batch), whole.hidden_states(batch))


def saved(folder: Path) -> None:
    """Rank 0 writes the teacher; the others wait."""
    if dist.get_rank() == 0:
        (folder / "tokenizer").write_bytes(b"")
        save_model(model(), folder / "teacher", folder / "tokenizer", {})
    dist.barrier()


def main() -> None:
    folder = Path(sys.argv[-1])
    dist.init_process_group("gloo")
    for dtype, offload in itertools.product(("float32", "bfloat16"), (False, True)):
        says_what_a_whole_one_says(dtype, offload)
    saved(folder)
    for dtype, offload in (("float32", False), ("bfloat16", True)):
        gc.collect()
        reads_its_rows_alone(dtype, offload, folder)
    shares_texts()
    gc.collect()
    holds_its_share()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
