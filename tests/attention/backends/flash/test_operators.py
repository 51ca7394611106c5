"""The private operators are what we call them by, and what the stand-in answers to."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends.flash.operators import SCHEMAS


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
