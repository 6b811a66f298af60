from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.errors import LedgerError, UsageError
from trtdeploy.ledger import Ledger, Stage, StageOutputs
from trtdeploy.ledger.diff import diff_ledgers, diff_stages
from trtdeploy.statistics import softmax_kl, tango_percent

N = 400


def outputs(wrong: range, *, classes: int = 8, ids: str = "s") -> StageOutputs:
    """All samples are of class 2 and are answered so, but those in ``wrong``, which are answered 1."""
    logits = np.zeros((N, classes), np.float32)
    logits[:, 2] = 3
    logits[list(wrong), 1] = 5
    return StageOutputs(tuple(f"{ids}{index:03}" for index in range(N)), np.full(N, 2), logits)


def write(path: Path, **stages: StageOutputs) -> Ledger:
    ledger = Ledger(path)
    for stage, answered in stages.items():
        name: Stage = stage  # type: ignore[assignment]
        ledger.record(name, answered, seconds=1, source={}, dataset={"name": "d"})
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The loss is at the step to ``onnx``; what ``ptq`` loses is within chance."""
    return write(
        tmp_path / "ledger.json",
        float=outputs(range(10)),
        ptq=outputs(range(8, 20)),
        onnx=outputs(range(8, 60)),
        plan=outputs(range(8, 61)),
    )


def test_the_record_holds_the_paired_differences_top5_and_divergence(ledger: Ledger) -> None:
    record = ledger.stages["onnx"]
    assert record.against_previous is not None
    assert record.against_float is not None
    assert record.kl_from_float is not None
    assert record.against_previous.difference == tango_percent(0, 40, N)
    assert (record.against_float.gained, record.against_float.lost) == (8, 50)
    divergence = softmax_kl(outputs(range(10)).logits, outputs(range(8, 60)).logits)
    assert record.kl_from_float.mean == pytest.approx(divergence.mean())
    assert record.kl_from_float.p99 == pytest.approx(np.percentile(divergence, 99))
    assert record.top5 is not None
    assert record.top5.value == 100
    assert ledger.stages["float"].against_previous is None


@pytest.mark.parametrize(("classes", "known"), [(5, False), (6, True)])
def test_top5_is_left_out_where_it_says_nothing(classes: int, known: bool) -> None:
    assert (outputs(range(3), classes=classes).top5 is not None) is known


def test_top5_counts_the_five_best_only() -> None:
    logits = np.tile(np.arange(7, dtype=np.float32), (4, 1))
    top5 = StageOutputs(tuple("abcd"), np.array([6, 2, 1, 0]), logits).top5
    assert top5 is not None
    assert top5.value == 50


def test_the_first_stage_with_a_shown_loss_is_named(ledger: Ledger) -> None:
    found = diff_stages(ledger)
    assert found.lost_at == "onnx"
    assert [item.loss_shown for item in found.comparisons] == [False, True, False]
    assert found.verdict.startswith("onnx lost the accuracy: -10.00 [")
    blamed = found.comparisons[1]
    assert (blamed.flips, len(blamed.flipped)) == (40, 10)
    assert blamed.flipped[0].model_dump() == {"id": "s020", "label": 2, "reference": 2, "answer": 1}


def test_a_threshold_a_pair_and_a_limit(ledger: Ledger) -> None:
    assert diff_stages(ledger, threshold=10.5).verdict == "No loss of more than 10.5 points is shown."
    (only,) = diff_stages(ledger, start="float", end="ptq", limit=100).comparisons
    assert (only.reference, only.stage, only.flips, only.loss_shown) == ("float", "ptq", 18, False)
    lost = [flip.answer == 1 for flip in only.flipped]
    assert lost == [True] * 10 + [False] * 8  # lost ones first
    with pytest.raises(UsageError, match="compared with itself"):
        diff_stages(ledger, start="ptq", end="ptq")


def test_two_ledgers_are_compared_stage_by_stage(ledger: Ledger, tmp_path: Path) -> None:
    other = write(tmp_path / "new.json", float=outputs(range(10)), ptq=outputs(range(90)))
    found = diff_ledgers(ledger, other)
    assert found.lost_at == "ptq of new.json"
    assert [item.reference for item in found.comparisons] == ["float of ledger.json", "ptq of ledger.json"]
    strangers = write(tmp_path / "strangers.json", float=outputs(range(10), ids="t"))
    with pytest.raises(LedgerError, match=r"float of strangers.json cannot be compared .* different samples"):
        diff_ledgers(ledger, strangers)


def test_a_ledger_written_before_these_fields_still_loads(ledger: Ledger) -> None:
    content = json.loads(ledger.path.read_text())
    for record in content["stages"].values():
        for name in ("top5", "against_previous", "against_float", "kl_from_float"):
            del record[name]
    ledger.path.write_text(json.dumps(content))
    assert ledger.stages["ptq"].against_previous is None
    assert diff_stages(ledger).lost_at == "onnx"


def test_the_commands_show_and_name(ledger: Ledger) -> None:
    shown = CliRunner().invoke(app, ["ledger", "show", str(ledger.path)])
    assert shown.exit_code == 0
    assert "-10.00 [" in shown.stdout
    facts = json.loads(CliRunner().invoke(app, ["ledger", "show", str(ledger.path), "--json"]).stdout)
    assert facts["plan"]["against_previous"]["lost"] == 1
    named = CliRunner().invoke(app, ["ledger", "diff", str(ledger.path), "--limit", "2"])
    assert named.exit_code == 0
    assert "onnx lost the accuracy" in named.stdout
    assert "... and 38 more" in named.stdout
    assert (
        json.loads(CliRunner().invoke(app, ["ledger", "diff", str(ledger.path), "--json"]).stdout)["lost_at"] == "onnx"
    )
    assert CliRunner().invoke(app, ["ledger", "diff", str(ledger.path), "--from", "int8"]).exit_code == 2
