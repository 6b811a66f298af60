"""What a report says, apart from how it looks."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.engine import Engine
from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.report import Report, compose, render, write_report
from trtdeploy.report.charts import latency_chart, stage_chart
from trtdeploy.report.confusion import LEVELS, MOST_CLASSES, confusion
from trtdeploy.report.content import Histogram, StageRow
from trtdeploy.report.page import check_path
from trtdeploy.statistics import Interval
from trtdeploy.validation import Examination, Gate, PlanTarget, ValidationOptions, examine

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


def test_scores_that_nothing_is_named_for_are_numbers_in_the_matrix(
    target: PlanTarget, digits: Dataset, examination: Examination
) -> None:
    outputs = examination.answers.outputs
    wide, narrow = np.pad(outputs.logits, ((0, 0), (0, 2))), outputs.logits[:, :5]
    wide[:7, 11] = wide.max() + 1
    for logits, size in ((wide, 12), (narrow, 10)):
        answers = dataclasses.replace(examination.answers, outputs=dataclasses.replace(outputs, logits=logits))
        classes = examination.classes[: min(10, logits.shape[1])]
        made = compose(target, digits, dataclasses.replace(examination, answers=answers, classes=classes))
        matrix = np.asarray(made.confusion)
        assert matrix.shape == (size, size)
        assert matrix.sum() == 359
        assert made.classes == tuple(map(str, range(size)))
        render(made)
    assert matrix[:, 5:].sum() == 0


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
    facts = json.loads(manifest_path(qdq_plan.path).read_text())
    (tmp_path / "other.json").write_text(json.dumps({**facts, "plan_sha256": "0" * 64}))
    other = CliRunner().invoke(app, [*common, "--manifest", str(tmp_path / "other.json")])
    assert other.exit_code == 2
    assert "is not the manifest of" in other.stderr


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
    histogram = Histogram(edges_ms=(1, 2, 4, 50), counts=(5, 0, 1))
    bars = latency_chart(histogram, {"p50": 2, "p99": 50})
    assert [bar.height > 0 for bar in bars.bars] == [True, False, True]
    assert all(0 <= mark.at <= bars.width for mark in bars.marks)
    assert bars.marks[0].at == pytest.approx(bars.bars[1].x - 0.5)  # where the first bin ends


@pytest.mark.parametrize(("low", "high"), [(0.01, 90), (1, 9), (5.0, 5.2), (0.3, 0.9), (900, 4000), (1e-6, 1e-5)])
def test_the_axis_of_latency_has_a_few_round_values(low: float, high: float) -> None:
    edges = tuple(np.geomspace(low, high, 41).tolist())
    ticks = latency_chart(Histogram(edges_ms=edges, counts=(1,) * 40), {}).ticks
    assert 2 <= len(ticks) <= 8
    assert all(low * 0.999 <= float(tick.text) <= high * 1.001 for tick in ticks)
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)


def with_confusion(report: Report, counts: np.ndarray) -> Report:
    classes = tuple(f"class {index}" for index in range(len(counts)))
    return report.model_copy(update={"classes": classes, "confusion": tuple(tuple(map(int, row)) for row in counts)})


def test_of_very_many_classes_the_ones_with_mistakes_are_in_the_matrix(report: Report) -> None:
    counts = np.diag(np.full(500, 7))
    counts[400, 20], counts[30, 499], counts[8, 9] = 3, 5, 1
    shown = confusion(with_confusion(report, counts))
    assert len(shown.rows) == len(shown.classes) == MOST_CLASSES
    assert shown.left_out == 400
    assert {f"class {index}" for index in (400, 20, 30, 499, 8, 9)} <= set(shown.classes)
    for place, row in enumerate(shown.rows):
        assert row.label == shown.classes[place]
        assert row.cells[row.diagonal] == (7, LEVELS)
    found = {
        (row.label, shown.classes[i]): n for row in shown.rows for i, (n, _) in enumerate(row.cells) if n != 7 and n
    }
    assert found == {("class 400", "class 20"): 3, ("class 30", "class 499"): 5, ("class 8", "class 9"): 1}
    assert [(item.label, item.answer, item.count, item.of) for item in shown.mistakes] == [
        ("class 30", "class 499", 5, 12),
        ("class 400", "class 20", 3, 10),
        ("class 8", "class 9", 1, 8),
    ]


def test_a_few_mistakes_are_not_pale_beside_many_right_answers(report: Report) -> None:
    counts = np.diag(np.full(3, 10_000))
    counts[0, 1], counts[2, 1] = 4, 1
    shown = confusion(with_confusion(report, counts))
    assert [row.cells[1][1] for row in shown.rows] == [LEVELS, LEVELS, LEVELS // 2]
    assert shown.mistakes == ()  # the matrix of three says it


def test_a_perfect_model_has_no_mistake(report: Report) -> None:
    page = render(with_confusion(report, np.diag(np.full(40, 3))))
    assert "No mistake: every sample of the 40 classes" in page
    assert "Most frequent mistakes" not in page


def test_a_gate_that_fails_by_little_shows_by_how_much(report: Report) -> None:
    gates = (
        Gate(name="agreement", value=99.98999, limit=99.99, passed=False),
        Gate(name="top-1 drop", value=0.25125, limit=0.5, passed=True),
    )
    page = render(report.model_copy(update={"validation": report.validation.model_copy(update={"gates": gates})}))
    assert '<td class="n">99.98999</td>' in page
    assert '<td class="n">0.2512</td>' in page


def test_the_facts_of_a_report_replace_nothing_else(report: Report, tmp_path: Path, qdq_plan: Plan) -> None:
    ledger = tmp_path / "r.json"
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--ledger", str(ledger)]
    done = CliRunner().invoke(app, [*common, "--report", str(tmp_path / "r.html")])
    assert done.exit_code == 2
    assert "r.json, which is something else" in done.stderr
    assert not ledger.exists()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="something else"):
        write_report(report, tmp_path / "manifest.html")
    assert (tmp_path / "manifest.json").read_text() == "{}"
    for _ in range(2):  # a report may replace a report
        write_report(report, tmp_path / "again.html")


def test_a_report_that_cannot_be_rendered_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeUnavailableError, match="jinja2"):
        check_path(tmp_path / "out.html")
