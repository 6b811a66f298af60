"""The dB that ``quantize`` prints is that of the file, by ONNX Runtime without optimization and by numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from tests.small_networks import NETWORKS
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.engine import Engine
from trtdeploy.errors import GateError, QuantizationError
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.tensors import Array


def plain(path: Path, inputs: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    answers: list[Array] = onnxruntime.InferenceSession(str(path), options).run(None, inputs)
    return answers


def numpys(path: Path, inputs: dict[str, Array]) -> list[Array]:
    answers = ReferenceEvaluator(str(path)).run(None, inputs)
    return list(answers)


def decibel(expected: list[Array], answered: list[Array]) -> float:
    one, other = (np.concatenate([each.ravel() for each in given]).astype(np.float64) for given in (expected, answered))
    with np.errstate(divide="ignore"):  # equal answers are infinitely close
        return 10 * float(np.log10(np.square(one).sum() / np.square(one - other).sum()))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_quantize_prints_is_what_the_file_computes(name: str, target: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    source, written = save(network.model, tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    np.savez(tmp_path / "samples.npz", **network.samples)
    method = "auto" if target == "tensorrt" else "max"
    command = ["quantize", str(source), "-o", str(written), "--data", str(tmp_path / "samples.npz")]
    done = CliRunner().invoke(app, [*command, "--method", method, "--target", target])
    assert done.exit_code == 0, done.output
    worst_of = r"of the worst channel \((\S+)\[[:, ]*\d+\]\) ([\d.]+) dB"
    printed = re.search(rf"SQNR of the outputs ([\d.]+) dB, {worst_of}", done.stdout)
    assert printed is not None, done.stdout
    shown, worst = float(printed[1]), float(printed[3])
    rounding = 0.05
    evaluators = [plain, numpys] if target == "tensorrt" else [plain]
    for run in evaluators:
        expected, answered = run(source, network.samples), run(written, network.samples)
        assert shown == pytest.approx(decibel(expected, answered), abs=0.1 + rounding)
        place = [value.name for value in network.model.graph.output].index(printed[2])
        channels = np.moveaxis(expected[place], 1 if expected[place].ndim != 3 else -1, 0)
        others = np.moveaxis(answered[place], 1 if expected[place].ndim != 3 else -1, 0)
        if name != "weights_of_three_dimensions":  # of which channels are last, in four dimensions
            assert worst == pytest.approx(min(map(lambda a, b: decibel([a], [b]), channels, others)), abs=0.2)
    built = build(written, tmp_path / "m.plan", BuildConfig(timing_rounds=1, threads=1))
    with Engine.load(built.path) as engine:
        given = {key: array[:1] for key, array in network.samples.items()}
        from_plan = list(engine.infer(given).values())
    assert decibel(plain(written, given), from_plan) > 20


def linear(*, above: str | None = None, offset: float = 0.0) -> onnx.ModelProto:
    """A linear layer of 6 to 4 on an input "x", and something above it."""
    g = GraphMaker(quantized=False)
    layer = g.node("MatMul", "x", g.constant(g.rng.standard_normal((6, 4)).astype(np.float32)))
    moved = g.node("Add", layer, g.constant(np.float32(offset)))
    g.node(above or "Identity", moved, output="y")
    return g.model({"x": ["n", 6]}, {"y": ["n", 4]})


@pytest.mark.parametrize("method", ["max", "auto"])
def test_a_model_that_answers_nan_is_refused(method: str, tmp_path: Path) -> None:
    source = save(linear(above="Log"), tmp_path / "m.onnx")  # of negative numbers
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32))
    with pytest.raises(QuantizationError, match=r"answers NaN: \d+ of \d+ values of 'y'"):
        quantize(source, tmp_path / "8.onnx", str(tmp_path / "x.npy"), PtqOptions(method=method))
    assert not (tmp_path / "8.onnx").exists()


def test_answers_that_hold_nothing_of_the_float_models_are_exit_code_1_in_the_first_line(tmp_path: Path) -> None:
    """One value ten million times as large as all others: with its range, every other value is rounded to zero."""
    g = GraphMaker(quantized=False)
    first = g.node("MatMul", "x", g.constant(np.eye(6, dtype=np.float32)))
    g.node("Slice", first, *(g.constant(np.array([place])) for place in (1, 6, 1)), output="y")
    source = save(g.model({"x": ["n", 6]}, {"y": ["n", 5]}), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).uniform(0.5, 1, (32, 6)).astype(np.float32)
    rows[:, 0] = 1e7
    np.save(tmp_path / "x.npy", rows)
    command = ["quantize", str(source), "-o", str(tmp_path / "8.onnx"), "--data", str(tmp_path / "x.npy")]
    done = CliRunner().invoke(app, [*command, "--method", "max"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: The INT8 model's answers hold nothing of the float model's")
    assert "SQNR 0.0 dB" in done.stderr.splitlines()[0]
    assert not (tmp_path / "8.onnx").exists()


def test_answers_that_are_finite_only_in_float_are_exit_code_1(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    layer = g.node("MatMul", "x", g.constant(np.array([[1.0]], np.float32)))
    g.node("Reciprocal", layer, output="y")  # of what is rounded to zero
    source = save(g.model({"x": ["n", 1]}, {"y": ["n", 1]}), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.array([[1000.0], [0.25], [500.0], [2.0]], np.float32))
    with pytest.raises(GateError, match="NaN or infinity where the float model does not: 2 of 4 values of 'y'"):
        quantize(source, tmp_path / "8.onnx", str(tmp_path / "x.npy"), PtqOptions(method="max"))
    assert not (tmp_path / "8.onnx").exists()


def test_the_worst_channel_is_named_where_the_mean_hides_it(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    weight = np.eye(4, dtype=np.float32)
    hidden = g.node("MatMul", "x", g.constant(weight))
    g.node("Relu", g.node("MatMul", hidden, g.constant(weight)), output="y")
    source = save(g.model({"x": ["n", 4]}, {"y": ["n", 4]}), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).uniform(0.5, 1, (32, 4)).astype(np.float32) * [1, 1, 1e-4, 1]
    np.save(tmp_path / "x.npy", rows.astype(np.float32))
    done = quantize(source, tmp_path / "8.onnx", str(tmp_path / "x.npy"), PtqOptions(method="max"))
    assert done.output_sqnr_db is not None
    assert done.output_sqnr_db > 40
    assert done.worst_channel is not None
    assert (str(done.worst_channel), round(done.worst_channel.sqnr_db, 1)) == ("y[:, 2]", 0.0)
    assert done.as_json()["worst_channel"] == {"name": "y", "axis": 1, "index": 2, "sqnr_db": 0.0}


def test_a_constant_weight_of_three_dimensions_is_built(tmp_path: Path) -> None:
    """ONNX Runtime's fused kernel for it fails; a tactic that it refuses is not taken, and the build goes on."""
    network = NETWORKS["weights_of_three_dimensions"]()
    source, written = save(network.model, tmp_path / "m.onnx"), tmp_path / "8.onnx"
    np.save(tmp_path / "x.npy", network.samples["x"])
    done = quantize(source, written, str(tmp_path / "x.npy"))
    assert (done.quantized_layers, done.layers) == (2, 2)
    built = build(written, tmp_path / "m.plan", BuildConfig(timing_rounds=1))
    with Engine.load(built.path) as engine:
        answered = engine.infer({"x": network.samples["x"]})["y"]
    np.testing.assert_allclose(answered, plain(written, network.samples)[0], rtol=1e-3, atol=1e-3)
