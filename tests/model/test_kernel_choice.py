"""What auto stands for is compared once, remembered, and never taken from a file that is damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dualroute.attention import backend, verification
from dualroute.attention.backends.cpp.build import CACHE
from dualroute.attention.verification import Decision, DeviceLost, Finding
from dualroute.errors import UserError
from dualroute.model import kernel_choice
from dualroute.model.kernel_choice import cache_key, choose_kernels, compared
from tests.attention.verification.doubles import no_triton
from tests.attention.verification.test_correctness import CPU, problem

ASKED = [problem(context=48)]
FOUND = Decision(
    "cpp", (Finding("torch", 9.0), Finding("cpp", 2.0, values=1e-6), Finding("triton", why_not="no GPU"))
)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """Comparisons that were made; auto is open on a CPU, too, and the cache is empty."""
    made: list[object] = []

    def decide(problems: object, device: torch.device, tell: object) -> Decision:
        made.append(problems)
        return FOUND

    backend.load("cpp")  # compiled in the usual cache
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(kernel_choice, "COMPARED", ("cpu",))
    monkeypatch.setattr(kernel_choice, "decide", decide)
    backend.set_backend("auto")
    yield made
    backend.set_backend("auto")


def test_it_is_compared_once_and_remembered(asked: list[object], tmp_path: Path) -> None:
    line = choose_kernels(ASKED, CPU)
    assert line == FOUND.line()
    assert backend.describe("cpu") == f"attention: {line}"
    assert "triton not: no GPU" in line
    assert choose_kernels(ASKED, CPU) is None  # decided in this process
    backend.set_backend("auto")
    assert choose_kernels(ASKED, CPU) == line  # read
    assert len(asked) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"kernels-{cache_key(ASKED, CPU)}.json"
    assert compared(ASKED, CPU, fresh=True) == FOUND
    assert len(asked) == 2


def test_what_was_named_and_what_needs_no_comparison_is_left_alone(
    asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_kernels([], CPU) is None
    backend.set_backend("torch")
    assert choose_kernels(ASKED, CPU) is None
    backend.set_backend("auto")
    monkeypatch.setenv(backend.VARIABLE, "cpp")
    assert choose_kernels(ASKED, CPU) is None
    monkeypatch.delenv(backend.VARIABLE)
    monkeypatch.setattr(kernel_choice, "COMPARED", ("cuda",))
    assert choose_kernels(ASKED, CPU) is None
    assert not asked


def test_what_named_kernels_leave_to_plain_torch_is_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cpp")
    with caplog.at_level(logging.WARNING, logger="dualroute"):
        choose_kernels(ASKED, CPU)
        assert not caplog.records
        monkeypatch.setattr(kernel_choice, "left_to_torch", lambda *given: None)
        choose_kernels(ASKED, CPU)
        monkeypatch.setattr(kernel_choice, "left_to_torch", lambda *given: ("the global route: block 256",))
        choose_kernels(ASKED, CPU)
        monkeypatch.setattr(backend, "_triton", no_triton)
        monkeypatch.setenv(backend.VARIABLE, "triton")
        choose_kernels(ASKED, CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: the cpp kernels take nothing of this model: plain torch does",
        "attention: plain torch, and not the cpp kernels, takes the global route: block 256",
        "attention: plain torch, since there are no triton kernels here: Triton is not installed",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setattr(kernel_choice, "nvidia_driver", lambda: "999.1"),
        lambda patch: patch.setattr(kernel_choice.metadata, "version", lambda package: "9.9"),
        lambda patch: patch.setattr(kernel_choice, "_sources", lambda: "other kernels"),
        lambda patch: patch.setattr(kernel_choice, "FORMAT", 2),
    ],
    ids=["torch", "driver", "triton", "sources", "format"],
)
def test_whatever_could_change_the_answer_is_in_the_key(
    change: Callable[[pytest.MonkeyPatch], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache_key(ASKED, CPU)
    assert before == cache_key(ASKED, CPU)
    change(monkeypatch)
    assert cache_key(ASKED, CPU) != before
    assert cache_key([problem(context=49)], CPU) != cache_key(ASKED, CPU)


def spoil(content: dict, name: object = None, **finding: object) -> str:
    """The file's content with other values and a checksum that fits."""
    body = content["decision"]
    body["findings"][1].update(finding)
    body["name"] = name or body["name"]
    return json.dumps({"decision": body, "sha256": kernel_choice._checksum(body)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("9.0", "1.0"),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "\x00" * 2**19,
        lambda text: spoil(json.loads(text), name="cutlass"),
        lambda text: spoil(json.loads(text), unknown=1),
        lambda text: spoil(json.loads(text), milliseconds=float("nan")),
        lambda text: spoil(json.loads(text), milliseconds="fast"),
        lambda text: spoil(json.loads(text), left_to_torch=None),
    ],
    ids=["cut", "changed", "list", "empty", "long", "back end", "key", "nan", "type", "none"],
)
def test_a_damaged_file_is_ignored_with_a_line(
    damage: Callable[[str], str], asked: list[object], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compared(ASKED, CPU)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(damage(file.read_text()))
    with caplog.at_level(logging.WARNING, logger="dualroute"):
        assert compared(ASKED, CPU) == FOUND
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{file} is ignored, and kernels are compared again: " in line
    assert len(asked) == 2
    assert compared(ASKED, CPU) == FOUND  # it was written anew
    assert len(asked) == 2


def test_a_cache_that_cannot_be_written_costs_a_line(
    asked: list[object], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.WARNING, logger="dualroute"):
        assert compared(ASKED, CPU) == FOUND
    assert "is not kept" in caplog.records[-1].getMessage()


def test_what_has_failed_by_chance_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = Decision("torch", (Finding("torch", 9.0), Finding("cpp", why_not="out of memory", raised=True)))
    monkeypatch.setattr(kernel_choice, "decide", lambda *given, **options: failed)
    assert compared(ASKED, CPU) == failed
    assert not (tmp_path / "cache").exists()


def test_a_mismatch_is_a_warning_at_every_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Decision(
        "torch", (Finding("torch", 9.0), Finding("cpp", why_not="WRONG, local values off by 1e-2"))
    )
    monkeypatch.setattr(kernel_choice, "decide", lambda *given, **options: wrong)
    for start in (1, 2):
        backend.set_backend("auto")
        with caplog.at_level(logging.WARNING, logger="dualroute"):
            choose_kernels(ASKED, CPU)
        lines = [record.getMessage() for record in caplog.records]
        assert lines == ["attention: the cpp kernels are not used: WRONG, local values off by 1e-2"] * start
    assert backend.choose(torch.zeros(1, 1, 8)) is backend.load("torch")


def test_ranks_take_what_rank_0_found_or_say_what_they_lack(
    asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_kernels(ASKED, CPU, lambda find: ("torch", "what rank 0 says")) == "what rank 0 says"
    assert backend.describe("cpu") == "attention: what rank 0 says"
    assert not asked
    backend.set_backend("auto")

    monkeypatch.setattr(backend, "_triton", no_triton)
    with pytest.raises(UserError, match=r"rank 0 has found triton .* \(Triton is not installed\): install"):
        choose_kernels(ASKED, CPU, lambda find: ("triton", ""))


def test_a_lost_device_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*given: object, **options: object) -> Decision:
        raise DeviceLost("triton", "an illegal memory access was encountered")

    monkeypatch.setattr(kernel_choice, "decide", lost)
    with pytest.raises(
        UserError, match=r"the triton kernels have left cpu unusable .*DUALROUTE_KERNELS=torch"
    ):
        compared(ASKED, CPU)


def test_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "KEPT", 2)
    for context in (4, 5, 6):
        compared([problem(context=context)], CPU)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_real_comparison_is_kept_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "decide", verification.decide)
    monkeypatch.setattr(backend, "_triton", no_triton)
    made = compared(ASKED, CPU)
    assert {finding.name for finding in made.findings} == set(backend.CHOICES[1:])
    assert any("triton" in finding.name and finding.why_not for finding in made.findings)
    monkeypatch.setattr(kernel_choice, "decide", None)
    assert compared(ASKED, CPU) == made
