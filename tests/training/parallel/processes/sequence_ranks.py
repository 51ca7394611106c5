"""Ranks that share texts, against one that reads them alone; started by test_sequence.py.

torchrun --nproc_per_node P tests/training/parallel/processes/sequence_ranks.py
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from dualroute.model import DualRoutingTransformer, ModelConfig


def model(causal: bool, share_choice: int) -> DualRoutingTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, window=8, block=16, top_k=1,
        max_context=200, global_mode="routed", causal=causal, gate=True, qk_norm=True,
        global_rotary_factor=0.5, share_choice=share_choice,
    )  # fmt: skip
    made = DualRoutingTransformer(config).double()
    for layer in made.layers:
        torch.nn.init.normal_(layer.attention.gate_weight, std=0.3)
    return made


def inputs(length: int, packed: bool) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(40, (2, length), generator=generator)
    segments = None
    if packed:  # two documents and padding, at other places in each row
        segments = torch.ones(2, length, dtype=torch.long)
        segments[0, length // 3 :], segments[1, length // 2 :], segments[:, -5:] = 2, 2, 0
    return {"input_ids": ids, "segment_ids": segments}


def main() -> None:
    dist.init_process_group("gloo")
    cases = [(*case, True) for case in itertools.product((96, 101), (False, True))]  # 101: it is filled up
    for length, packed, causal in (*cases, (101, False, False), (101, True, False)):
        whole, shared = model(causal, 1 + packed), model(causal, 1 + packed)
        shared.set_sequence_group(dist.group.WORLD)
        batch = inputs(length, packed)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(2, length, 32, dtype=torch.float64, generator=generator)
        if packed:
            cotangent[batch["segment_ids"] == 0] = 0

        expected = whole.hidden_states(**batch)
        (expected * cotangent).sum().backward()

        hidden = shared.hidden_states(**batch)
        assert hidden.shape[1] == -(-length // dist.get_world_size())
        (hidden * shared.local_shard(cotangent)).sum().backward()

        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, hidden.detach().contiguous())
        gathered = torch.cat(parts, dim=1)[:, :length]
        seen = batch["segment_ids"] != 0 if packed else torch.ones(2, length, dtype=torch.bool)
        assert (gathered - expected)[seen].abs().max() < 1e-12
        for (name, ours), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
            dist.all_reduce(ours.grad)
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9), (name, length, packed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
