"""What is written fits a JSON schema, a regular expression or a grammar; the library llguidance says how.

At each token llguidance gives a mask of those that may follow, in tens of microseconds; the others are
forbidden.  A text whose limit of tokens comes first is cut off, and then is only the beginning of a fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualroute.control.vocabulary import require_llguidance, vocabulary_of
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.files import read_limited
from dualroute.model.decoding.sampling_config import SamplingConfig

#: Of a schema or grammar, in bytes.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Grammar:
    """What a text must fit.

    Attributes:
        kind: Of the notation; ``grammar`` is Lark's.
        text: The schema, expression or grammar itself.
        place: Where it comes from, for messages.
    """

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    place: str

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """A JSON schema that is a Python table."""
        return cls("json_schema", json.dumps(schema), "the JSON schema")

    def compiled(self) -> str:
        """As llguidance reads it.

        Raises:
            UserError: It is no JSON, or llguidance is missing.
        """
        matcher = require_llguidance().LLMatcher
        if self.kind == "regex":
            return str(matcher.grammar_from_regex(self.text))
        if self.kind == "grammar":
            return str(matcher.grammar_from_lark(self.text))
        try:
            schema = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.place} is not JSON ({str(error)[:200]}): mend it") from error
        if not isinstance(schema, (dict, bool)):
            raise UserError(f'{self.place} is no JSON schema: give a table such as {{"type": "object"}}')
        # else a model may write white space for ever
        return str(matcher.grammar_from_json_schema(self.text, overrides={"whitespace_flexible": False}))


def grammar_of(sampling: SamplingConfig) -> Grammar:
    """The grammar that the options name.

    Raises:
        UserError: Its file cannot be read.
    """
    name = sampling.grammar_name
    if name == "regex":
        assert sampling.regex is not None
        return Grammar("regex", sampling.regex, f"sampling.regex {sampling.regex[:80]!r}")
    kind: Literal["json_schema", "grammar"] = "json_schema" if name == "json_schema" else "grammar"
    path = getattr(sampling, kind)
    try:
        return Grammar(kind, read_limited(path, MOST_BYTES).decode(), f"sampling.{kind} {path}")
    except UnicodeDecodeError as error:
        raise UserError(f"sampling.{kind} {path} is not UTF-8 text: convert it first") from error


class GrammarConstraint:
    """Forbids what does not fit a grammar.

    Args:
        tokenizer: The model's.
        grammar: What the text must fit.

    Raises:
        UserError: llguidance is missing or refuses the grammar, or no token ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._place = grammar.place
        self._eos_ids = vocabulary.eos_ids
        self._matcher = require_llguidance().LLMatcher(
            vocabulary.for_llguidance, grammar.compiled(), log_level=0
        )
        self._mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
        self._ended = False
        self._check("cannot be used")

    @property
    def is_finished(self) -> bool:
        """Whether the text fits and nothing may follow it."""
        return self._ended or bool(self._matcher.is_stopped())

    def restrict(self, logits: Tensor, room: int) -> None:
        """See :class:`~dualroute.model.decoding.sampler.Constraint`."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check("cannot be followed further")
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.numel()]
        may = torch.from_numpy(allowed.astype(bool))
        may[list(self._eos_ids)] = may[self._eos_ids[0]].clone()
        logits.masked_fill_(~may.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """See :class:`~dualroute.model.decoding.sampler.Constraint`."""
        if token in self._eos_ids:
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._check("cannot be followed with the tokens of this model")

    def _check(self, problem: str) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise UserError(f"{self._place} {problem} ({reason}): mend it")
