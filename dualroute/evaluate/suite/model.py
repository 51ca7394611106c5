"""The model that a suite measures, and the questions that parts ask it.

In: a path to a checkpoint of ours (float, quantised, pruned), to a folder that ``dualroute export`` wrote, or
to a Hugging Face folder from elsewhere.  Here: it is loaded once, and known by the hashes of its weights.
Out: log-likelihoods of continuations and texts that it writes, in batches, shared among the ranks.

A model whose outputs are no finite numbers is named and not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded, load_any
from dualroute.evaluate.perplexity import LOGIT_ROWS
from dualroute.evaluate.suite.ranks import Ranks
from dualroute.evaluate.writing import not_finite, write_ids
from dualroute.files import file_sha256
from dualroute.model.checkpoint.format import METADATA, WEIGHTS

#: Tokens from which on a context that several continuations share is read once and kept.
LEAST_PREFIX = 32

Ids = Sequence[int] | NDArray[np.int64]
Pair = tuple[Ids, Ids]


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its context.

    Attributes:
        tokens: (n,) float32 log-probabilities of its tokens, in nats.
        greedy: Whether each of them is the model's likeliest.
    """

    tokens: NDArray[np.float32]
    greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole."""
        return float(self.tokens.sum(dtype=np.float64))


class SuiteModel:
    """A model with its tokenizer.

    Args:
        loaded: It.
        batch_size: Texts in one forward pass.
        ranks: Who shares the work.
        identity: Hashes that say which model it is; see :func:`identity_of`.
    """

    def __init__(
        self,
        loaded: Loaded,
        batch_size: int = 8,
        ranks: Ranks | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.loaded, self.batch_size, self.ranks = loaded, batch_size, ranks or Ranks()
        self.model: Any = loaded.model
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.identity = identity or {}

    @property
    def folder(self) -> Path:
        """Where it came from."""
        return self.loaded.checkpoint.folder

    @property
    def max_context(self) -> int:
        """Tokens that it reads at most."""
        return int(self.model.config.max_context)

    @property
    def trained_context(self) -> int:
        """Tokens of a window of its training, where that is known."""
        return min(int(self.loaded.checkpoint.metadata.get("context") or self.max_context), self.max_context)

    def require_language_model(self, what: str) -> None:
        """Refuse ``what`` for a model that predicts no next token.

        Raises:
            UserError: It reads both sides, has a frontend, or a head for a task.
        """
        config = self.model.config
        config.require_causal(what)
        if config.task_head is not None:
            raise UserError(
                f"{what} needs a language model, and {self.folder} has a head for a task: use the part task"
            )

    def begin(self) -> list[int]:
        """What a text begins with: <bos>, or what the tokenizer has in its place."""
        tokenizer = self.tokenizer
        number = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
        if number < 0:
            raise UserError(f"tokenizer {tokenizer.path} has neither <bos> nor <eos> to begin a text with")
        return [number]

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning on."""
        return [*self.begin(), *self.tokenizer.encode(text)]

    # ------------------------------------------------------------------ log-likelihoods

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Log-likelihood of each continuation after its context; what is too long loses its beginning.

        Args:
            pairs: (context, continuation) ids, neither empty.  Pairs with one context best stand together.

        Raises:
            UserError: The model's outputs are no finite numbers.
        """
        return self.ranks.share(pairs, self._likelihoods)

    @torch.no_grad()
    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        limit = self.max_context
        rows: list[tuple[list[int], int]] = []  # ids, and how many of them are asked for
        for context, continuation in pairs:
            ids = [int(one) for one in (*context, *continuation)][-(limit + 1) :]
            rows.append((ids, min(len(continuation), len(ids) - 1)))
        found: list[Likelihood | None] = [None] * len(rows)
        alone: list[int] = []
        for group in self._groups(rows):
            if len(group) > 1 and self._keeps_prefix([rows[k] for k in group]):
                for k, one in zip(group, self._after_prefix([rows[k] for k in group]), strict=True):
                    found[k] = one
            else:
                alone += group
        alone.sort(key=lambda k: -len(rows[k][0]))
        for first in range(0, len(alone), self.batch_size):
            some = alone[first : first + self.batch_size]
            for k, one in zip(some, self._whole([rows[k] for k in some]), strict=True):
                found[k] = one
        return [one for one in found if one is not None]

    @staticmethod
    def _groups(rows: Sequence[tuple[list[int], int]]) -> Iterator[list[int]]:
        """Numbers of neighbouring rows that have their context in common."""
        group: list[int] = []
        for number, (ids, asked) in enumerate(rows):
            if group:
                others, count = rows[group[0]]
                if ids[: len(ids) - asked] != others[: len(others) - count]:
                    yield group
                    group = []
            group.append(number)
        if group:
            yield group

    def _keeps_prefix(self, rows: Sequence[tuple[list[int], int]]) -> bool:
        """Whether the common context is worth keeping, and gives what whole texts give.

        Which blocks a routed text reads exactly depends on its length in blocks, so that must be one.
        """
        context = len(rows[0][0]) - rows[0][1]
        lengths = {-(-(len(ids) - 1) // self.model.config.block) for ids, _ in rows}
        return context >= LEAST_PREFIX and len(lengths) == 1 and hasattr(self.model, "new_caches")

    def _after_prefix(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[Likelihood]:
        """Rows of one context, which is read once."""
        prefix = rows[0][0][: len(rows[0][0]) - rows[0][1]]
        for first in range(0, len(rows), self.batch_size):
            some = rows[first : first + self.batch_size]
            caches = self.model.new_caches(1, max(len(ids) for ids, _ in some))
            device = self.loaded.device
            last = self.model.hidden_states(torch.tensor([prefix], device=device), caches=caches)[:, -1:]
            for cache in caches:
                cache.select(torch.zeros(len(some), dtype=torch.long, device=device))
            hidden = last.expand(len(some), -1, -1)
            longest = max(asked for _, asked in some)
            if longest > 1:
                # the last token of a continuation is predicted, not read; shorter ones are filled up behind
                read = [(ids[-asked:-1] if asked > 1 else []) for ids, asked in some]
                fed = torch.tensor([one + [0] * (longest - 1 - len(one)) for one in read], device=device)
                hidden = torch.cat([hidden, self.model.hidden_states(fed, caches=caches)], 1)
            states = [hidden[k, :asked] for k, (_, asked) in enumerate(some)]
            yield from self._scored(states, [ids[-asked:] for ids, asked in some])

    def _whole(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[Likelihood]:
        """Rows side by side, filled up behind."""
        longest = max(len(ids) for ids, _ in rows) - 1
        padded = [ids[:-1] + [0] * (longest + 1 - len(ids)) for ids, _ in rows]
        segments = None
        if any(len(ids) - 1 < longest for ids, _ in rows):
            marks = [[1] * (len(ids) - 1) + [0] * (longest + 1 - len(ids)) for ids, _ in rows]
            segments = torch.tensor(marks, device=self.loaded.device)
        ids = torch.tensor(padded, device=self.loaded.device)
        hidden = self.model.hidden_states(ids, segment_ids=segments)
        states = [hidden[k, len(ids) - 1 - asked : len(ids) - 1] for k, (ids, asked) in enumerate(rows)]
        yield from self._scored(states, [ids[-asked:] for ids, asked in rows])

    def _scored(self, states: list[Tensor], targets: list[list[int]]) -> Iterator[Likelihood]:
        """Hidden states (n, dim) before each target of each text → likelihoods."""
        wanted = torch.tensor([one for ids in targets for one in ids], device=self.loaded.device)
        logs, best = [], []
        parts = zip(torch.cat(states).split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True)
        for rows, ids in parts:
            logits = self.model.head(rows).float()
            chosen = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]
            if not bool(torch.isfinite(chosen).all()):
                raise not_finite(str(self.folder))
            logs.append(chosen)
            best.append(logits.argmax(-1) == ids)
        log, greedy = torch.cat(logs).cpu().numpy(), torch.cat(best).cpu().numpy()
        first = 0
        for one in targets:
            last = first + len(one)
            yield Likelihood(log[first:last], bool(greedy[first:last].all()))
            first = last

    # ------------------------------------------------------------------ texts

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        until: Sequence[str] = (),
    ) -> list[str]:
        """The likeliest continuation of each prompt, up to an end of text or before the first of ``until``.

        Raises:
            UserError: The model's outputs are no finite numbers.
        """
        return self.ranks.share(prompts, lambda some: self._write(some, max_new_tokens, until))

    def _write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str]
    ) -> list[str]:
        decode = self.tokenizer.decode
        ended: Callable[[list[int]], bool] | None = None
        if until:
            longest = max(len(one.encode()) for one in until) + 8  # in tokens: each spells a byte at least

            def ended(ids: list[int]) -> bool:
                return any(one in decode(ids[-longest:]) for one in until)

        try:
            written = write_ids(
                self.model,
                [list(prompt) for prompt in prompts],
                max_new_tokens,
                self.tokenizer.eos_ids,
                ended=ended,
                together=self.batch_size,
            )
        except UserError as error:
            raise UserError(str(error).replace("the model gives", f"{self.folder} gives", 1)) from error
        special = {token.id for token in self.tokenizer.special_tokens.values()}
        texts = [decode(one for one in ids if one not in special) for ids in written]
        for one in until:
            texts = [text.split(one)[0] for text in texts]
        return texts


def suite_model(
    path: str, device: str, dtype: str, batch_size: int, ranks: Ranks, found: Loaded | None = None
) -> SuiteModel:
    """The model at a path.

    Raises:
        UserError: Nothing there can be loaded.
    """
    loaded = found or load_any(path, device, dtype)
    identity = ranks.told(lambda: identity_of(loaded))
    return SuiteModel(loaded, batch_size, ranks, identity)


def identity_of(loaded: Loaded) -> dict[str, Any]:
    """Which model it is: hashes of its weights and tokenizer, its shape and arithmetic."""
    folder = loaded.checkpoint.folder
    described = loaded.checkpoint.metadata.get("files", {}).get(WEIGHTS, {}).get("sha256")
    if described is None or not (folder / METADATA).exists():
        files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
        described = [file_sha256(file) for file in files]
    return {
        "weights": described,
        "tokenizer": loaded.tokenizer.sha256,
        "config": loaded.model.config.to_dict(),
        "dtype": str(loaded.model.norm.weight.dtype if hasattr(loaded.model, "norm") else "float32"),
    }
