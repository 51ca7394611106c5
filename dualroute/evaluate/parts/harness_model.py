"""Our models as lm-evaluation-harness asks them: its ``TemplateLM`` over :class:`SuiteModel`.

Batches, contexts that several continuations share and ranks are the suite model's; the harness is told of
one process.  Requests are cut and encoded as its own ``hf`` model does on our export, so that answers agree:
a <bos> stands before each text where the tokenizer puts one, also where a whole text is scored (``hf`` then
asks for the probability of that <bos> too).  One thing differs: a special token that is spelt in a text
("<unk>") is text here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dualroute.data.tokenizer import MAX_FILE_BYTES
from dualroute.errors import UserError
from dualroute.evaluate.suite.model import Pair, SuiteModel
from dualroute.files import read_json

_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(TemplateLM):
    """A model under test.

    Args:
        model: It.
        add_bos: Put a <bos> before each context; null as its tokenizer does.
    """

    def __init__(self, model: SuiteModel, add_bos: bool | None = None) -> None:
        super().__init__()
        self.model, self.add_bos = model, puts_bos(model) if add_bos is None else add_bos

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return next(iter(self.model.tokenizer.eos_ids), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.model.begin()[0]

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.model.max_context

    @property
    def tokenizer_name(self) -> str:
        """By which requests are told apart."""
        return self.model.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text."""
        before = self.model.begin() if self.add_bos and add_special_tokens is not False else []
        return [*before, *self.model.tokenizer.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is the likeliest."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self.model.likelihoods([(context, after) for _, context, after in requests])
        return [(one.total, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, window by window, each token once."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = [
                make_disjoint_window(one)
                for one in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            windows += own
            counts.append(len(own))
        found = iter(self.model.likelihoods(windows))
        return [sum(next(found).total for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy texts up to a stop string.

        Raises:
            UserError: A task asks for sampling, or for more tokens than the model reads.
        """
        by_options: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(self._options(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for (new_tokens, *until), numbers in by_options.items():
            room = self.max_length - new_tokens
            if room < 1:
                raise UserError(
                    f"a task writes {new_tokens} tokens, and the model reads {self.max_length} in all: "
                    "leave the task out"
                )
            prompts = [(self.tok_encode(requests[k].args[0]) or self.model.begin())[-room:] for k in numbers]
            for k, text in zip(numbers, self.model.write(prompts, new_tokens, until), strict=True):
                texts[k] = text
        return texts

    @staticmethod
    def _options(said: dict[str, Any]) -> tuple[Any, ...]:
        if said.get("do_sample") and said.get("temperature", 1.0) > 0:
            raise UserError("a task draws its texts (do_sample): only the likeliest text is measured here")
        new_tokens = next(
            (said[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in said),
            _NEW_TOKENS,
        )
        until = said.get("until") or []
        return (int(new_tokens), *([until] if isinstance(until, str) else until))


def puts_bos(model: SuiteModel) -> bool:
    """Whether transformers' tokenizer of a model begins each text with a special token: an export's does
    where there is a <bos>, another folder says it in its tokenizer.json."""
    file = model.folder / "tokenizer.json"
    if not file.is_file():
        return model.tokenizer.bos_id >= 0
    said = read_json(file, limit=MAX_FILE_BYTES).get("post_processor") or {}
    for one in [said, *(said.get("processors") or [])]:
        if one.get("type") == "TemplateProcessing" and "SpecialToken" in (one.get("single") or [{}])[0]:
            return True
    return False
