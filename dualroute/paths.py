"""One rule for paths in configurations, and the types by which a configuration class says "this is a path".

- On the command line a path starts in the working directory, as everywhere.
- In a YAML file, a path that begins with ``./`` or ``../`` starts in the folder of that file, and so does
  every further configuration file that it names (``model: ../model/5m.yaml``).  Any other relative path
  (``data/books``, ``runs/1b``) starts in the working directory: a configuration is a recipe, which may lie in
  the installed package and still read and write where the work is.
- ``~`` and, in a YAML file, ``$NAME`` are expanded; ``$$`` is a dollar sign.
- What a run writes down (``config.yaml``) holds whole paths, so it is usable from anywhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any, get_args, get_type_hints

from dualroute.errors import UserError

_ADDRESS = re.compile(r"pipe:|[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


@dataclass(frozen=True)
class PathField:
    """Annotation of a field that holds a path.

    Args:
        words: Values that mean something else ("auto", the name of a corpus).
        included: A configuration file, which always starts where it is named.
        or_name: A value is a path only where it is there, or ends in ``suffix`` if there is one; else it is a
            name that is known elsewhere.
        suffix: See ``or_name``.
        remote: Addresses of data sets elsewhere (``s3://…``, ``pipe:…``) are no paths.
    """

    words: tuple[str, ...] = ()
    included: bool = False
    or_name: bool = False
    suffix: str = ""
    remote: bool = False

    def is_word(self, value: str) -> bool:
        """Whether ``value`` means something else than a path."""
        if self.or_name:
            return not (value.endswith(self.suffix) if self.suffix else os.path.lexists(value))
        return value in self.words


LocalPath = Annotated[str, PathField()]
#: A data set: a folder, or an address
DataPath = Annotated[str, PathField(remote=True)]
#: A folder, or the memory of the host
FolderOrHost = Annotated[str, PathField(words=("host",))]
#: A file or folder, or the name of a data set elsewhere
PathOrName = Annotated[str, PathField(or_name=True, remote=True)]
#: One of our names, or a Python file
NameOrModule = Annotated[str, PathField(or_name=True, suffix=".py")]
#: The name of a shipped suite, or a YAML file of the user's
SuiteName = Annotated[str, PathField(or_name=True, suffix=".yaml")]
ConfigFile = Annotated[str, PathField(included=True)]
#: ``--resume``
ResumePath = Annotated[str, PathField(words=("auto", "never"))]


def is_remote(path: object) -> bool:
    """Whether ``path`` names a data set by an address (``s3://…``, ``https://…``, ``pipe:COMMAND``), not a
    folder."""
    return _ADDRESS.match(str(path)) is not None


def path_field(hint: Any) -> PathField | None:
    """The annotation of a type, or of what it is a union or a list of."""
    found = [word for word in getattr(hint, "__metadata__", ()) if isinstance(word, PathField)]
    for inner in get_args(hint):
        found += [path for path in [path_field(inner)] if path is not None]
    return found[0] if found else None


def resolve(text: str, field: PathField, folder: Path | None) -> str:
    """A path as the code uses it; ``folder`` is that of the YAML file it stands in, null for a flag.

    Raises:
        UserError: It is empty, holds a control character, or a variable that is not set; without the key,
            which the caller knows.
    """
    if text in field.words:
        return text
    if not text.strip():
        raise UserError("a path may not be empty")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UserError(f"the path {text!r} holds a control character: rename it")
    if folder is not None and "$" in text:
        try:
            text = Template(text).substitute(os.environ)
        except KeyError as error:
            raise UserError(
                f"${error.args[0]} is not set in the environment ($$ is a dollar sign)"
            ) from error
        except ValueError as error:
            raise UserError(f"{text!r} holds a $ without a name ($$ is a dollar sign)") from error
    if text == "~" or text.startswith("~"):
        text = os.path.expanduser(text)
    if folder is not None and (field.included or text.startswith(("./", "../")) or text in (".", "..")):
        return os.path.normpath(folder / text)
    return text


def absolute_paths(config: Any) -> Any:
    """A copy of a configuration in which every path is whole, written so that :func:`resolve` reads it."""
    values = {}
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = path_field(hints[field.name])
        if dataclasses.is_dataclass(value):
            values[field.name] = absolute_paths(value)
        elif isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
            values[field.name] = [absolute_paths(one) for one in value]
        elif path is not None and path.remote and is_remote(value):
            values[field.name] = value.replace("$", "$$")
        elif path is not None and isinstance(value, str) and not path.is_word(value):
            values[field.name] = os.path.abspath(value).replace("$", "$$")
    return dataclasses.replace(config, **values)
