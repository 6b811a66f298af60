"""The checked-in example is what `trtdeploy package` writes today."""

from __future__ import annotations

from pathlib import Path

from trtdeploy.plan import Plan
from trtdeploy.triton.repository.package import package

EXAMPLE = Path(__file__).parents[2] / "model_repository"
NAME = "efficientnet_b0_digits"


def test_regenerating_changes_nothing(qdq_plan: Plan, tmp_path: Path) -> None:
    # The config depends on the plan's inputs, outputs, profiles, labels and preprocessing, which this plan shares.
    package(qdq_plan.path, tmp_path / "fresh", NAME)
    fresh = {
        path.relative_to(tmp_path / "fresh"): path.read_text()
        for path in (tmp_path / "fresh" / NAME).rglob("*")
        if path.is_file() and "engine.plan" not in path.name
    }
    kept = {
        path.relative_to(EXAMPLE): path.read_text()
        for path in (EXAMPLE / NAME).rglob("*")
        if path.is_file() and "engine.plan" not in path.name
    }
    assert fresh == kept
