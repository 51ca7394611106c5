"""``dualroute generate``: a prompt in, the model's continuation out, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from dualroute.attention.core.paging import HOST
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError, printable
from dualroute.evaluate.config import GenerateConfig
from dualroute.evaluate.load import choose_device, load
from dualroute.model import DualRoutingTransformer, SamplingConfig, generate
from dualroute.model.decoding.compiled_decode import CompiledDecoder, check_compiler
from dualroute.model.decoding.generation import Decoder

#: Of a prompt on standard input.
MOST_CHARACTERS = 2**24


def generate_text(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    decoder: Decoder | None = None,
    cache_dtype: str = "auto",
    cache_offload: str | None = None,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces of whole characters.

    ``decoder`` and the cache's options: see :func:`~dualroute.model.decoding.generation.generate`.
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
    for token in generate(model, ids, sampling, tokenizer.eos_ids, decoder, cache_dtype, cache_offload):
        if token in tokenizer.eos_ids:
            break
        new.append(token)
        text = tokenizer.decode(ids + new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids + new)[len(shown) :]


def _prompt_of_input() -> str:
    """Standard input, of which a model could read no more than the limit anyway.

    Raises:
        UserError: It is longer, or no UTF-8 text.
    """
    try:
        prompt = sys.stdin.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error.reason}): convert it first") from error
    if len(prompt) > MOST_CHARACTERS:
        raise UserError(f"standard input has more than {MOST_CHARACTERS:,} characters: shorten the prompt")
    return prompt


def generate_command(config: GenerateConfig) -> None:
    """``dualroute generate``: print the prompt and its continuation."""
    if config.compile:
        if config.cache_offload == HOST:
            raise UserError("cache_offload host works without --compile: leave one of them out")
        check_compiler(choose_device(config.device))
    loaded = load(config.checkpoint, config.device, config.dtype, compiled=config.compile)
    decoder = CompiledDecoder(loaded.model) if config.compile else None
    prompt = _prompt_of_input() if config.prompt == "-" else config.prompt
    pieces = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        config.sampling,
        decoder,
        config.cache_dtype,
        config.cache_offload,
    )
    # a model may write what a terminal obeys; a file or a pipe gets the text as it is
    shown = printable if sys.stdout.isatty() else str
    if config.stream:
        print(shown(prompt), end="", flush=True)
        for piece in pieces:
            print(shown(piece), end="", flush=True)
        print()
    else:
        print(shown(prompt + "".join(pieces)))
