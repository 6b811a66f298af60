"""Every snippet of the README runs, in order, in one folder, as a reader would run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import ROOT, run_page, snippets


@pytest.mark.slow
def test_every_snippet_runs(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    assert [language for language, _ in snippets(page)] == ["bash", "bash", "python", "bash", "bash", "bash"]
    run_page(page, tmp_path)
