"""The language of a document, by `py3langid`, whose model comes with it: nothing is downloaded.

Comes in: text and name. Goes out: an ISO 639-1 code and how sure that is, from 0 to 1; ``code`` for source
code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from data_prep.cleaning.quality import is_code
from dualroute.errors import UserError

CODE = "code"
#: Written as another is, and not to be told from it in a short text.
_WRITTEN_AS = {"wuu": "zh", "yue": "zh", "nn": "no"}
_EXCERPT = 400  # characters from the beginning, the middle and the end


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError("languages needs py3langid: pip install -e '.[prepare]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def require_languages(wanted: Iterable[str]) -> None:
    """Raise a UserError for a language that is not known, or if there is no `py3langid`."""
    known = sorted({CODE, *map(str, _identifier().nb_classes)})
    for language in wanted:
        if language not in known:
            near = [code for code in known if language[:2].lower() == code] or ["en"]
            raise UserError(
                f"languages: {language!r} is not known; did you mean {near[0]!r}? ({' '.join(known)})"
            )


def language_of(text: str, name: str) -> tuple[str, float]:
    """The most likely language, and its probability."""
    if is_code(name):
        return CODE, 1.0
    if len(text) > 3 * _EXCERPT:
        middle = len(text) // 2
        parts = text[:_EXCERPT], text[middle : middle + _EXCERPT], text[-_EXCERPT:]
        text = "\n".join(parts)
    language, probability = _identifier().classify(text)
    return _WRITTEN_AS.get(str(language), str(language)), float(probability)
