"""Samples of different length, and inputs that are no batch, through ``quantize``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.calibration import AbsHistogram, amax_of
from trtdeploy.cli.main import app
from trtdeploy.data.samples import batch_indices, batches, open_samples
from trtdeploy.errors import DataError, InferenceError, QuantizationError, UsageError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.qdq.pairs import pairs
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.tensors import Array, TensorSpec

LENGTHS = (8, 12, 16, 24)
IDS = TensorSpec(name="ids", dtype="int64", shape=(-1, -1))
MASK = TensorSpec(name="mask", dtype="float32", shape=(-1, -1))


def token_model(batch: int | str = "n") -> onnx.ModelProto:
    """Embeddings, a linear layer, and a mean over what the mask leaves."""
    g = GraphMaker(quantized=False)
    table = g.constant(g.rng.standard_normal((30, 8)).astype(np.float32))
    weight = g.constant(g.rng.standard_normal((8, 6)).astype(np.float32))
    layer = g.node("Relu", g.node("MatMul", g.node("Gather", table, "ids"), weight))
    masked = g.node("Mul", layer, g.node("Unsqueeze", "mask", g.constant(np.array([-1]))))
    pooled = g.node("ReduceMean", masked, axes=[1], keepdims=0)
    last = g.constant(g.rng.standard_normal((6, 3)).astype(np.float32))
    g.node("MatMul", pooled, last, output="y")
    model = g.model({"ids": [batch, "length"], "mask": [batch, "length"]}, {"y": [batch, 3]})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place, length in enumerate(LENGTHS):
        mask = np.ones((10, length), np.float32)
        mask[:5, length // 2 :] = 0
        np.savez(folder / f"{place}.npz", ids=rng.integers(0, 30, (10, length)), mask=mask)
    return folder


def test_batches_have_one_shape_and_hold_every_sample(lengths: Path) -> None:
    with open_samples(str(lengths), [IDS, MASK], None) as opened:
        chosen = list(range(1, len(opened.samples.ids)))
        assert sorted(i for part in batch_indices(opened.samples, chosen, 8) for i in part) == chosen
        sizes = [batch["ids"].shape for batch in batches(opened.samples, chosen, 8)]
    assert sizes == [(8, 8), (1, 8), (8, 12), (2, 12), (8, 16), (2, 16), (8, 24), (2, 24)]


@pytest.mark.parametrize("method", ["max", "auto"])
@pytest.mark.parametrize("batch_size", [1, 8, 10, 64])
def test_samples_of_different_length_are_run_one_shape_at_a_time(
    method: str, batch_size: int, lengths: Path, tmp_path: Path
) -> None:
    source, output = save(token_model(), tmp_path / "m.onnx"), tmp_path / "int8.onnx"
    done = quantize(source, output, str(lengths), PtqOptions(method=method, batch_size=batch_size))
    assert done.calibration["images"] == 40
    expected, answered = [], []
    for file in sorted(lengths.iterdir()):
        arrays = dict(np.load(file))
        expected.append(as_exported(source, arrays)[0])
        answered.append(as_exported(output, arrays)[0])
    assert done.output_sqnr_db == pytest.approx(decibel(expected, answered), abs=0.1)


def test_a_model_of_a_fixed_batch_wants_whole_batches_of_every_shape(lengths: Path, tmp_path: Path) -> None:
    for batch in (2, 5):
        source = save(token_model(batch), tmp_path / f"{batch}.onnx")
        done = quantize(source, tmp_path / "int8.onnx", str(lengths), PtqOptions(method="auto"))
        assert done.calibration["images"] == 40
    source = save(token_model(4), tmp_path / "4.onnx")
    with pytest.raises(UsageError, match=r"exactly 4, and 10 samples of the shape of 0\.npz:8"):
        quantize(source, tmp_path / "int8.onnx", str(lengths), PtqOptions(method="max"))


def scaled_model(shape: list[int | str], dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    g = GraphMaker(quantized=False)
    factor = g.node("Cast", "t", to=TensorProto.FLOAT)
    weight = g.constant(g.rng.standard_normal((16, 4)).astype(np.float32))
    g.node("MatMul", g.node("Mul", "a", factor), weight, output="y")
    model = g.model({"a": ["n", 16], "t": shape}, {"y": ["n", 4]})
    model.graph.input[1].type.tensor_type.elem_type = dtype
    return model


@pytest.mark.parametrize("shape", [[], [1]])
def test_a_threshold_is_fixed_by_a_number_or_a_file(shape: list[int | str], tmp_path: Path) -> None:
    source, output = save(scaled_model(shape), tmp_path / "m.onnx"), tmp_path / "int8.onnx"
    rows = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    np.savez(tmp_path / "a.npz", a=rows)
    np.savez(tmp_path / "both.npz", a=rows, t=np.full(shape, 0.5, np.float32))
    np.save(tmp_path / "t.npy", np.full(shape, 0.25, np.float32))
    for data in ("a.npz", "both.npz"):
        with pytest.raises(DataError, match="--fixed") as caught:
            quantize(source, output, str(tmp_path / data), PtqOptions(method="max"))
        assert "--fixed t=FILE|VALUE" in str(caught.value) or "--fixed NAME=FILE|VALUE" in str(caught.value)
        for fixed, factor in (("t=.5", 0.5), (f"t={tmp_path / 't.npy'}", 0.25)):
            options = PtqOptions(method="max", fixed=(fixed,))
            done = quantize(source, output, str(tmp_path / data), options)
            assert done.calibration["fixed"] == [fixed]
            scale = next(p.quantizer.scale for p in pairs(Graph(onnx.load(output).graph)) if not p.is_constant)
            assert scale == pytest.approx(np.abs(rows).max() * factor / 127, rel=1e-5)


def test_a_state_is_what_one_sample_gets(tmp_path: Path) -> None:
    """As in a voice model: the state (layers, batch, size) is no sample, and its batch is not the first axis."""
    g = GraphMaker(quantized=False)
    first, second, last = (g.constant(g.rng.standard_normal((8, 8)).astype(np.float32)) for _ in range(3))
    state = g.node("Concat", g.node("Unsqueeze", "x", g.constant(np.array([0]))), "state", axis=0)
    summed = g.node("ReduceSum", g.node("MatMul", state, first), g.constant(np.array([0])), keepdims=0)
    g.node("MatMul", g.node("Tanh", g.node("MatMul", summed, second)), last, output="y")
    source = save(g.model({"x": ["n", 8], "state": [2, "n", 8]}, {"y": ["n", 8]}), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", g.rng.standard_normal((16, 8)).astype(np.float32))
    given = (source, tmp_path / "8.onnx", str(tmp_path / "x.npy"))
    with pytest.raises(InferenceError, match=r"give --batch 1"):
        quantize(*given, PtqOptions(fixed=("state=0.5",)))
    done = quantize(*given, PtqOptions(fixed=("state=0.5",), batch_size=1))
    assert done.output_sqnr_db is not None
    assert done.output_sqnr_db > 20


def test_samples_of_zeros_are_refused_whatever_is_fixed(tmp_path: Path) -> None:
    source = save(scaled_model([]), tmp_path / "m.onnx")
    np.savez(tmp_path / "a.npz", a=np.zeros((16, 16), np.float32))
    with pytest.raises(DataError, match="are zeros"):
        quantize(source, tmp_path / "8.onnx", str(tmp_path / "a.npz"), PtqOptions(method="max", fixed=("t=1",)))


def test_inputs_of_different_batch_sizes_are_told_apart_by_name(tmp_path: Path) -> None:
    model = scaled_model([1])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    source = save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "a.npz", a=np.ones((8, 16), np.float32), t=np.ones(8, np.float32))
    with pytest.raises(UsageError, match="different batch sizes: a 4, t 1") as caught:
        quantize(source, tmp_path / "8.onnx", str(tmp_path / "a.npz"), PtqOptions(method="max"))
    assert "--fixed" in str(caught.value)


def test_the_command_takes_fixed_inputs(tmp_path: Path) -> None:
    source = save(scaled_model([], TensorProto.INT64), tmp_path / "m.onnx")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32))
    command = ["quantize", str(source), "-o", str(tmp_path / "8.onnx"), "--data", str(tmp_path / "a.npy")]
    done = CliRunner().invoke(app, [*command, "--method", "max", "--fixed", "t=3"])
    assert done.exit_code == 0, done.output
    assert "1 of 1 layer and 1 activation in INT8; max over 16 samples" in done.stdout
    done = CliRunner().invoke(app, [*command, "--fixed", "t=half"])
    assert done.exit_code == 2
    assert "no file half" in done.stderr


@pytest.mark.parametrize("method", ["max", "auto"])
def test_a_head_without_rows_is_named(method: str, tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    found = g.node("NonZero", g.node("Greater", "x", g.constant(np.float32(1e6))))
    rows = g.node("GatherND", "x", g.node("Transpose", found, perm=[1, 0]))
    column = g.node("Unsqueeze", rows, g.constant(np.array([1])), output="rows")
    g.node("MatMul", column, g.constant(np.ones((1, 3), np.float32)), output="found")
    g.node("MatMul", "x", g.constant(np.ones((6, 3), np.float32)), output="y")
    source = save(g.model({"x": ["n", 6]}, {"y": ["n", 3], "found": ["k", 3]}), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32))
    with pytest.raises(QuantizationError, match="No sample gave 'rows' a value"):
        quantize(source, tmp_path / "8.onnx", str(tmp_path / "x.npy"), PtqOptions(method=method))


def test_auto_takes_its_ranges_from_all_samples_once_the_method_is_chosen(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    source, output = save(model, tmp_path / "m.onnx"), tmp_path / "8.onnx"
    rows = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    chosen = quantize(source, output, str(tmp_path / "x.npy"))
    assert chosen.calibration["images"] == 64
    histogram = AbsHistogram()
    histogram.add(rows)
    method, percentile = chosen.calibration["method"], chosen.calibration["percentile"]
    expected = amax_of(histogram, method, percentile=percentile or 100) / 127
    scale = next(p.quantizer.scale for p in pairs(Graph(onnx.load(output).graph)) if not p.is_constant)
    assert scale == pytest.approx(expected, rel=1e-6)
    three_quarters = AbsHistogram()
    three_quarters.add(np.delete(rows, np.linspace(0, 63, 16).round().astype(int), axis=0))
    assert amax_of(three_quarters, method, percentile=percentile or 100) / 127 != pytest.approx(expected, rel=1e-6)


def decibel(expected: list[Array], answered: list[Array]) -> float:
    signal = sum(float(np.square(each.astype(np.float64)).sum()) for each in expected)
    noise = sum(
        float(np.square(one.astype(np.float64) - other).sum()) for one, other in zip(expected, answered, strict=True)
    )
    return 10 * float(np.log10(signal / noise))
