"""What the site needs beyond the pages as they stand in the repository; read by mkdocs alone.

- A link to a file outside of docs/ (source, configuration) becomes text: the site has no such file.
- The notebook becomes a page.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

NOTEBOOK = "notebooks/first_model"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of the site become text."""
    folder = os.path.dirname(page.file.src_uri)

    def text(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, match[3]))
        if target == f"{NOTEBOOK}.ipynb" and page.file.src_uri != f"{NOTEBOOK}.md":
            return match[0].replace(".ipynb", ".md")
        if not target.startswith(".."):
            return match[0]
        place = os.path.normpath(os.path.join("docs", target))
        return match[2] if place in match[2] else f"{match[2]} (`{place}`)"

    return _LINK.sub(text, markdown)


def on_files(files: Any, config: Any) -> Any:
    """The notebook as a page beside the file."""
    source = Path(config["docs_dir"], f"{NOTEBOOK}.ipynb")
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=as_markdown(source.read_text("utf-8"))))
    return files


def as_markdown(notebook: str) -> str:
    """Cells of code and what they showed in fences, others as they are."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        for output in cell.get("outputs", []):
            shown = "".join(output.get("text") or output["data"]["text/plain"]).rstrip()
            parts.append(f"```text\n{shown}\n```")
    name = NOTEBOOK.rpartition("/")[2]
    parts.insert(
        1, f"[The notebook itself]({name}.ipynb); `dualroute notebook` copies it into a folder of yours."
    )
    return "\n\n".join(parts) + "\n"
