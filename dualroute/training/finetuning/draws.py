"""Random numbers of a step that do not depend on what was drawn before it.

A run that is resumed has to draw what it would have drawn; so a generator is seeded anew for each
micro-batch.
"""

from __future__ import annotations

import hashlib


def draw_seed(seed: int, step: int, number: int) -> int:
    """Seed for micro-batch ``number`` of ``step``, counted through all ranks: 63 bits."""
    digest = hashlib.sha256(f"dualroute draws {seed} {step} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
