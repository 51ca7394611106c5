"""The configurations, Slurm templates and notebook that come with dualroute, in a checkout and in a wheel.

``configs/``, ``slurm/`` and ``docs/notebooks/`` are folders of the repository; the package has links to them,
which become folders in a wheel.  ``--config pretrain/quickstart`` names a shipped file from anywhere.
"""

from __future__ import annotations

from pathlib import Path

from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically

_PACKAGE = Path(__file__).resolve().parents[1]
NOTEBOOK = "first_model.ipynb"


def shipped_folder(name: str) -> Path:
    """The folder ``configs``, ``slurm`` or ``notebooks``.

    Raises:
        UserError: The installation lacks it.
    """
    places = (_PACKAGE / f"_{name}", _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"there is no folder {places[0]}: install dualroute again")


def shipped_configs() -> dict[str, Path]:
    """{name: file} of every shipped configuration, as in ``pretrain/quickstart``."""
    folder = shipped_folder("configs")
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))
    }


def find_config(name: str) -> Path:
    """The file that ``--config`` names: a path, or the name of a shipped configuration.

    Raises:
        UserError: There is neither.
    """
    try:
        path = Path(name).expanduser()
        if not name:
            raise UserError("--config needs a file, it is empty")
        if path.is_file() or (path.exists() and name not in shipped_configs()):
            return path
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--config {name!r} cannot be a file: {error}") from error
    shipped = shipped_configs()
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if plain in shipped and not name.startswith("configs/"):
        return shipped[plain]
    if plain in shipped:
        raise UserError(f"there is no file {name} here: the shipped one is --config {plain}")
    raise UserError(f"there is no file {name}, and `dualroute configs` lists no such configuration")


def describe_configs() -> str:
    """Text of ``dualroute configs``: each name with the first line of its comment."""
    lines = [
        "configurations that come with dualroute: --config NAME reads one, `dualroute configs show NAME` "
        "prints it"
    ]
    for name, path in shipped_configs().items():
        comment = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        lines.append(f"  {name:<24} {comment}")
    return "\n".join(lines)


def copy_notebook(folder: Path) -> Path:
    """Put a copy of the notebook that comes with dualroute into ``folder``.

    Raises:
        UserError: There is no such folder, a file of that name is there, or it cannot be written.
    """
    source = shipped_folder("notebooks") / NOTEBOOK
    copy = folder / NOTEBOOK
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it")
    if copy.exists():
        raise UserError(f"{copy} is there already: name another folder, or remove it")
    try:
        write_bytes_atomically(copy, source.read_bytes())
    except OSError as error:
        raise UserError(f"{copy} cannot be written: {error.strerror or error}") from error
    return copy
