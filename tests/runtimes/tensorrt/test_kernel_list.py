"""What TensorRT-RTX plans show of themselves: real plans, built without a GPU, and text that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.cuda.api import load_api
from trtdeploy.errors import BuildError, RuntimeUnavailableError
from trtdeploy.plan import PrecisionFacts
from trtdeploy.runtimes.tensorrt.precision.kernel_list import facts_from_kernels, kernels_of
from trtdeploy.runtimes.tensorrt.precision.precision import facts_from_network, require_int8
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

pytest.importorskip("tensorrt_rtx")


def has_gpu() -> bool:
    try:
        return load_api().device_count() > 0
    except RuntimeUnavailableError:
        return False


pytestmark = pytest.mark.skipif(has_gpu(), reason="says what is known where no engine can be asked")

CONFIG = BuildConfig(runtime="tensorrt-rtx")


def built(model: onnx.ModelProto, folder: Path, config: BuildConfig = CONFIG) -> PrecisionFacts:
    return build(save(model, folder / "m.onnx"), folder / "m.rtx", config).manifest.precision


def weights(g: GraphMaker, *shape: int, axis: int) -> str:
    """Weights with one scale for each index of ``axis``."""
    values = (g.rng.standard_normal(shape) * 0.1).astype(np.float32)
    rest = tuple(index for index in range(len(shape)) if index != axis)
    return g.qdq(g.constant(values), np.abs(values).max(axis=rest) / 127, axis=axis)


def one_layer(op: str, inputs: list[int], outputs: list[int], kernel: list[int], axis: int, **attributes: object):
    g = GraphMaker()
    g.node(op, g.qdq("x"), weights(g, *kernel, axis=axis), output="y", name="layer", **attributes)
    return g.model({"x": inputs}, {"y": outputs})


LAYERS = {
    "Conv1d": (("Conv", [2, 8, 32], [2, 8, 32], [8, 8, 3], 0), {"pads": [1, 1]}),
    "Conv2d": (("Conv", [2, 8, 8, 8], [2, 16, 8, 8], [16, 8, 3, 3], 0), {"pads": [1] * 4}),
    "depthwise": (("Conv", [2, 8, 8, 8], [2, 8, 8, 8], [8, 1, 3, 3], 0), {"pads": [1] * 4, "group": 8}),
    "Gemm": (("Gemm", [4, 32], [4, 16], [32, 16], 1), {}),
    "MatMul of 3-D": (("MatMul", [2, 4, 32], [2, 4, 16], [32, 16], 1), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_fed_codes_are_shown_in_int8(name: str, tmp_path: Path) -> None:
    arguments, attributes = LAYERS[name]
    precision = built(one_layer(*arguments, **attributes), tmp_path)
    assert precision.evidence == "kernel names"
    assert precision.asked_for == precision.runs_in == {"int8": 100.0}
    assert (precision.unknown_percent, precision.fallbacks) == (0.0, {})


@pytest.mark.parametrize("shape", [[4, 32], [2, 4, 32]])
def test_a_product_with_a_vector_is_built(shape: list[int], tmp_path: Path) -> None:
    g = GraphMaker()
    vector = g.qdq(g.constant((g.rng.standard_normal(32) * 0.1).astype(np.float32)), 0.003)
    g.node("MatMul", g.qdq("x"), vector, output="y", name="layer")
    precision = built(
        g.model({"x": shape}, {"y": shape[:-1]}), tmp_path, BuildConfig(runtime="tensorrt-rtx", precision="explicit")
    )
    assert precision.asked_for == precision.runs_in == {"int8": 100.0}


def test_a_conv1d_beside_a_gemm_counts(tmp_path: Path) -> None:
    g = GraphMaker()
    hidden = g.node("Conv", g.qdq("x"), weights(g, 8, 8, 3, axis=0), pads=[1, 1], name="conv")
    flat = g.node("Flatten", g.node("GlobalAveragePool", g.node("Relu", hidden)))
    g.node("Gemm", g.qdq(flat), weights(g, 8, 4, axis=1), output="y", name="fc")
    precision = built(g.model({"x": [2, 8, 32]}, {"y": [2, 4]}), tmp_path)
    assert precision.asked_for == {"int8": 100.0}
    assert {name: layer.runs_in for name, layer in precision.layers.items()} == {"conv": "int8", "fc": "int8"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_transposed_convolution_is_asked_for_in_int8_and_shown_in_float(size: int, tmp_path: Path) -> None:
    kernel = [8, 6, *[3] * size]
    model = one_layer("ConvTranspose", [2, 8, *[8] * size], [2, 6, *[17] * size], kernel, 1, strides=[2] * size)
    precision = built(model, tmp_path)
    assert (precision.asked_for, precision.runs_in) == ({"int8": 100.0}, {"float32": 100.0})
    assert list(precision.fallbacks) == ["layer"]
    result = CliRunner().invoke(
        app, ["build", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "p"), "--runtime", "tensorrt-rtx"]
    )
    assert result.exit_code == 0
    assert "MACs asked for: 100.0% int8; shown by the kernel names: 100.0% float32; unknown: 0.0%" in result.output
    assert "layer was asked for in int8: multiplies float32" in result.output


def test_turing_computes_in_float_what_newer_targets_compute_in_int8(tmp_path: Path) -> None:
    model = one_layer(*LAYERS["Conv2d"][0], **LAYERS["Conv2d"][1])
    for targets, shown in ((("8.9",), "int8"), (("7.5",), "float32"), (("7.5", "8.9"), "float32")):
        config = BuildConfig(runtime="tensorrt-rtx", compute_capabilities=targets)
        assert built(model, tmp_path, config).runs_in == {shown: 100.0}


def two_products(kind: int, *, of_input: bool) -> onnx.ModelProto:
    """x W1 W2, the weights as codes of an element type; INT4 in blocks of 32."""
    g = GraphMaker()
    blocks = kind == TensorProto.INT4
    zero = helper.make_tensor("zero", kind, [], [0])
    g.constants.append(zero)
    scale = g.constant(np.float32(0.02))
    source = "x"
    for index, (rows, columns) in enumerate([(64, 64), (64, 32)]):
        if of_input:
            codes = g.node("QuantizeLinear", source, scale, "zero")
            source = g.node("DequantizeLinear", codes, scale, "zero")
        values = g.rng.integers(-7, 8, rows * columns)
        g.constants.append(helper.make_tensor(f"w{index}", kind, [rows, columns], values))
        if blocks:
            g.constants.append(numpy_helper.from_array(np.full((rows // 32, columns), 0.02, np.float32), f"s{index}"))
            dequantized = g.node("DequantizeLinear", f"w{index}", f"s{index}", axis=0, block_size=32)
        else:
            dequantized = g.node("DequantizeLinear", f"w{index}", scale, "zero")
        source = g.node("MatMul", source, dequantized, output="y" if index else "hidden", name=f"layer{index}")
    if not of_input and blocks:
        g.constants.remove(zero)
    return g.model({"x": [4, 8, 64]}, {"y": [4, 8, 32]}, opset=21)


@pytest.mark.parametrize(
    ("kind", "of_input", "name"),
    [
        (TensorProto.FLOAT8E4M3FN, True, "fp8"),
        (TensorProto.FLOAT8E4M3FN, False, "fp8 weight-only"),
        (TensorProto.INT8, False, "int8 weight-only"),
        (TensorProto.INT4, False, "int4 weight-only"),
    ],
)
def test_other_types_are_named(kind: int, of_input: bool, name: str, tmp_path: Path) -> None:
    precision = built(two_products(kind, of_input=of_input), tmp_path)
    assert precision.asked_for == precision.runs_in == {name: 100.0}
    assert precision.int8_macs_percent == 0.0
    assert precision.quantized_layers == (2 if of_input else 0)


def test_weights_that_are_dequantized_before_a_convolution_are_not_shown_as_weight_only(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Conv", "x", weights(g, 16, 8, 3, 3, axis=0), output="y", name="layer", pads=[1] * 4)
    precision = built(g.model({"x": [2, 8, 8, 8]}, {"y": [2, 16, 8, 8]}), tmp_path)
    assert (precision.asked_for, precision.runs_in) == ({"int8 weight-only": 100.0}, {"float32": 100.0})
    assert list(precision.fallbacks) == ["layer"]


@pytest.mark.parametrize("name", ["blocks[0]/attn[1]", "a | b", 'say "x"', "back\\slash", "é}", "{ y = 1 }", "a\nb"])
def test_any_node_name_is_found_in_a_plan(name: str, tmp_path: Path) -> None:
    model = one_layer(*LAYERS["Conv2d"][0], **LAYERS["Conv2d"][1])
    model.graph.node[-1].name = name
    precision = built(model, tmp_path)
    assert precision.layers[name].runs_in == "int8"


def test_every_layer_of_a_block_is_shown_in_half_precision_around_int8(tmp_path: Path) -> None:
    g = GraphMaker()
    first = g.node("Relu", g.conv(g.qdq("input"), 8, 16, kernel=3))
    g.quantized = False
    g.node("Relu", g.conv(first, 16, 16, kernel=3), output="y")
    model = g.model({"input": ["b", 8, 8, 8]}, {"y": ["b", 16, 8, 8]})
    precision = built(model, tmp_path, BuildConfig(runtime="tensorrt-rtx", high_precision="fp16"))
    assert set(precision.runs_in) == {"int8", "float16"}
    assert precision.runs_in["int8"] == precision.asked_for["int8"] == pytest.approx(100 / 3, abs=0.01)
    assert precision.unknown_percent == 0.0


def test_facts_are_in_the_manifest_and_doctor_shows_them(tmp_path: Path) -> None:
    built(one_layer(*LAYERS["Gemm"][0]), tmp_path)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "m.rtx"), "--json"])
    plan = json.loads(result.output)["plans"][0]
    assert plan["precision"] == "MACs asked for: 100.0% int8; shown by the kernel names: 100.0% int8; unknown: 0.0%"


def parsed(model: onnx.ModelProto) -> tuple[Any, Any]:
    """A network of the real parser, and what must live as long as it."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    return network, (builder, parser)


def test_the_network_refuses_only_layers_that_it_shows_without_qdq() -> None:
    g = GraphMaker(quantized=False)
    g.node("Conv", "x", weights(g, 8, 8, 3, axis=0), output="y", name="float", pads=[1, 1])
    network, _alive = parsed(g.model({"x": [2, 8, 8]}, {"y": [2, 8, 8]}))
    shown = facts_from_network(network, WeightedLayers({"float": 1}, frozenset({"float"})), why="There is no GPU.")
    assert (shown.runs_in, shown.unknown_percent, list(shown.fallbacks)) == ({}, 100.0, ["float"])
    with pytest.raises(BuildError, match="asks for INT8 and the plan would have none, says the parsed network"):
        require_int8(shown, model="m.onnx")
    elsewhere = facts_from_network(
        network, WeightedLayers({"folded": 1}, frozenset({"folded"})), why="There is no GPU."
    )
    assert elsewhere.fallbacks == {}
    require_int8(elsewhere, model="m.onnx")


def test_a_plan_with_fp8_is_for_the_targets_that_have_it(tmp_path: Path) -> None:
    for kind, targets in ((TensorProto.FLOAT8E4M3FN, "8.9,12.0+"), (TensorProto.INT8, "8.0,8.6,8.9,12.0+")):
        source = save(two_products(kind, of_input=True), tmp_path / "m.onnx")
        assert build(source, tmp_path / "m.rtx", CONFIG).manifest.device.capability == targets


PROGRAM = """header {
  version = 5
}
descriptors {
  tensor={ dims={ 1 2 } name="x_q" type=int8 }
  tensor={ dims={ 1 2 } name="w_q" type=int8 }
  tensor={ dims={ 1 2 } name="x" type=float }
  tensor={ dims={ 1 2 } name="odd" type=posit }
}
main {
 label bb1:
  corrltn={ name="a" output={"y"} input={"x_q" "w_q" "x" } strides={ 1 1 } layers="[ONNX Layer: a]" }
  corrltn={ name="b" output={"y"} input={"x" "x" } layers="[ONNX Layer: b]" }
  corrltn={ name="b_2" output={"y"} input={"x_q" "w_q" } layers="[ONNX Layer: b]" }
  fully_connected={ name="c" output={"y"} input={"odd" "w_q" } layers="[ONNX Layer: c]" }
  function={ name=__myl_Mul output_args={"y"} input_args={"x_q" "w_q" } layers="[ONNX Layer: d]" }
}
"""


def test_what_is_not_understood_is_unknown() -> None:
    layers = WeightedLayers(dict.fromkeys("abcd", 1), frozenset("abcd"))
    content = b"\0\1vtrt" + PROGRAM.encode() + b"\0tail"
    facts = facts_from_kernels(content, layers, why="There is no GPU.")
    assert facts is not None
    assert (facts.runs_in, facts.unknown_percent) == ({"int8": 25.0}, 75.0)
    assert set(facts.unknown) == {"b", "c", "d"}
    assert "float32 and int8" in facts.unknown["b"]
    assert "There is no GPU." in facts.note
    for cut in range(0, len(content), 7):  # a plan cut anywhere, or other bytes: nothing is claimed of more layers
        shown = facts_from_kernels(content[:cut], layers, why="")
        assert shown is None or set(shown.runs_in) <= {"int8", "float32"}
    assert facts_from_kernels(b"an engine of another version", layers, why="") is None
    assert [kernel.operation for kernel in kernels_of(content)].count("corrltn") == 3


def test_inspect_lists_what_was_asked_for_and_why_it_does_not_run_so(tmp_path: Path) -> None:
    g = GraphMaker()
    up = g.node("ConvTranspose", g.qdq("x"), weights(g, 8, 6, 2, 2, axis=1), strides=[2, 2], name="up[/0]")
    g.node("Conv", g.qdq(up), weights(g, 4, 6, 1, 1, axis=0), output="y", name="blocks[0]")
    built(g.model({"x": [2, 8, 8, 8]}, {"y": [2, 4, 16, 16]}), tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.rtx"), "--layers"])
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[3:] for line in result.output.splitlines() if "%" in line}
    assert rows["blocks[0]"] == ["int8", "int8"]
    assert rows["up[/0]"][:2] == ["int8", "float32"]
    assert "kernels" in rows["up[/0]"]
    assert "fallbacks: 1 of 2 layers" in result.output
