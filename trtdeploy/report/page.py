"""The report as one HTML file that needs nothing else, and as JSON."""

from __future__ import annotations

from pathlib import Path

from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.files import atomic_write
from trtdeploy.report.charts import latency_chart, stage_chart
from trtdeploy.report.content import Report

MATRIX_CLASSES = 30
"""With more classes than this, the pairs that are mixed up most are listed instead of a matrix."""
_PAIRS = 20


def write_report(report: Report, path: str | Path) -> Path:
    """Write ``OUT.html`` and, beside it, ``OUT.json``.

    Returns:
        Where the JSON lies.

    Raises:
        UsageError: The path does not end in .html.
        RuntimeUnavailableError: jinja2 is not installed.
        OSError: A file cannot be written.
    """
    target = check_path(path)
    page = render(report)
    facts = target.with_suffix(".json")
    atomic_write(facts, report.model_dump_json(indent=2) + "\n")
    atomic_write(target, page)
    return facts


def check_path(path: str | Path) -> Path:
    """Return the path of a report; refuse early what could not be written after an hour of work.

    Raises:
        UsageError: It does not end in .html, is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        raise UsageError(f"{target} cannot be a report.", hint="Give a file name that ends in .html.")
    if not target.parent.is_dir():
        raise UsageError(f"The folder {target.parent} of the report does not exist.")
    return target


def render(report: Report) -> str:
    """Return the page.

    Raises:
        RuntimeUnavailableError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RuntimeUnavailableError(
            "Reports are written with jinja2, which is not installed.", hint="pip install 'trtdeploy[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    percentiles = {name: interval.value for name, interval in report.validation.latency_ms.items()}
    total_ms = sum(part.milliseconds for part in report.times)
    return environment.get_template("report.html.j2").render(
        report=report,
        validation=report.validation,
        stages=stage_chart(report.stages) if report.stages else None,
        latency=latency_chart(report.latency, percentiles),
        total_ms=total_ms,
        matrix=len(report.classes) <= MATRIX_CLASSES,
        pairs=_mixed_up(report),
        largest=max((count for row in report.confusion for count in row), default=1) or 1,
    )


def _mixed_up(report: Report) -> list[tuple[str, str, int]]:
    """Return the most frequent mistakes: true class, answer, how often."""
    mistakes = [
        (report.classes[row], report.classes[column], count)
        for row, counts in enumerate(report.confusion)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:_PAIRS]
