"""Classifiers for the ledger: an ONNX file as it is, and a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.onnx_graphs import as_exported, block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import InferenceError, ModelError, ShapeError
from trtdeploy.plan import Plan
from trtdeploy.validation.classifiers import onnx_classifier, plan_classifier


def images(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((size, 3, 32, 32)).astype(np.float32)


def test_an_onnx_file_and_its_plan_classify_alike(qdq_onnx: Path, qdq_plan: Plan) -> None:
    expected = as_exported(qdq_onnx, {"input": images(20)})[0]
    with Engine.load(qdq_plan.path) as engine:
        scores = [onnx_classifier(qdq_onnx)(images(20)), plan_classifier(engine)(images(20))]
    for given in scores:
        np.testing.assert_allclose(given, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())


def test_a_batch_that_the_model_does_not_take_is_our_error(qdq_onnx: Path, qdq_plan: Plan) -> None:
    with pytest.raises(InferenceError, match=r"classifier\.onnx"):
        onnx_classifier(qdq_onnx)(images(2)[:, :1])
    with Engine.load(qdq_plan.path) as engine, pytest.raises(ShapeError):
        plan_classifier(engine)(images(2)[:, :1])


def test_more_than_one_output_is_no_classifier(tmp_path: Path) -> None:
    source = save(block_network(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="1 inputs and 2 outputs"):
        onnx_classifier(source)
    plan = build(source, tmp_path / "m.plan", BuildConfig(timing_rounds=1))
    with Engine.load(plan.path) as engine, pytest.raises(ModelError, match="2 outputs"):
        plan_classifier(engine)
