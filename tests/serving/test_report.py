"""What a report says, apart from how it looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.datasets import Dataset, open_dataset
from trtdeploy.engine import Engine
from trtdeploy.errors import UsageError
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.report import Report, compose, render, write_report
from trtdeploy.report.charts import latency_chart, stage_chart
from trtdeploy.report.content import Histogram, StageRow
from trtdeploy.statistics import Interval
from trtdeploy.validation import Examination, PlanTarget, ValidationOptions, examine

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with open_dataset("digits") as dataset:
        yield dataset


@pytest.fixture(scope="module")
def target(qdq_plan: Plan) -> Iterator[PlanTarget]:
    with Engine.load(qdq_plan.path, contexts=2) as engine:
        yield PlanTarget(engine, qdq_plan.path)


@pytest.fixture(scope="module")
def examination(target: PlanTarget, digits: Dataset) -> Examination:
    return examine(target, digits, ValidationOptions(batch_size=8))


@pytest.fixture(scope="module")
def report(target: PlanTarget, digits: Dataset, examination: Examination, qdq_plan: Plan) -> Report:
    return compose(target, digits, examination, manifest=qdq_plan.manifest)


def test_the_confusion_matrix_counts_every_sample_once(report: Report, examination: Examination) -> None:
    matrix = np.asarray(report.confusion)
    outputs = examination.answers.outputs
    assert matrix.sum() == report.validation.n == 359
    assert 100 * np.trace(matrix) / 359 == pytest.approx(report.validation.top1.value)
    np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(outputs.labels, minlength=10))
    np.testing.assert_array_equal(matrix.sum(axis=0), np.bincount(outputs.predictions, minlength=10))


def test_the_worst_disagreements_come_first_with_their_images(report: Report, digits: Dataset) -> None:
    margins = [item.margin for item in report.disagreements]
    assert margins == sorted(margins, reverse=True)
    assert report.disagreements_in_all == 359 - np.trace(np.asarray(report.confusion))
    labels = dict(zip(digits.split("test").ids, digits.split("test").labels.tolist(), strict=True))
    for item in report.disagreements:
        assert item.label == item.expected == digits.classes[labels[item.id]]
        assert item.answer != item.label
        assert item.kind == "lost"
        assert item.image.startswith("data:image/png;base64,")


def test_every_request_is_in_the_histogram(report: Report, examination: Examination) -> None:
    assert sum(report.latency.counts) == len(examination.answers.latencies_ms) == 45
    assert report.latency.edges_ms[-1] >= examination.answers.latencies_ms.max()
    assert report.times == ()  # no server


def test_without_gates_nothing_was_decided(report: Report, target: PlanTarget, digits: Dataset) -> None:
    assert report.passed is None
    assert "nothing was decided" in render(report)
    decided = compose(target, digits, examine(target, digits, ValidationOptions(max_variation=5, batch_size=32)))
    assert decided.passed is True
    assert "all 1 gates hold" in render(decided)
    assert "manifest of the plan was not given" in render(decided)


def test_names_cannot_break_out_of_the_page(report: Report) -> None:
    evil = '<script>alert("x")</script>'
    page = render(report.model_copy(update={"title": evil, "classes": (evil, *report.classes[1:])}))
    assert evil not in page
    assert page.count("<script>") == 1


def test_the_json_is_the_report(report: Report, tmp_path: Path) -> None:
    facts = write_report(report, tmp_path / "out.html")
    assert facts == tmp_path / "out.json"
    assert Report.model_validate_json(facts.read_text()) == report


@pytest.mark.parametrize("name", ["out.pdf", "out", "absent/out.html", "."])
def test_a_path_that_cannot_be_a_report_is_refused_before_anything_is_sent(
    name: str, qdq_plan: Plan, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.json"
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--ledger", str(ledger)]
    done = CliRunner().invoke(app, [*common, "--report", str(tmp_path / name)])
    assert done.exit_code == 2
    assert not ledger.exists()
    if name != ".":
        with pytest.raises(UsageError):
            write_report(None, tmp_path / name)  # type: ignore[arg-type]


def test_the_command_puts_ledger_gates_and_provenance_on_the_page(qdq_plan: Plan, tmp_path: Path) -> None:
    page, ledger = tmp_path / "r.html", tmp_path / "ledger.json"
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--batch-size", "32"]
    done = CliRunner().invoke(
        app, [*common, "--ledger", str(ledger), "--max-variation", "0.0000001", "--report", str(page)]
    )
    facts = json.loads((tmp_path / "r.json").read_text())
    assert done.exit_code == (0 if facts["passed"] else 1)
    assert [row["stage"] for row in facts["stages"]] == list(Ledger(ledger).stages) == ["plan"]
    assert facts["provenance"]["plan sha256"] == qdq_plan.manifest.plan_sha256
    assert facts["precision"]["weighted_layers"] == 3
    assert qdq_plan.manifest.plan_sha256 in page.read_text()
    bad = CliRunner().invoke(app, [*common, "--manifest", str(page)])
    assert bad.exit_code == 2
    assert "is no manifest of a plan" in bad.stderr
    assert manifest_path(qdq_plan.path).exists()


def test_the_charts_keep_within_their_frames() -> None:
    rows = tuple(
        StageRow(
            stage=name,
            n=100,
            top1=Interval(value=value, low=value - spread, high=value + spread),
            agreement=None,
            latency_ms=None,
            recorded_at="2026-01-01T00:00:00+00:00",
        )
        for name, value, spread in (("float", 80, 1), ("ptq", 20, 3), ("served", 79.9, 0))
    )
    chart = stage_chart(rows)
    for point in chart.points:
        assert 0 < point.y_high <= point.y <= point.y_low <= chart.bottom
        assert chart.left < point.x < chart.width
    assert chart.points[1].y > chart.points[2].y > chart.points[0].y
    one = stage_chart(rows[2:])
    assert 0 < one.points[0].y < one.bottom
    histogram = Histogram(edges_ms=(1, 2, 3, 50), counts=(5, 0, 1))
    bars = latency_chart(histogram, {"p50": 1.5, "p99": 50})
    assert [bar.height > 0 for bar in bars.bars] == [True, False, True]
    assert all(0 <= mark.at <= bars.width for mark in bars.marks)
