"""``dualroute generate``: a prompt in, the model's continuation out, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.load import choose_device, load
from dualroute.model import DualRoutingTransformer, SamplingConfig, generate
from dualroute.model.compiled_decode import CompiledDecoder, check_compiler
from dualroute.model.generation import Decoder
from dualroute.settings import check_fields


@dataclass
class GenerateConfig:
    """Write text with a checkpoint.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        prompt: Text to continue; "-" reads it from standard input.
        sampling: How tokens are drawn.
        stream: Print each piece of text as soon as it is there.
        device: auto, cpu, cuda, ….
        compile: Compile the step that makes one token into one program first (tens of seconds; needs a C++
            compiler on a CPU). Long texts are then written faster, with int8 weights most of all.
        cache_dtype: How keys and values of the text so far are kept: auto is the arithmetic's type, int8 a
            quarter of float32.
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
    """

    checkpoint: str
    prompt: str = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stream: bool = True
    compile: bool = False
    cache_dtype: Literal["auto", "int8"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "", may_be_empty=["prompt"])


def generate_text(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    decoder: Decoder | None = None,
    int8_cache: bool = False,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces of whole characters.

    ``decoder`` and ``int8_cache`` are those of :func:`~dualroute.model.generation.generate`.
    A character outside the vocabulary is several byte tokens; a piece is held back until it is complete.

    Raises:
        UserError: The prompt leaves no room in the model's context.
    """
    ids = tokenizer.encode(prompt, bos=True)
    limit = model.config.max_context
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids)} tokens and the model reads at most {limit}: shorten it")
    new: list[int] = []
    shown = tokenizer.decode(ids)
    for token in generate(model, ids, sampling, tokenizer.eos_id, decoder, int8_cache):
        if token == tokenizer.eos_id:
            break
        new.append(token)
        text = tokenizer.decode(ids + new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids + new)[len(shown) :]


def generate_command(config: GenerateConfig) -> None:
    """``dualroute generate``: print the prompt and its continuation."""
    if config.compile:
        check_compiler(choose_device(config.device))
    loaded = load(config.checkpoint, config.device, config.dtype, compiled=config.compile)
    decoder = CompiledDecoder(loaded.model) if config.compile else None
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    int8_cache = config.cache_dtype == "int8"
    pieces = generate_text(loaded.model, loaded.tokenizer, prompt, config.sampling, decoder, int8_cache)
    if config.stream:
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print(prompt + "".join(pieces))
