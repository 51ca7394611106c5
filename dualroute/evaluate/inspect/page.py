"""An inspection as one HTML page that needs nothing from anywhere: text, numbers and script in one file.

Weights are written as 16-bit fractions, so they are within 1e-5 of the arrays.  Texts reach the page as JSON
in which no character can end the script, and are shown as text, never as HTML.
"""

from __future__ import annotations

import base64
import html
import json
import re
from importlib import resources
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.evaluate.inspect.numbers import MISSED, Array, Inspection
from dualroute.evaluate.inspect.weights import KINDS

#: Of a page; a browser holds no more with ease.
MOST_BYTES = 96 << 20


def page(inspection: Inspection, title: str) -> str:
    """The page.

    Raises:
        UserError: It would be too large; says which option makes it smaller.
    """
    layers = []
    for layer in inspection.layers:
        table: dict[str, Any] = {
            "global_heads": len(layer.block_weights),
            "local_heads": len(layer.window_weights),
            "width": layer.window_weights.shape[-1],
            "kinds": _base64(layer.kinds),
            "missed_tokens": _base64(layer.missed_tokens),
        }
        for name in (
            "block_weights",
            "full_block_weights",
            "missed_weights",
            "far_mass",
            "window_weights",
            "shares",
        ):
            table[name] = _base64(_fractions(getattr(layer, name)))
        layers.append(table)
    length = len(inspection.ids)
    numbers = {
        "tokens": inspection.tokens,
        "block": inspection.block,
        "blocks": -(-length // inspection.block),
        "kinds": KINDS,
        "missed": MISSED,
        "layers": layers,
        "losses": _base64(inspection.losses.astype("<f4")),
        "ablations": [what.name for what in inspection.ablations],
        "kl": _base64(inspection.kl.astype("<f4")),
        "loss_change": _base64(inspection.loss_change.astype("<f4")),
        "mean_kl": [float(row.mean()) for row in inspection.kl],
        "mean_loss_change": [float(row.mean()) for row in inspection.loss_change],
        "notes": [*inspection.notes, *_notes(inspection)],
    }
    text = json.dumps(numbers, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")
    if len(text) > MOST_BYTES:
        raise UserError(
            f"the page would have {len(text) >> 20} MB, and {MOST_BYTES >> 20} MB are the most: lower "
            f"max_tokens"
        )
    template = resources.files("dualroute.evaluate.inspect").joinpath("page.html").read_text("utf-8")
    parts = {"$TITLE": html.escape(title), "$NUMBERS": text}
    # in one pass: a title or a token may spell a mark itself
    return re.sub(r"\$TITLE|\$NUMBERS", lambda found: parts[found[0]], template)


def _notes(inspection: Inspection) -> list[str]:
    worst = max(layer.difference for layer in inspection.layers)
    lines = [
        f"{len(inspection.ids)} tokens in blocks of {inspection.block}, {len(inspection.layers)} layers. "
        f"Weights are computed anew; the outputs that follow from them differ from the model's own by at "
        f"most {worst:.1e} of the largest.",
        "Full attention is that of the same queries and keys: what this model would read here if it read "
        "everything, not what another model would.",
    ]
    return lines


def _fractions(values: Array) -> Array:
    return np.rint(np.clip(values, 0, 1) * 65535).astype("<u2")


def _base64(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
