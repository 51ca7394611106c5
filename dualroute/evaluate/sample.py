"""``dualroute generate``: a prompt in, the model's continuations out, token by token.

:func:`write_batch` writes several texts at once, each as its seed gives it alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dualroute.attention.core.storage.paging import HOST
from dualroute.control import TextStream, new_sampler
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError, printable
from dualroute.evaluate.config import GenerateConfig
from dualroute.evaluate.load import choose_device, load
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer, Sampler, SamplingConfig
from dualroute.model.decoding.cache_options import DEFAULT, CacheOptions
from dualroute.model.decoding.compiled_decode import CompiledDecoder, check_compiler
from dualroute.model.decoding.generation import Decoder, generate_batch
from dualroute.model.decoding.sampler import TokenLogprob
from dualroute.model.steering import steer

#: Of a prompt on standard input.
MOST_CHARACTERS = 2**24


@dataclass
class Written:
    """One text that was written.

    Attributes:
        text: Without the prompt, and without a stop.
        tokens: Ids, the one that ended it included.
        ended: Why: ``end`` (a token that ends texts), ``stop`` (a stop was met), ``grammar`` (nothing may
            follow) or ``length``.
        seed: Of its draws.
        logprobs: Of each token, with ``sampling.logprobs``.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ended: str = "length"
    seed: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Writer:
    """One text while it is written: its sampler, its characters, and why it ends."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingConfig, prompt: Sequence[int]) -> None:
        self._eos_ids = tokenizer.eos_ids
        self._stream = TextStream(tokenizer, prompt, sampling.stop)
        self.sampler: Sampler = new_sampler(sampling, tokenizer, prompt)
        self.written = Written(seed=sampling.seed)

    def add(self, token: int) -> str:
        """A token was drawn; the piece of text that may be shown."""
        self.written.tokens.append(token)
        if token in self._eos_ids:
            self.written.ended = "end"
            return ""
        piece = self._stream.add(token)
        if self._stream.stopped is not None:
            self.written.ended, self.sampler.room = "stop", 0
        elif any(constraint.is_finished for constraint in self.sampler.constraints):
            self.written.ended = "grammar"
        return piece

    def finish(self) -> str:
        """The rest of the text at its end."""
        piece = self._stream.finish()
        self.written.text, self.written.logprobs = self._stream.text, self.sampler.logprobs
        return piece


def write_batch(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    samplings: Sequence[SamplingConfig],
    decoder: Decoder | None = None,
    cache: CacheOptions = DEFAULT,
) -> list[Written]:
    """Continue several prompts at once; each becomes what it becomes alone.

    Args:
        model, tokenizer: Of one checkpoint.
        prompts: Texts to continue.
        samplings: How tokens are drawn, one for each prompt.
        decoder, cache: Those of :func:`~dualroute.model.decoding.generation.generate`.

    Raises:
        UserError: A prompt leaves no room in the model's context, or an option cannot be used.
    """
    ids = [_prompt_ids(model, tokenizer, prompt) for prompt in prompts]
    writers = [Writer(tokenizer, how, of) for how, of in zip(samplings, ids, strict=True)]
    samplers = [writer.sampler for writer in writers]
    for number, token in generate_batch(model, ids, samplers, tokenizer.eos_ids, decoder, cache):
        writers[number].add(token)
    for writer in writers:
        writer.finish()
    return [writer.written for writer in writers]


def _prompt_ids(model: DualRoutingTransformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt, bos=True)
    limit = model.config.max_context
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids)} tokens and the model reads at most {limit}: shorten it")
    return ids


def generate_text(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    decoder: Decoder | None = None,
    cache: CacheOptions = DEFAULT,
    written: Written | None = None,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces of whole characters.

    ``decoder`` and ``cache`` are those of :func:`~dualroute.model.decoding.generation.generate`;
    ``written`` is filled at the end.  A character outside the vocabulary is several byte tokens; a piece is
    held back until it is complete, or until it cannot be the beginning of a stop.

    Raises:
        UserError: The prompt leaves no room in the model's context, or an option cannot be used.
    """
    ids = _prompt_ids(model, tokenizer, prompt)
    writer = Writer(tokenizer, sampling, ids)
    for _, token in generate_batch(model, [ids], [writer.sampler], tokenizer.eos_ids, decoder, cache):
        piece = writer.add(token)
        if piece:
            yield piece
    yield writer.finish()
    if written is not None:
        vars(written).update(vars(writer.written))


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
    """``dualroute generate``: print the prompt and its continuations.

    Raises:
        UserError: An option cannot be used, or the output cannot be written.
    """
    if config.output is not None and not Path(config.output).parent.is_dir():  # said now, not after the work
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    if config.compile:
        if config.cache_offload == HOST:
            raise UserError("cache_offload host works without --compile: leave one of them out")
        check_compiler(choose_device(config.device))
    loaded = load(config.checkpoint, config.device, config.dtype, compiled=config.compile)
    steer(loaded.model, config.scale or "")
    decoder = CompiledDecoder(loaded.model) if config.compile else None
    prompt = _prompt_of_input() if config.prompt == "-" else config.prompt
    cache = CacheOptions(config.cache_dtype, config.cache_offload)
    # a model may write what a terminal obeys; a file or a pipe gets the text as it is
    shown = printable if sys.stdout.isatty() else str
    texts: list[Written] = []
    if config.samples == 1:
        texts.append(Written())
        pieces = generate_text(
            loaded.model, loaded.tokenizer, prompt, config.sampling, decoder, cache, texts[0]
        )
        if config.stream:
            print(shown(prompt), end="", flush=True)
            for piece in pieces:
                print(shown(piece), end="", flush=True)
            print()
        else:
            print(shown(prompt + "".join(pieces)))
    else:
        seeds = range(config.sampling.seed, config.sampling.seed + config.samples)
        for first in range(0, config.samples, config.batch_size):
            samplings = [
                replace(config.sampling, seed=seed) for seed in seeds[first : first + config.batch_size]
            ]
            some = write_batch(
                loaded.model, loaded.tokenizer, [prompt] * len(samplings), samplings, decoder, cache
            )
            for one in some:
                print(f"--- seed {one.seed}, ended by {one.ended}\n{shown(prompt + one.text)}", flush=True)
            texts += some
    if config.output is not None:
        _write_output(config, prompt, texts, loaded.tokenizer)


def _write_output(
    config: GenerateConfig, prompt: str, texts: Sequence[Written], tokenizer: Tokenizer
) -> None:
    table: dict[str, Any] = {"prompt": prompt, "sampling": asdict(config.sampling), "scale": config.scale}
    table["texts"] = []
    for one in texts:
        entry: dict[str, Any] = {key: getattr(one, key) for key in ("text", "seed", "ended")}
        logprobs: Sequence[TokenLogprob | None] = one.logprobs or [None] * len(one.tokens)
        entry["tokens"] = [
            {"id": number, "text": tokenizer.decode([number]), **_described(of, tokenizer)}
            for number, of in zip(one.tokens, logprobs, strict=True)
        ]
        table["texts"].append(entry)
    assert config.output is not None
    try:
        write_bytes_atomically(config.output, json.dumps(table, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be written: {error.strerror or error}") from error


def _described(of: TokenLogprob | None, tokenizer: Tokenizer) -> dict[str, Any]:
    if of is None:
        return {}
    top = [
        {"id": number, "text": tokenizer.decode([number]), "logprob": logprob} for number, logprob in of.top
    ]
    return {"logprob": of.logprob, "top": top}
