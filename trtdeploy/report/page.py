"""The report as one HTML file that needs nothing else, and as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.files import atomic_write
from trtdeploy.report.charts import latency_chart, stage_chart
from trtdeploy.report.confusion import confusion
from trtdeploy.report.content import Report
from trtdeploy.validation import Gate

_GATES = {
    "top-1 drop": ("pp", "The baseline's accuracy minus the measured one, in percentage points."),
    "top-1 drop, shown": ("pp", "The worst end of the drop's 95% interval, from the same samples."),
    "agreement": ("%", "Samples with the answer of the reference."),
    "variation": ("%", "The largest change of a sample's scores with its place in a batch, of their spread."),
    "instances": ("%", "The largest difference of two instances' scores for one sample, of their spread."),
}
"""Unit and meaning of the gates by name; a gate that is not here is shown without."""


def write_report(report: Report, path: str | Path) -> Path:
    """Write ``OUT.html`` and, beside it, ``OUT.json``.

    Returns:
        Where the JSON lies.

    Raises:
        UsageError: What ``check_path`` refuses.
        RuntimeUnavailableError: jinja2 is not installed.
        OSError: A file cannot be written.
    """
    target = check_path(path)
    page = render(report)
    facts = target.with_suffix(".json")
    atomic_write(facts, report.model_dump_json() + "\n")
    atomic_write(target, page)
    return facts


def check_path(path: str | Path, *, ledger: str | Path | None = None) -> Path:
    """Return the path of a report; refuse early what could not be written after an hour of work.

    Args:
        path: Where the page goes.
        ledger: A file that is recorded into meanwhile, and must not be replaced by the report's JSON.

    Raises:
        UsageError: It does not end in .html, is a folder, its folder does not exist or cannot be written, or the JSON
            beside it would replace a file that is no report.
        RuntimeUnavailableError: jinja2 is not installed.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        raise UsageError(f"{target} cannot be a report.", hint="Give a file name that ends in .html.")
    if not target.parent.is_dir():
        raise UsageError(f"The folder {target.parent} of the report does not exist.")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"The folder {target.parent} of the report cannot be written.")
    facts = target.with_suffix(".json")
    taken = ledger is not None and facts.resolve() == Path(ledger).resolve()
    if taken or (facts.exists() and not _is_report(facts)):
        raise UsageError(
            f"{target} would put its facts into {facts}, which is something else.", hint="Choose another name."
        )
    if importlib.util.find_spec("jinja2") is None:
        raise RuntimeUnavailableError(
            "Reports are written with jinja2, which is not installed.", hint="pip install 'trtdeploy[report]'"
        )
    return target


def render(report: Report) -> str:
    """Return the page.

    Raises:
        ImportError: jinja2 is not installed; ``check_path`` says so in time.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"isolated": _isolated, "ms": _milliseconds, "measured": _measured}
    percentiles = {name: interval.value for name, interval in report.validation.latency_ms.items()}
    total_ms = sum(part.milliseconds for part in report.times)
    return environment.get_template("report.html.j2").render(
        report=report,
        validation=report.validation,
        gates=_GATES,
        stages=stage_chart(report.stages) if report.stages else None,
        lost=next((row for row in report.stages if row.loss_shown), None),
        latency=latency_chart(report.latency, percentiles),
        total_ms=total_ms,
        confusion=confusion(report),
    )


def _isolated(name: str) -> str:
    """Keep the writing direction of a name to itself, where an element cannot: in attributes and script text.

    Source: Unicode Standard Annex 9, first strong isolate and pop directional isolate.
    """
    return f"\u2068{name}\u2069"


def _measured(gate: Gate) -> str:
    """Return the measured value with four digits, and with more where these would hide why the gate does not hold."""
    shown = f"{gate.value:.4g}"
    return shown if gate.passed or float(shown) != gate.limit else f"{gate.value:.8g}"


def _milliseconds(value: float) -> str:
    """Return a time with two decimals, and with three where two would hide it."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _is_report(path: Path) -> bool:
    """Say whether a file is the JSON of an earlier report, of this version or another one."""
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"format", "validation", "confusion", "provenance"} <= facts.keys()
