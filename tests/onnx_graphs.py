"""Small ONNX models of the kinds that networks are made of, and answers of ONNX Runtime without any optimization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.tensors import Array, ShapeRange

Size = int | str


class GraphMaker:
    """Collects nodes and constants; every method returns the name of the tensor that it adds."""

    def __init__(self, seed: int = 0, *, quantized: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.quantized = quantized
        self._count = 0

    def name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def constant(self, values: Array, name: str | None = None) -> str:
        name = name or self.name("c")
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def quantize(
        self, tensor: str, scale: Array | float, zero: int = 0, dtype: str = "int8", axis: int | None = None
    ) -> tuple[str, list[str], dict[str, int]]:
        scale = np.asarray(scale, np.float32)
        parameters = [self.constant(scale), self.constant(np.full(scale.shape, zero, dtype))]
        attributes = {} if axis is None else {"axis": axis}
        return self.node("QuantizeLinear", tensor, *parameters, **attributes), parameters, attributes

    def qdq(
        self,
        tensor: str,
        scale: Array | float = 0.03,
        zero: int = 0,
        dtype: str = "int8",
        axis: int | None = None,
        output: str | None = None,
    ) -> str:
        if not self.quantized:
            return self.node("Identity", tensor, output=output) if output else tensor
        codes, parameters, attributes = self.quantize(tensor, scale, zero, dtype, axis)
        return self.node("DequantizeLinear", codes, *parameters, output=output, **attributes)

    def weight(self, *shape: int) -> str:
        values = (self.rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        amax = np.abs(values).reshape(shape[0], -1).max(axis=1)
        return self.qdq(self.constant(values), amax / 127, axis=0)

    def conv(
        self, tensor: str, channels_in: int, channels_out: int, kernel: int = 1, group: int = 1, stride: int = 1
    ) -> str:
        weight = self.weight(channels_out, channels_in // group, kernel, kernel)
        bias = self.constant(self.rng.standard_normal(channels_out).astype(np.float32) * 0.1)
        return self.node("Conv", tensor, weight, bias, group=group, strides=[stride, stride], pads=[kernel // 2] * 4)

    def silu(self, tensor: str) -> str:
        return self.node("Mul", tensor, self.node("Sigmoid", tensor))

    def model(
        self,
        inputs: dict[str, Sequence[Size] | None],
        outputs: dict[str, Sequence[Size] | None],
        *,
        opset: int = 17,
        dtype: int = TensorProto.FLOAT,
        metadata: dict[str, str] | None = None,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            self.constants,
        )
        # newer ones than every supported ONNX Runtime reads are no use here
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        helper.set_model_props(model, metadata or {})
        return model


def block_network(seed: int = 0, *, channels: int = 20, quantized: bool = True) -> onnx.ModelProto:
    """An inverted residual block with squeeze-and-excitation and a concatenation, as in EfficientNet; odd channels.

    Input "input" (batch, 3, 12, 12), outputs "logits" (batch, 5) and "features" (batch, channels + 6, 6, 6).
    """
    g = GraphMaker(seed, quantized=quantized)
    stem = g.silu(g.conv(g.qdq("input"), 3, channels, kernel=3, stride=2))
    depthwise = g.silu(g.conv(g.qdq(stem), channels, channels, kernel=3, group=channels))
    pooled = g.node("GlobalAveragePool", depthwise)
    squeezed = g.silu(g.conv(g.qdq(pooled), channels, 4))
    gates = g.node("Sigmoid", g.conv(g.qdq(squeezed), 4, channels))
    excited = g.node("Mul", depthwise, gates)
    projected = g.conv(g.qdq(excited), channels, channels)
    added = g.node("Add", g.qdq(stem), g.qdq(projected))
    branch = g.node("Relu", g.conv(g.qdq(added), channels, 6))
    g.node("Concat", g.qdq(added), g.qdq(branch), axis=1, output="features")
    last = g.node("Relu", g.conv(g.qdq("features"), channels + 6, 9))
    flat = g.node("Flatten", g.node("GlobalAveragePool", last))
    g.node("Gemm", g.qdq(flat, 0.01), g.weight(5, 9), transB=1, output="logits")
    return g.model({"input": ["batch", 3, 12, 12]}, {"logits": ["batch", 5], "features": ["batch", channels + 6, 6, 6]})


def doubling(shape: Sequence[Size] = ("batch", 4), dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """The smallest model: y = x + x."""
    g = GraphMaker()
    g.node("Add", "x", "x", output="y")
    model = g.model({"x": shape}, {"y": shape}, dtype=dtype)
    model.graph.output[0].type.tensor_type.elem_type = dtype
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def as_exported(model: onnx.ModelProto | Path | bytes, inputs: dict[str, Array]) -> list[Array]:
    """Run a model without any optimization."""
    content: str | bytes
    if isinstance(model, onnx.ModelProto):
        content = model.SerializeToString()
    else:
        content = str(model) if isinstance(model, Path) else model
    outputs: list[Array] = make_session(content).run(None, inputs)
    return outputs


def batch_profile(name: str, largest: int, *sample: int) -> dict[str, ShapeRange]:
    return {name: ShapeRange(min=(1, *sample), opt=(1, *sample), max=(largest, *sample))}
