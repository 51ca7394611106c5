"""Commands of dualroute in copies of one process that has imported everything: no seconds of imports each.

``run`` and ``ranks`` are for tests about what a command does, :class:`Started` for those that kill it.
Tests about how it starts or is launched use processes of their own.  The server is multiprocessing's: it
only imports and forks, so no thread of OpenMP or of torch is alive when it does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

from torch.distributed import TCPStore

_IMPORTED = [
    "dualroute.cli",
    "dualroute.training.run",
    "dualroute.distillation.run",
    "dualroute.evaluate.perplexity",
    "torch.utils.tensorboard",
    # what cannot be imported is left out; DeepSpeed loads these, and inductor, when it makes an optimizer
    "deepspeed",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.ops.op_builder.all_ops",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


def run(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float = 240,
    script: Path | str | None = None,
) -> CompletedProcess[str]:
    """``dualroute ARGUMENTS`` to its end, as :func:`subprocess.run` with text captured would give it.

    Args:
        arguments: From the stage on, or those of the script.
        cwd: Working folder.
        env: The whole environment; what a library reads while it is loaded is that of the first start.
        timeout: Seconds.
        script: A file of Python to run in place of the command.

    Raises:
        TimeoutExpired: It was killed after that time.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        (status,) = _to_the_end(
            [(None if script is None else str(script), words, str(cwd), dict(env), str(out), str(err))],
            timeout,
        )
        return CompletedProcess(words, status, _text(out), _text(err))


def cpu_seconds() -> float:
    """CPU seconds of that process and of the copies that have ended."""
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)
    try:
        text = Path(f"/proc/{server}/stat").read_text()
    except OSError:  # it has not been started
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


class Started:
    """A script, or a command of dualroute, in a copy of that process.

    It has the part of :class:`subprocess.Popen` that tests use.
    """

    def __init__(
        self, script: str | None, words: Sequence[str], *, cwd: Path, env: Mapping[str, str]
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._out, self._err = (str(Path(self._scratch.name, name)) for name in ("out", "err"))
        call = (script, [str(word) for word in words], str(cwd), dict(env), self._out, self._err)
        self._process = _context.Process(target=_child, args=call)
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int | None:
        """Waits for the end; its status, minus the number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired(str(self._process), timeout, _text(Path(self._err)))
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for the end; what was written to standard output and to standard error."""
        self.wait(timeout)
        return _text(Path(self._out)), _text(Path(self._err))


def ranks(
    count: int, script: str, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 280
) -> str:
    """What ``count`` ranks that run ``script`` print, in the order of their ranks; each must end with 0.

    They are started as torchrun would, with a store of this process where they meet; torchrun itself costs
    seconds, and tests about launchers start theirs.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place |= {"TORCHELASTIC_RUN_ID": "warm", "TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        printed = [Path(scratch, str(rank)) for rank in range(count)]
        calls = []
        for rank, path in enumerate(printed):
            own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            calls.append(
                (script, [str(word) for word in words], str(cwd), {**env, **own}, str(path), str(path))
            )
        statuses = _to_the_end(calls, timeout)
        text = "".join(map(_text, printed))
    assert statuses == [0] * count, f"statuses {statuses}\n{text[-3000:]}"
    return text


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _to_the_end(calls: list[tuple[Any, ...]], timeout: float) -> list[int]:
    """Exit statuses of :func:`_child` called so; when one fails or time is over, the others are killed."""
    processes = [_context.Process(target=_child, args=call) for call in calls]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                time.sleep(1)  # the others may have something to say
                break
            left = deadline - time.monotonic()
            if left <= 0:
                texts = "".join(_text(Path(call[-1])) for call in calls)
                raise TimeoutExpired(str(calls[0][:2]), timeout, texts)
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], left)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def _child(script: str | None, words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script or "dualroute", *words]
    status = 1
    try:
        if script is None:
            from dualroute.__main__ import main

            status = main()
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
            runpy.run_path(script, run_name="__main__")
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
