"""Tiny models in the classes of an exported folder."""

import torch

from dualroute.export.hf import folder as huggingface
from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
from dualroute.export.hf.modeling_dualroute import DualRoutingForCausalLM
from dualroute.model import DualRoutingTransformer, SamplingConfig, generate
from tests.export.conftest import tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config_of(shape, **options) -> DualRoutingConfig:
    return DualRoutingConfig(shape.to_dict(), bos_token_id=1, eos_token_id=2, pad_token_id=0, **options)


def wrapped(**options) -> tuple[DualRoutingTransformer, DualRoutingForCausalLM]:
    """A tiny model, and the same inside the transformers class."""
    ours = tiny_model(**options)
    model = DualRoutingForCausalLM(config_of(ours.config)).eval()
    left = model.load_state_dict(huggingface.named_weights(ours), strict=False)
    assert left.missing_keys == (["lm_head.weight"] if ours.config.tie_embeddings else [])
    assert not left.unexpected_keys
    return ours, model


def ids_of(length, batch=1, seed=0):
    return torch.randint(4, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Ids and attention mask of rows of unequal length."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def greedy_of(ours, prompt, count):
    """What `dualroute generate` continues a prompt with."""
    return list(generate(ours, prompt, SamplingConfig(max_new_tokens=count, temperature=0)))
