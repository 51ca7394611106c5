"""``dualroute data generate``: prompts in, a file of training text out, written by a model behind an API.

- In: prompts, one a line, and a server (``dualroute serve`` of a larger model, or any OpenAI-compatible one).
- Here: several requests at once; each answer is a line of ``OUTPUT.partial`` as soon as it is there.
- Next: ``dualroute prepare --corpus OUTPUT`` makes shards of it, ``dualroute finetune`` reads its messages.

Stopped in whatever way, the same command goes on: what stands in the file is not asked again.  Once every
prompt was asked, the file gets its name.  What failed is counted, stands with its reason in
``OUTPUT.failed``, and is asked again when the command is run again.  Answers that were cut off stand in
``OUTPUT.unfinished``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.teacher.client import Answer, Client, Refused
from data_prep.teacher.config import GenerateDataConfig
from dualroute.errors import UserError, one_line
from dualroute.files import publish, require_regular, write_bytes_atomically

log = logging.getLogger(__name__)

MOST_LINE = 16 * 2**20  # bytes of a prompt or a record
_SAY_EVERY = 30.0  # seconds
_GIVE_UP_AFTER = 20  # failures in a row, with no answer between them
#: What may differ between the start and the rest of one file.
_FREE = (
    *("server", "api_key_variable", "concurrency", "requests_per_minute", "retries", "timeout_seconds"),
    *("price_in", "price_out", "budget", "output", "prompts"),
)


@dataclass(frozen=True)
class Prompt:
    """To be answered once.

    Attributes:
        key: Of the record, the same in every run.
        messages: Of a chat; the only one's content is the text to continue with kind completions.
        seed: Of the draw.
    """

    key: str
    messages: list[dict[str, str]]
    seed: int


@dataclass
class Tally:
    """What a run has done."""

    written: int = 0
    failed: int = 0
    unfinished: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def cost(self, config: GenerateDataConfig) -> float:
        """In the currency of the prices."""
        return (self.tokens_in * config.price_in + self.tokens_out * config.price_out) / 1e6


def generate_data(config: GenerateDataConfig) -> None:
    """Write the file, or go on with it.

    Raises:
        UserError: Prompts, output or server cannot be used; what was written stays.
    """
    prompts, output = Path(config.prompts), Path(config.output)
    require_regular(prompts, "prompts")
    if not output.parent.is_dir():
        raise UserError(f"output {output}: there is no folder {output.parent}: make it")
    settings, partial = _settings(config, prompts), output.with_name(f"{output.name}.partial")
    note = output.with_name(f"{output.name}.settings.json")
    if (output.exists() or partial.exists()) and _noted(note) != settings:
        raise UserError(
            f"{output} was begun with other prompts or settings ({note.name}): give another --output, or "
            f"remove it"
        )
    failed = output.with_name(f"{output.name}.failed")
    if output.exists():
        if not failed.exists():
            log.info("%s", f"{output} is complete: nothing to do")
            return
        os.replace(output, partial)
    write_bytes_atomically(note, json.dumps(settings, indent=1).encode())
    cut = output.with_name(f"{output.name}.unfinished")
    done = _done(partial) | _done(cut)
    if done:
        log.info("%s", f"{len(done):,} answers are there already: going on")
    for path in (partial, cut):
        _mend(path)
    tally, client = Tally(), Client(config, os.environ.get(config.api_key_variable, ""))
    began = time.monotonic()
    complete = False
    try:
        with partial.open("ab") as written, failed.open("wb") as refused, cut.open("ab") as unfinished:
            complete = _Run(config, client, tally, (written, unfinished, refused), prompts, done).run()
    finally:
        client.stop.set()
        log.info("%s", _summary(config, client, tally, time.monotonic() - began))
    if not complete:
        raise UserError(f"the budget of {config.budget:g} is spent: raise --budget to go on with {partial}")
    if not tally.failed:
        failed.unlink()
    if not cut.stat().st_size:
        cut.unlink()
    publish(partial, output)
    rest = (
        f"; {tally.failed:,} prompts failed ({failed}): the same command asks them again"
        if tally.failed
        else ""
    )
    log.info("%s", f"{output}{rest}; next: dualroute prepare --corpus {output} --output …")


class _Run:
    """Asks all that is not there yet."""

    def __init__(
        self,
        config: GenerateDataConfig,
        client: Client,
        tally: Tally,
        files: tuple[IO[bytes], IO[bytes], IO[bytes]],
        prompts: Path,
        done: set[str],
    ) -> None:
        self.config, self.client, self.tally = config, client, tally
        self.written, self.unfinished, self.refused = files
        self.prompts, self.done = prompts, done
        self.in_a_row = 0
        self.said = time.monotonic()

    def run(self) -> bool:
        """Whether every prompt was asked; false where the budget was spent before.

        Raises:
            UserError: The server takes none of them.
        """
        waiting: dict[Future[Answer], Prompt] = {}
        todo = (prompt for prompt in prompts_of(self.config, self.prompts) if prompt.key not in self.done)
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    spent = self._spent()
                    while not spent and len(waiting) < self.config.concurrency:
                        prompt = next(todo, None)
                        if prompt is None:
                            break
                        waiting[pool.submit(self.client.ask, _body(self.config, prompt))] = prompt
                    if not waiting:
                        return not spent or next(todo, None) is None
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        self._take(waiting.pop(future), future)
            except BaseException:
                self.client.stop.set()  # or the pool would wait for retries
                for future, prompt in waiting.items():
                    if future.done() and not future.cancelled() and future.exception() is None:
                        self._keep(prompt, future.result())  # it was paid for
                raise

    def _spent(self) -> bool:
        budget = self.config.budget
        return budget is not None and self.tally.cost(self.config) >= budget

    def _take(self, prompt: Prompt, future: Future[Answer]) -> None:
        try:
            answer = future.result()
        except Refused as error:
            self.tally.failed += 1
            self.in_a_row += 1
            line = {"key": prompt.key, "messages": prompt.messages, "problem": str(error)}
            self.refused.write(json.dumps(line).encode() + b"\n")
            self.refused.flush()
            if self.in_a_row >= _GIVE_UP_AFTER:
                raise UserError(
                    f"{self.in_a_row} requests in a row failed (the last: {error}): look at "
                    f"{self.config.server}, and run the same command again"
                ) from error
            return
        self.in_a_row = 0
        self._keep(prompt, answer)
        if time.monotonic() - self.said > _SAY_EVERY:
            self.said = time.monotonic()
            log.info("%s", _counts(self.config, self.tally))

    def _keep(self, prompt: Prompt, answer: Answer) -> None:
        tally, config = self.tally, self.config
        tally.tokens_in += answer.tokens_in
        tally.tokens_out += answer.tokens_out
        whole = answer.finish_reason != "length" or config.keep_unfinished
        tally.written += whole
        tally.unfinished += not whole
        stream = self.written if whole else self.unfinished
        record = _record(config, prompt, answer)
        stream.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
        stream.flush()


def prompts_of(config: GenerateDataConfig, path: Path) -> Iterator[Prompt]:
    """The prompts of a file, each as often as it is to be answered.

    Raises:
        UserError: Naming the file and the line.
    """
    as_records = path.suffix in (".jsonl", ".json", ".ndjson")
    before = [{"role": "system", "content": config.system}] if config.system else []
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MOST_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if len(line) > MOST_LINE:
                raise UserError(f"{place}: the line is longer than {MOST_LINE:,} bytes: shorten it")
            try:
                text = line.decode().strip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place}: it is not UTF-8 text ({error.reason}): convert the file"
                ) from error
            if not text.strip():
                continue
            messages = _messages(text, config, place) if as_records else _of_user(text)
            if config.kind == "completions" and len(messages) > 1:
                raise UserError(f"{place}: messages are for --kind chat, and this is completions")
            for sample in range(config.samples):
                seed = (config.seed + (number - 1) * config.samples + sample) % 2**31
                said = json.dumps([number, sample, messages]).encode()
                key = hashlib.sha256(said).hexdigest()[:24]
                yield Prompt(key, [*before, *messages] if config.kind == "chat" else messages, seed)


def _of_user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _messages(text: str, config: GenerateDataConfig, place: str) -> list[dict[str, str]]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: it is no JSON ({one_line(str(error))}): mend the line") from error
    if isinstance(record, dict) and isinstance(record.get(config.prompt_key), str):
        return _of_user(record[config.prompt_key])
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{place}: the record has no text under {config.prompt_key!r} and no messages: give --prompt_key"
        )
    for message in messages:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in texts):
            raise UserError(f"{place}: messages are tables with a role and a content, both texts")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _body(config: GenerateDataConfig, prompt: Prompt) -> dict[str, Any]:
    what: dict[str, Any] = {"messages": prompt.messages}
    if config.kind == "completions":
        what = {"prompt": prompt.messages[-1]["content"]}
    return {
        "model": config.model,
        **what,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": prompt.seed,
    }


def _record(config: GenerateDataConfig, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    asked = prompt.messages[-1]["content"]
    between = "" if config.kind == "completions" else "\n\n"
    record: dict[str, Any] = {
        "key": prompt.key,
        "text": answer.text if config.text == "answer" else f"{asked}{between}{answer.text}",
        "prompt": asked,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "model": config.model,
        "seed": prompt.seed,
    }
    if config.kind == "chat":
        record["messages"] = [*prompt.messages, {"role": "assistant", "content": answer.text}]
    return record


def _settings(config: GenerateDataConfig, prompts: Path) -> dict[str, Any]:
    """What has to be the same when a file is gone on with."""
    with prompts.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    return kept | {"prompts_sha256": digest}


def _noted(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes()[: 2**20])
    except (OSError, ValueError, RecursionError):
        return None


def _done(partial: Path) -> set[str]:
    """Keys of the records that are there."""
    keys = set()
    if partial.exists():
        with partial.open("rb") as stream:
            for line in iter(lambda: stream.readline(4 * MOST_LINE), b""):
                try:
                    keys.add(str(json.loads(line)["key"]))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # torn: it is asked again
    return keys


def _mend(partial: Path) -> None:
    """Cut off a last line that a killed process left half written."""
    if not partial.exists():
        return
    with partial.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 2**16)
            stream.seek(begin)
            found = stream.read(end - begin).rfind(b"\n")
            if found >= 0:
                stream.truncate(begin + found + 1)
                return
            end = begin
        stream.truncate(0)


def _counts(config: GenerateDataConfig, tally: Tally) -> str:
    cost = f", cost {tally.cost(config):.4g}" if config.price_in or config.price_out else ""
    cut = f", {tally.unfinished:,} cut off at max_tokens and left out" if tally.unfinished else ""
    return (
        f"{tally.written:,} answers, {tally.failed:,} failed{cut}, {tally.tokens_in:,} tokens in and "
        f"{tally.tokens_out:,} out{cost}"
    )


def _summary(config: GenerateDataConfig, client: Client, tally: Tally, seconds: float) -> str:
    return f"{_counts(config, tally)}, {client.retried:,} requests sent again, {seconds:.0f} s"
