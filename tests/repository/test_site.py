"""The documentation as a site: built as strictly as mkdocs can, all pages in it and found by its search."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

from tests.conftest import ROOT

pytest.importorskip("mkdocstrings")


class _Loader(yaml.SafeLoader):
    """mkdocs.yml names a Python object; only the pages matter here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_every_page_is_in_the_navigation_once():
    def pages(part):
        if isinstance(part, str):
            return [part]
        return [
            page for inner in (part.values() if isinstance(part, dict) else part) for page in pages(inner)
        ]

    named = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)["nav"])
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    there |= {
        path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        for path in (ROOT / "docs").rglob("*.ipynb")
    }
    assert sorted(named) == sorted(there)


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path, monkeypatch, caplog):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    with caplog.at_level(logging.WARNING):
        build(config)  # a broken link, anchor or reference aborts it
    site = tmp_path / "site"
    found = json.loads((site / "search/search_index.json").read_text())["docs"]
    text = {entry["location"]: entry["text"] for entry in found}
    for place in ("start/one_token.html", "help/faq.html", "zh/faq.html", "notebooks/first_model.html"):
        assert (site / place).exists()
        assert any(location.startswith(place) for location in text)
    reference = (site / "reference/api.html").read_text()
    for name in ("load", "Model.generate", "train", "Run.metrics"):
        assert f".{name}" in reference
    assert ":class:" not in reference
    assert "max_new_tokens" in reference  # options with their explanations
    assert "attention/reference.py</code>" in (site / "attention.html").read_text()  # no link out of the site
    assert 'data-md-component="search-query"' in reference
    assert (site / "notebooks/first_model.ipynb").exists()
    for page in site.rglob("*.html"):  # nothing is loaded from other hosts
        assert 'src="http' not in page.read_text(), page
