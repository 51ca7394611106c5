"""The private operators are what we call them by, and what the stand-in answers to."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends.flash.operators import SCHEMAS, Spans, forward


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_installed_torch_has_the_operators_as_we_call_them(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    ours = list(SCHEMAS[name])
    assert ours[: len(positional)] == positional
    assert set(ours) <= set(names)
    # whatever we do not give has a default
    assert all(a.has_default_value() for a in schema.arguments if a.name not in ours)


def test_single_queries_are_never_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `max_q` 1 and grouped heads the real operator reshapes queries and log-sum-exps."""
    asked = []

    def spy(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        asked.append(args[5])
        return (torch.empty(0),) * 5

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", spy)
    rows, ends = torch.zeros(3, 2, 8), torch.arange(4, dtype=torch.int32)
    forward(rows, rows[:, :1], rows[:, :1], Spans(ends, ends, 1, 1, -1, 0))
    assert asked == [2]
