"""Every snippet of docs/ runs as it stands, and what the pages point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from snippets import ROOT, run_page, snippets

DOCS = ROOT / "docs"
FIRST = ("own-network.md", "onnx-only.md")
"""Pages whose files the others take."""
WITH_SNIPPETS = sorted(page.name for page in DOCS.glob("*.md") if page.name not in FIRST and snippets(page))
LINKING = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader has worked through the first pages."""
    folder = tmp_path_factory.mktemp("docs")
    for name in FIRST:
        run_page(DOCS / name, folder)
    return folder


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_every_snippet_runs(name: str, folder: Path) -> None:
    run_page(DOCS / name, folder)


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_named_in_the_readme() -> None:
    named = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in named] == []


def test_paths_in_commands_that_are_not_run_exist() -> None:
    page = (DOCS / "deploy.md").read_text()
    paths = re.findall(r"(?:-f|apply -f) (docker/\S+)", page)
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).is_file()] == []
