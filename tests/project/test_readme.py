"""Every snippet of the README runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.project.snippets import ROOT, Reader, snippets, steps

PAGE = ROOT / "README.md"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("readme"))
    yield reader
    reader.close()


def test_the_readme_has_its_snippets() -> None:
    assert [language for language, _ in snippets(PAGE)] == ["bash", "bash", "python", "bash", "bash", "bash"]
    assert len(steps(PAGE)) == 13


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(steps(PAGE))))
def test_every_step_runs(number: int, reader: Reader) -> None:
    reader.read(PAGE, number)
