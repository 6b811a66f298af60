"""Choosing a method for models whose outputs say little: class numbers, other first dimensions, nothing but zeros."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from trtdeploy.cli.main import app
from trtdeploy.errors import DataError, UsageError
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.quantizing.method_choice import CANDIDATES, Score, best_of, score_candidates
from trtdeploy.quantizing.output_scores import Answers, answers_of, per_sample_sqnr_db


def classifier(*, offset: float = 0.0) -> GraphMaker:
    """A convolution and a linear layer on images of 3 x 8 x 8; the tensor "logits" has five values per sample."""
    g = GraphMaker(quantized=False)
    features = g.node("Relu", g.node("Add", g.conv("x", 3, 8, kernel=3), g.constant(np.float32(offset))))
    flat = g.node("Flatten", g.node("GlobalAveragePool", features))
    g.node("Gemm", flat, g.weight(5, 8), transB=1, output="logits")
    return g


def with_output(g: GraphMaker, name: str, dtype: int, shape: list[int | str]) -> onnx.ModelProto:
    model = g.model({"x": ["n", 3, 8, 8]}, {name: shape})
    model.graph.output[0].type.tensor_type.elem_type = dtype
    return model


@pytest.fixture
def samples(tmp_path: Path) -> str:
    given = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    given[5] *= 40  # so that methods differ
    np.save(tmp_path / "samples.npy", given)
    return str(tmp_path / "samples.npy")


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_classifier_that_ends_in_argmax_is_judged_by_what_it_chooses_from(samples: str, tmp_path: Path) -> None:
    g = classifier()
    g.node("ArgMax", "logits", axis=1, keepdims=0, output="y")
    source, written = save(with_output(g, "y", TensorProto.INT64, ["n"]), tmp_path / "a.onnx"), tmp_path / "int8.onnx"
    done = CliRunner().invoke(app, ["quantize", str(source), "-o", str(written), "--data", samples, "--json"])
    assert done.exit_code == 0, done.output
    facts = load_source(written).calibration
    assert facts == strict(done.stdout)["calibration"]
    assert facts["judged_by"] == ["logits"]
    scores = facts["candidates"]
    assert len(set(scores.values())) > 1
    chosen = facts["method"] if facts["percentile"] is None else f"{facts['method']} {facts['percentile']:g}"
    assert scores[chosen] == max(scores.values())
    assert strict(done.stdout)["output_sqnr_db"] > 0


def test_outputs_without_one_first_dimension_are_compared_batch_by_batch(samples: str, tmp_path: Path) -> None:
    g = classifier()
    g.node("Transpose", "logits", perm=[1, 0], output="y")
    model = with_output(g, "y", TensorProto.FLOAT, [5, "n"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5]))
    done = quantize(save(model, tmp_path / "t.onnx"), tmp_path / "int8.onnx", samples, PtqOptions(batch_size=4))
    assert done.calibration["judged_by"] == ["y", "logits"]
    assert all(score > 0 for score in done.calibration["candidates"].values())
    assert load_source(tmp_path / "int8.onnx").calibration == done.calibration
    rows = [np.ones((5, 2)), np.ones((2, 5))]
    assert per_sample_sqnr_db(rows, rows) == [math.inf]
    assert per_sample_sqnr_db(rows[:1], [np.ones((5, 2)) * [[1], [1], [2], [1], [1]]])[2] == pytest.approx(0)


@pytest.mark.parametrize("method", ["auto", "max"])
def test_samples_of_zeros_are_refused(method: str, tmp_path: Path) -> None:
    np.save(tmp_path / "zeros.npy", np.zeros((64, 3, 8, 8), np.float32))
    source = save(with_output(classifier(), "logits", TensorProto.FLOAT, ["n", 5]), tmp_path / "c.onnx")
    with pytest.raises(DataError, match="samples are zeros"):
        quantize(source, tmp_path / "int8.onnx", str(tmp_path / "zeros.npy"), PtqOptions(method=method))
    assert not (tmp_path / "int8.onnx").exists()


def test_a_model_that_always_answers_zero_leaves_nothing_to_choose_by(samples: str, tmp_path: Path) -> None:
    source = save(with_output(classifier(offset=-1e6), "logits", TensorProto.FLOAT, ["n", 5]), tmp_path / "c.onnx")
    with pytest.raises(UsageError, match=r"Nothing tells the methods apart.*equal to the float model's"):
        quantize(source, tmp_path / "int8.onnx", samples)
    assert not (tmp_path / "int8.onnx").exists()
    done = quantize(source, tmp_path / "int8.onnx", samples, PtqOptions(method="max"))
    assert done.output_sqnr_db is None
    strict(json.dumps(done.as_json()))
    told = CliRunner().invoke(
        app, ["quantize", str(source), "-o", str(tmp_path / "2.onnx"), "--data", samples, "--method", "max"]
    )
    assert told.exit_code == 0, told.output
    assert "SQNR of the outputs not finite (no answer differs)" in told.stdout


def test_without_anything_float_to_judge_by_a_method_has_to_be_given() -> None:
    g = classifier()
    with pytest.raises(UsageError, match="nothing to judge by"):
        score_candidates(g.model({"x": ["n", 3, 8, 8]}, {"logits": ["n", 5]}), lambda _: None, [], print, Answers({}))
    g = GraphMaker()
    g.node("Cast", "x", to=TensorProto.INT64, output="y")
    assert answers_of(with_output(g, "y", TensorProto.INT64, ["n"])).types == {}


def test_another_number_of_values_is_not_compared(samples: str, tmp_path: Path) -> None:
    """A detector answers as many boxes as it finds, and an INT8 model may find another number of them."""
    g = classifier()
    flat = g.node("Reshape", "logits", g.constant(np.array([-1])))
    near = g.node("Less", g.node("Abs", flat), g.constant(np.float32(0.02)))
    g.node("Compress", flat, near, output="y")
    source = save(with_output(g, "y", TensorProto.FLOAT, ["found"]), tmp_path / "d.onnx")
    done = quantize(source, tmp_path / "int8.onnx", samples, PtqOptions(method="max", batch_size=64))
    assert (done.output_sqnr_db, done.not_compared) == (None, "another number of values is answered")
    assert per_sample_sqnr_db([np.ones((2, 3))], [np.ones((3, 3))]) == [-math.inf]


def test_equal_medians_are_parted_by_the_noise() -> None:
    scores = {candidate: Score(math.inf, 0.5) for candidate in CANDIDATES}
    with pytest.raises(UsageError):
        best_of(scores)
    scores[CANDIDATES[3]] = Score(math.inf, 0.25)
    assert best_of(scores) == CANDIDATES[3]
    assert best_of({**scores, CANDIDATES[4]: Score(30.0, 0.1)}) == CANDIDATES[3]
    with pytest.raises(UsageError, match="all zeros"):
        best_of({candidate: Score(-math.inf, math.inf) for candidate in CANDIDATES})
