"""``checkpoint.json`` changed as somebody would who means it: the hashes in it are right again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualroute.model import tree_hash
from dualroute.model.checkpoint_folder import METADATA, SEAL, write_metadata


def rewrite(folder: Path, **changes: Any) -> None:
    """With other values; a key whose value is "removed" goes."""
    said = json.loads((folder / METADATA).read_text()) | changes
    write_metadata(folder, {key: value for key, value in said.items() if value != "removed" and key != SEAL})


def redescribe(folder: Path, name: str) -> None:
    """With the size and the hash that the file ``name`` has now."""
    files = json.loads((folder / METADATA).read_text())["files"]
    rewrite(folder, files=files | {name: tree_hash.describe(folder / name)})
