"""Models and plans that several test folders use: small, with Q/DQ, made without torch."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.plan import Plan
from trtdeploy.tensors import ShapeRange

IMAGE_SIZE = 32


def pytest_configure() -> None:
    """Let tests interrupt what they start, even where the tests run in the background of a shell or under nohup.

    There SIGINT or SIGHUP are ignored, and every command that a test starts would inherit that. A handler is not
    inherited.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


LABELS = [str(digit) for digit in range(10)]


def make_qdq_classifier(seed: int = 0, *, channels: int = 32, quantized: bool = True) -> onnx.ModelProto:
    """Conv, SiLU, Conv, pool, Gemm over (N, 3, 32, 32): per-channel weights, per-tensor activations, ten classes."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    def through_qdq(name: str, scale: np.ndarray, axis: int | None = None) -> str:
        if not quantized:
            return name
        inputs = [constant(f"{name}.scale", scale), constant(f"{name}.zero", np.zeros(scale.shape, np.int8))]
        attributes = {} if axis is None else {"axis": axis}
        nodes.append(helper.make_node("QuantizeLinear", [name, *inputs], [f"{name}.q"], **attributes))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *inputs], [f"{name}.dq"], **attributes))
        return f"{name}.dq"

    def weight(name: str, *shape: int) -> str:
        values = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        amax = np.abs(values).reshape(shape[0], -1).max(axis=1)
        return through_qdq(constant(name, values), (amax / 127).astype(np.float32), axis=0)

    def activation(name: str, amax: float) -> str:
        return through_qdq(name, np.float32(amax / 127).reshape(()))

    nodes_before = activation("input", 3.0)
    nodes.append(helper.make_node("Conv", [nodes_before, weight("w1", channels, 3, 3, 3)], ["c1"], pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Sigmoid", ["c1"], ["s1"]))
    nodes.append(helper.make_node("Mul", ["c1", "s1"], ["a1"]))
    second = [activation("a1", 4.0), weight("w2", channels, channels, 3, 3)]
    nodes.append(helper.make_node("Conv", second, ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]))
    nodes.append(helper.make_node("Relu", ["c2"], ["a2"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["a2"], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    last = [activation("f", 2.0), weight("w3", len(LABELS), channels)]
    nodes.append(helper.make_node("Gemm", last, ["logits"], transB=1))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, IMAGE_SIZE, IMAGE_SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(
        model,
        {
            "trtdeploy.preprocessing": Preprocessing.square(IMAGE_SIZE).to_json(),
            "trtdeploy.labels": json.dumps(LABELS),
        },
    )
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def qdq_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q/DQ classifier for the digits dataset, with preprocessing and labels; its weights are random."""
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    onnx.save(make_qdq_classifier(), path)
    return path


@pytest.fixture
def float_onnx(tmp_path: Path) -> Path:
    """The same classifier without Q/DQ."""
    path = tmp_path / "float.onnx"
    onnx.save(make_qdq_classifier(quantized=False), path)
    return path


@pytest.fixture(scope="session")
def qdq_plan(qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan of ``qdq_onnx`` for batches of 1 to 32."""
    size = (3, IMAGE_SIZE, IMAGE_SIZE)
    shapes = ShapeRange(min=(1, *size), opt=(1, *size), max=(32, *size))
    path = tmp_path_factory.mktemp("plan") / "classifier.plan"
    return build(qdq_onnx, path, BuildConfig(profiles=({"input": shapes},), timing_rounds=3))
