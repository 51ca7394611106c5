"""The fastest of what is right is taken, and the line says which, why, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from dualroute.attention import backend
from dualroute.attention.backend import load
from dualroute.attention.verification import DeviceLost, decide, decision
from tests.attention.verification.doubles import Double, no_triton
from tests.attention.verification.test_correctness import CPU, problem


def decided(**backends: object) -> decision.Decision:
    """Plain torch against these."""
    return decide([problem()], CPU, ("torch", *backends), backends)  # type: ignore[arg-type]


def test_the_fastest_is_taken_and_the_others_are_named() -> None:
    found = decided(cpp=load("cpp"), slow=Double("slow"), wrong=Double("values"))
    assert found.name == "cpp"
    line = found.line()
    assert line.startswith("cpp kernels, the fastest of what is right here, ")
    assert "\n" not in line
    for words in (
        "(torch ",
        "; slow ",
        "wrong not: WRONG, local values off by 1.0e-02 of the whole",
        "gradients within",
    ):
        assert words in line
    by_name = {finding.name: finding for finding in found.findings}
    assert by_name["slow"].milliseconds > 45
    assert by_name["wrong"].milliseconds is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("slow", "slow [0-9.]+ ms"),
        ("gradients", "gradients not: WRONG, local gradient of the key off by"),
        ("nan", "nan not: WRONG, local values: not a finite number"),
        ("raises", "raises not: it ended in RuntimeError: an illegal instruction[)]"),
        ("refuses", "refuses not: doubles: not block 8 of float32, head_dim 8, causal=True, on cpu"),
    ],
)
def test_plain_torch_is_taken_where_another_is_slow_wrong_or_not_to_be_had(fault: str, said: str) -> None:
    found = decided(**{fault: Double(fault)})
    assert found.name == "torch"
    line = found.line()
    assert line.startswith("plain torch, the fastest of what is right here")
    assert re.search(said, line)


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_triton", no_triton)
    found = decide([problem()], CPU, ("triton",))
    assert found.name == "torch"
    assert "triton not: Triton is not installed" in found.line()


def test_what_is_left_to_plain_torch_is_named() -> None:
    class LocalOnly(Double):
        def supports(self, query: torch.Tensor, *, causal: bool = True, block: int | None = None) -> bool:
            return block is None

    found = decided(part=LocalOnly())
    (part,) = [finding for finding in found.findings if finding.name == "part"]
    assert part.milliseconds is not None
    assert part.left_to_torch == (
        "the global route: doubles: not block 8 of float32, head_dim 8, causal=True, on cpu",
    )
    chosen = dataclasses.replace(found, name="part")
    assert chosen.line().endswith(f"; plain torch takes {part.left_to_torch[0]}")


def test_the_kernels_of_a_cpu_are_right_both_ways() -> None:
    (found,) = [one for one in decide([problem(causal=False)], CPU, ("cpp",)).findings if one.name == "cpp"]
    assert not found.why_not
    assert not found.left_to_torch


def test_all_problems_count_with_their_layers() -> None:
    one = problem(context=64)
    many = dataclasses.replace(one, layers=1000)
    spent = [decide([asked], CPU, ("torch",)).findings[0].milliseconds for asked in (one, many)]
    assert spent[1] > 100 * spent[0]
    wrong_in_the_second = decide(
        [problem(local_heads=0, global_heads=4), one], CPU, ("cpp",), {"cpp": Double("values")}
    )
    assert wrong_in_the_second.name == "torch"
    assert wrong_in_the_second.findings[1].why_not.startswith("WRONG, local values off by")


def test_a_device_that_answers_no_more_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"lost": False}

    class Fatal(Double):
        def local_attention(self, *given: object, **options: object) -> torch.Tensor:
            state["lost"] = True
            raise RuntimeError("an illegal memory access was encountered")

    def finish(device: torch.device) -> None:
        if state["lost"]:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(decision, "_finish", finish)
    with pytest.raises(DeviceLost) as lost:
        decided(fatal=Fatal())
    assert lost.value.args == ("fatal", "an illegal memory access was encountered")


def test_plain_torch_that_does_not_fit_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = decision._time

    def time(taken: object, *rest: object) -> float:
        if taken is load("torch"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(taken, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(decision, "_time", time)
    found = decided(cpp=load("cpp"))
    assert found.name == "cpp"
    assert "torch not: it cannot be timed: CUDA out of memory" in found.line()
