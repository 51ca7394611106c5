"""What a section of a pipeline is; by itself, so that reading another command imports no other's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualroute.paths import ConfigFile


@dataclass(frozen=True)
class SectionOf:
    """Annotation of a section: a table of what was given of another command's options, and of `config` files.

    Args:
        config: Configuration class of the command; every option is checked against it where it is read.
        files: Type of `config`.
    """

    config: type
    files: Any = ConfigFile | list[ConfigFile] | None
