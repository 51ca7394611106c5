"""From rows to examples: what the training, the evaluation and a prediction have in common.

In: rows with their places.  Here: a kind encodes them; rows that it cannot use are counted.  Out:
:class:`Encoded`: the rows that are used, and their examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dualroute.tasks.data.examples import Example, Examples
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.kind import BadRow, Kind, Row


@dataclass
class Encoded:
    """Rows that are used, and their examples; ``examples.rows`` are places in ``rows``."""

    rows: list[Row]
    examples: Examples


def encode_rows(
    kind: Kind,
    rows: Iterable[tuple[str, Row]],
    problems: Problems,
    *,
    with_target: bool = True,
    keep_rows: bool = True,
) -> Encoded:
    """Encode rows; those that cannot be used are counted in ``problems``, without being counted as rows."""
    kept: list[Row] = []

    def parts() -> Iterator[tuple[int, Example]]:
        for number, row, examples in encoded_rows(kind, rows, problems, with_target=with_target):
            for example in examples:
                yield number, example
            if keep_rows:
                kept.append(row)

    return Encoded(kept, Examples(parts()))


def encoded_rows(
    kind: Kind, rows: Iterable[tuple[str, Row]], problems: Problems, *, with_target: bool = True
) -> Iterator[tuple[int, Row, list[Example]]]:
    """(number, row, its examples) of those that can be used, counted from 0; see :func:`encode_rows`."""
    number = 0
    for place, row in rows:
        try:
            examples = kind.encode(row, with_target=with_target)
        except BadRow as error:
            problems.add(str(error), place)
            continue
        yield number, row, examples
        number += 1
