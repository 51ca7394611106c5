"""What a checkpoint's pickled files may hold: DeepSpeed's own few classes, however Python wrote them."""

import pytest
import torch

from dualroute.errors import UserError
from dualroute.training.checkpointing.state.reader import _load, prepare_deepspeed

pytest.importorskip("deepspeed")


class Fetched:
    """Is pickled as `getattr(owner, name)`, as early releases of Python 3.11 do with enumerations."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_zero_stage_is_read_however_it_was_written(tmp_path):
    prepare_deepspeed()
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "states.pt"
    for written in (ZeroStageEnum.gradients, Fetched(ZeroStageEnum, "gradients")):
        torch.save({"stage": written}, path)
        assert _load(path) == {"stage": ZeroStageEnum.gradients}


def test_nothing_else_is_fetched_by_name(tmp_path):
    torch.save({"stage": Fetched(torch.Tensor, "numpy")}, tmp_path / "states.pt")
    with pytest.raises(UserError, match=r"states\.pt cannot be read"):
        _load(tmp_path / "states.pt")
