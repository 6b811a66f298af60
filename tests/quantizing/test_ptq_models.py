"""Models that quantization must not spoil: of old IR versions, with sums of whole numbers, partly in FP16."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.errors import DataError, QuantizationError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.qdq.pairs import put_in
from trtdeploy.onnxgraph.qdq.placement import Target
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.quantizing import PtqOptions, quantize

RNG = np.random.default_rng(0)


def images(folder: Path) -> str:
    np.save(folder / "x.npy", RNG.standard_normal((16, 3, 8, 8)).astype(np.float32))
    return str(folder / "x.npy")


def small(opset: int = 17) -> onnx.ModelProto:
    g = GraphMaker(quantized=False)
    g.node("Conv", g.node("Relu", g.conv("x", 3, 8, kernel=3)), g.weight(4, 8, 1, 1), output="y")
    return g.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 8, 8]}, opset=opset)


@pytest.mark.parametrize("opset", [9, 13])
def test_a_model_of_ir_version_3_becomes_one_that_keeps_onnxs_rules(opset: int, tmp_path: Path) -> None:
    """There every initializer is an input of the graph, too."""
    old = small(opset)
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    written = tmp_path / "int8.onnx"
    quantize(save(old, tmp_path / "old.onnx"), written, images(tmp_path), PtqOptions(method="max"))
    opened = load_source(written)
    assert [spec.name for spec in opened.inputs] == ["x"]
    assert [value.name for value in opened.proto.graph.input] == ["x"]  # a weight that a caller may give is no constant


def test_what_would_break_onnxs_rules_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_before(model: onnx.ModelProto, sites: dict) -> onnx.ModelProto:
        made = put_in(model, sites)
        made.ir_version = 3
        return made

    monkeypatch.setattr(sys.modules[quantize.__module__], "put_in", as_before)
    with pytest.raises(QuantizationError, match="would break ONNX's rules"):
        quantize(save(small(), tmp_path / "f.onnx"), tmp_path / "q.onnx", images(tmp_path), PtqOptions(method="max"))
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_sums_and_products_of_whole_numbers_stay_as_they_are(target: Target, tmp_path: Path) -> None:
    """The sizes that a Reshape needs, and indices, as every transformer computes them."""
    g = GraphMaker(quantized=False)
    sizes = g.node("Shape", "x")
    first, second = (g.node("Gather", sizes, g.constant(np.array([place]))) for place in (0, 2))
    shape = g.node("Concat", g.node("Mul", first, second), g.constant(np.array([-1])), axis=0)
    rows = g.node("Reshape", g.node("Add", g.conv("x", 3, 4), g.conv("x", 3, 4)), shape)
    index = g.node("Add", "ids", g.constant(np.array(1)))
    added = g.node("Add", index, index)
    g.node("Gather", rows, g.node("Clip", added, g.constant(np.array(0)), g.constant(np.array(7))), output="y")
    model = g.model({"x": ["n", 3, 8, 8], "ids": ["n"]}, {"y": ["n", 32]})
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    given = {"x": np.load(images(tmp_path)), "ids": np.arange(16)}
    np.savez(tmp_path / "data.npz", **given)
    written = tmp_path / "int8.onnx"
    options = PtqOptions(method="max", target=target)
    quantize(save(model, tmp_path / "f.onnx"), written, str(tmp_path / "data.npz"), options)
    [exact], [near] = as_exported(model, given), as_exported(written, given)
    assert np.abs(exact - near).max() < 0.05 * np.abs(exact).max()
    quantized = {node.input[0] for node in onnx.load(written).graph.node if node.op_type == "QuantizeLinear"}
    assert "x" in quantized
    assert quantized.isdisjoint({sizes, first, second, shape, index, added, "ids"})


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_part_in_fp16_stays_as_it_is(target: Target, tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    half = g.node("Cast", g.node("Relu", g.conv("x", 3, 8, kernel=3)), to=TensorProto.FLOAT16)
    weight = g.constant((RNG.standard_normal((4, 8, 1, 1)) * 0.3).astype(np.float16))
    result = g.node("Conv", half, weight)
    pooled = g.node("GlobalAveragePool", g.node("Add", result, result))
    g.node("Cast", pooled, to=TensorProto.FLOAT, output="y")
    model = g.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 1, 1]})
    written = tmp_path / "int8.onnx"
    options = PtqOptions(method="max", target=target)
    done = quantize(save(model, tmp_path / "f.onnx"), written, images(tmp_path), options)
    assert (done.quantized_layers, done.layers) == (1, 2)
    graph = Graph(load_source(written).proto.graph)
    assert graph.maker(graph.producer[result].input[0], "DequantizeLinear") is None
    onnx.shape_inference.infer_shapes(onnx.load(written), check_type=True, strict_mode=True)


def test_an_input_of_one_value_is_no_row_per_sample(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    g.node("Mul", g.conv("x", 3, 4), "factor", output="y")
    source = save(g.model({"x": ["n", 3, 8, 8], "factor": []}, {"y": ["n", 4, 8, 8]}), tmp_path / "f.onnx")
    np.savez(tmp_path / "data.npz", x=np.load(images(tmp_path)), factor=np.float32(2))
    with pytest.raises(DataError, match=r"factor float32\[\].*one value"):
        quantize(source, tmp_path / "int8.onnx", str(tmp_path / "data.npz"), PtqOptions(method="max"))


def test_ranges_of_a_part_in_fp16_are_not_used() -> None:
    from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges
    from trtdeploy.onnxgraph.qdq.ranges_to_qdq import quantize_with_ranges

    g = GraphMaker(quantized=False)
    half = g.node("Cast", g.conv("x", 3, 4), to=TensorProto.FLOAT16)
    g.node("Cast", g.node("GlobalAveragePool", half), to=TensorProto.FLOAT, output="y")
    model = g.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 1, 1]})
    ranges = DynamicRanges({"x": np.float32(0.03), half: np.float32(0.02)}, {})
    quantized = quantize_with_ranges(model, ranges)
    onnx.shape_inference.infer_shapes(quantized, check_type=True, strict_mode=True)
    assert {numpy_helper.to_array(each).dtype.name for each in quantized.graph.initializer} == {"float32", "int8"}
