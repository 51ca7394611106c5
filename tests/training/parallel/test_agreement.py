"""Rank 0 looks, all ranks know; and where one fails, all fail."""

import pytest

from dualroute.errors import RUN_AGAIN, UserError
from dualroute.training.parallel import agreement
from dualroute.training.parallel.agreement import all_succeed, decided_by_rank_zero, meet
from dualroute.training.parallel.environment import World
from tests import warm
from tests.conftest import ROOT
from tests.training.step.test_module import environment


def test_one_process_decides_for_itself():
    def refuse():
        raise UserError("no")

    assert decided_by_rank_zero(lambda: 3) == 3
    all_succeed(lambda: None)
    for act in (decided_by_rank_zero, all_succeed):
        with pytest.raises(UserError, match="no"):
            act(refuse)


def test_a_rank_that_waits_for_the_others_in_vain_ends(monkeypatch, capsys):
    """Before anything is written that could tell who is missing, so with the status "run it again"."""
    ended = []
    monkeypatch.setattr(agreement.os, "_exit", ended.append)

    class Alone:
        def setup_environment(self):
            while not ended:
                pass
            raise ConnectionError

    with pytest.raises(ConnectionError):
        meet(Alone(), World(rank=1, world_size=2, main_port=29500), 1e-3)
    assert ended == [RUN_AGAIN]
    assert "rank 1 of 2 has waited 0.001 minutes for the others to start" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_come_to_the_same():
    text = warm.ranks(
        2, "tests/training/parallel/processes/agreeing_ranks.py", [], cwd=ROOT, env=environment()
    )
    right = ["zero", "UserError: refused", "UserError: seen by 1", None, "attention: plain torch"]
    assert text.splitlines().count(str(right)) == 2, text
