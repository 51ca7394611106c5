"""Commands of dualroute in copies of one process that has imported everything: no seconds of imports each.

``run`` is for tests about what a command does.  Tests about how it starts, dies or is launched use real
processes.  The server is multiprocessing's: it only imports and forks, so no thread of OpenMP or of torch is
alive when it does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

_IMPORTED = [
    "dualroute.cli",
    "dualroute.training.run",
    "dualroute.distillation.run",
    "dualroute.evaluate.perplexity",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 240
) -> CompletedProcess[str]:
    """``dualroute ARGUMENTS`` to its end, as :func:`subprocess.run` with text captured would give it.

    Args:
        arguments: From the stage on.
        cwd: Working folder.
        env: The whole environment; what a library reads while it is loaded is that of the first start.
        timeout: Seconds.

    Raises:
        TimeoutExpired: It was killed after that time.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = _context.Process(target=_child, args=(words, str(cwd), dict(env), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        printed = [path.read_text() if path.exists() else "" for path in (out, err)]
        return CompletedProcess(words, process.exitcode, *printed)


def _child(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["dualroute", *words]
    status = 1
    try:
        from dualroute.__main__ import main

        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
