"""Every snippet of docs/ runs as it stands, and what the pages point to is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.snippets import ROOT, Reader, snippets, steps

DOCS = ROOT / "docs"
FIRST = ("own-network.md", "onnx-only.md")
"""Pages whose files the others take."""
PAGES = [DOCS / name for name in FIRST]
PAGES += sorted(page for page in DOCS.glob("*.md") if page.name not in FIRST and snippets(page))
STEPS = [(page, number) for page in PAGES for number in range(len(steps(page)))]
LINKING = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("docs"))
    yield reader
    reader.close()


@pytest.mark.parametrize(("page", "number"), STEPS, ids=[f"{page.name}-{number}" for page, number in STEPS])
def test_every_step_runs(page: Path, number: int, reader: Reader) -> None:
    for earlier in PAGES[: len(FIRST)]:
        if earlier == page:
            break
        reader.read(earlier)
    reader.read(page, number)


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
