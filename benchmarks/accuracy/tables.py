"""Render the results of the accuracy benchmarks into one page.

python -m benchmarks.accuracy.tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.accuracy.results import PROJECT, RESULTS
from trtdeploy.files import atomic_write

ORDER = ("recovery", "stages", "calibrators", "architectures", "lint")
_INTRODUCTION = """# Accuracy

What INT8 costs, measured. Every table is rendered from the JSON that one command wrote
(`python -m benchmarks.accuracy.tables`); nothing here is typed in. Brackets are 95% intervals.
"""


def render(results: Path = RESULTS) -> str:
    """Return the page for the results that are there, in the order of ``ORDER``."""
    found = [results / f"{name}.json" for name in ORDER if (results / f"{name}.json").exists()]
    sections = (section(json.loads(path.read_text()), "benchmarks.accuracy") for path in found)
    return "\n".join([_INTRODUCTION, *("\n".join(lines) for lines in sections)])


def section(result: dict[str, Any], package: str) -> Iterator[str]:
    """Yield the lines of a result's tables and of what made them, a module of ``package``."""
    name, machine = result["benchmark"], result["machine"]
    for table in result["tables"]:
        yield f"## {table['title']}\n"
        yield _row(table["columns"])
        yield _row(["---"] * len(table["columns"]))
        yield from map(_row, table["rows"])
        yield ""
        if table["note"]:
            yield f"{table['note']}\n"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    yield (
        f"`python -m {package}.{name}`, {result['date']}, "
        f"{machine['cores']} cores of {machine['processor']}; "
        f"{versions}.\n"
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "accuracy.md")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, render())


if __name__ == "__main__":
    main()
