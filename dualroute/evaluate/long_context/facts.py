"""Facts between the sentences of a book, and a question that needs one, two or three of them.

After BABILong: people go from room to room and take things along.  facts_1 asks where somebody is (the last
of several facts about them), facts_2 where a thing is (who took it, and where they went), facts_3 where a
thing was before it came to a room (and where its holder had been).  Facts are made here, in bAbI's manner.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from dualroute.evaluate.long_context.needles import filled, sentences
from dualroute.evaluate.long_context.sample import Sample, Task, scattered

_PEOPLE = ("Mary", "John", "Sandra", "Daniel", "Fred", "Julie")
_ROOMS = ("kitchen", "garden", "office", "bathroom", "bedroom", "hallway", "cellar", "attic")
_THINGS = ("apple", "football", "milk", "lamp", "book", "hammer")
_GOES = ("moved to", "went to", "journeyed to", "travelled to")
_TEMPLATE = (
    "The text below holds facts about where people are and what they carry, among sentences of a book. "
    "Answer the question by these facts alone, with one word.\n{context}\nQuestion: {query} Answer: the"
)


def facts_task(needed: int, text: str) -> Task:
    """The question that needs so many facts (1, 2 or 3), in a book's text."""
    return Task(partial(_facts, needed, sentences(text)), new_tokens=8)


def _facts(needed: int, filler: Sequence[str], count: int, draw: random.Random) -> Sample:
    people = draw.sample(_PEOPLE, 3)
    holder, *others = people
    thing, other_thing = draw.sample(_THINGS, 2)
    first, second, third = draw.sample(_ROOMS, 3)
    facts = [_went(holder, first, draw)]
    if needed > 1:
        facts.append(f"{holder} picked up the {thing}.")
    facts.append(_went(holder, second, draw))
    if needed == 3:
        facts.append(_went(holder, third, draw))
    for person in others:  # who is not asked for, before, between and behind
        facts.insert(draw.randrange(len(facts) + 1), _went(person, draw.choice(_ROOMS), draw))
    facts.insert(draw.randrange(len(facts) + 1), f"{others[0]} picked up the {other_thing}.")
    query, answer = {
        1: (f"Where is {holder}?", second),
        2: (f"Where is the {thing}?", second),
        3: (f"Where was the {thing} before the {third}?", second),
    }[needed]
    pieces, depth = scattered(filled(filler, count, draw), facts, draw)
    return Sample(_TEMPLATE.format(context=" ".join(pieces), query=query), [answer], depth)


def _went(person: str, room: str, draw: random.Random) -> str:
    return f"{person} {draw.choice(_GOES)} the {room}."
