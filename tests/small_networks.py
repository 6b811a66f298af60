"""Small float networks of different kinds, each with samples: what people quantize, a few thousand weights large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, Size, block_network
from trtdeploy.tensors import Array

SAMPLES = 32
OPSET = 19
"""The first whose DequantizeLinear onnx.reference knows."""


@dataclass(frozen=True)
class Network:
    """A model and its samples, by input."""

    model: onnx.ModelProto
    samples: dict[str, Array]


class Maker(GraphMaker):
    """Layers in float, with biases."""

    def __init__(self) -> None:
        super().__init__(seed=0, quantized=False)

    def floats(self, *shape: int, scale: float = 1.0) -> Array:
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def linear(self, x: str, size_in: int, size_out: int) -> str:
        return self.node("Add", self.node("MatMul", x, self.weights(size_in, size_out)), self.bias(size_out))

    def weights(self, *shape: int) -> str:
        return self.constant(self.floats(*shape, scale=float(np.sqrt(2 / shape[-2]))))

    def bias(self, size: int) -> str:
        return self.constant(self.floats(size, scale=0.1))

    def convolution(self, x: str, size_in: int, size_out: int, *kernel: int, group: int = 1) -> str:
        fan = size_in // group * int(np.prod(kernel))
        weight = self.constant(self.floats(size_out, size_in // group, *kernel, scale=float(np.sqrt(2 / fan))))
        pads = [size // 2 for size in kernel] * 2
        return self.node("Conv", x, weight, self.bias(size_out), pads=pads, group=group)

    def normed(self, x: str, size: int) -> str:
        return self.node("LayerNormalization", x, self.constant(np.ones(size, np.float32)), self.bias(size), axis=-1)

    def attention(self, x: str, size: int, mask: str | None = None) -> str:
        query, key, value = (self.linear(x, size, size) for _ in range(3))
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 2, 1]))
        scores = self.node("Mul", scores, self.constant(np.float32(size**-0.5)))
        if mask is not None:
            scores = self.node("Add", scores, mask)
        return self.linear(self.node("MatMul", self.node("Softmax", scores, axis=-1), value), size, size)

    def pooled(self, x: str, output: str, size_in: int, size_out: int) -> None:
        """End in a linear layer behind global average pooling."""
        flat = self.node("Flatten", self.node("GlobalAveragePool", x))
        self.end(flat, output, size_in, size_out)

    def end(self, flat: str, output: str, size_in: int, size_out: int) -> None:
        self.node("Gemm", flat, self.weights(size_in, size_out), self.bias(size_out), output=output)

    def network(
        self, shapes: dict[str, tuple[int, ...]], outputs: dict[str, tuple[Size, ...]], **samples: Array
    ) -> Network:
        given = {name: samples.get(name, self.floats(SAMPLES, *shape)) for name, shape in shapes.items()}
        model = self.model({name: ["n", *shape] for name, shape in shapes.items()}, outputs, opset=OPSET)
        for value in model.graph.input:
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(given[value.name].dtype)
        return Network(model, given)


def mlp() -> Network:
    g = Maker()
    hidden = g.node("Relu", g.linear("x", 24, 64))
    g.end(g.node("Relu", g.linear(hidden, 64, 64)), "y", 64, 10)
    heavy = g.rng.standard_t(4, (SAMPLES, 24)).astype(np.float32)  # where methods of finding ranges differ
    return g.network({"x": (24,)}, {"y": ("n", 10)}, x=heavy)


def convolutions() -> Network:
    g = Maker()
    features = g.node("Relu", g.convolution("x", 3, 8, 3, 3))
    features = g.node("MaxPool", features, kernel_shape=[2, 2], strides=[2, 2])
    g.pooled(g.node("Relu", g.convolution(features, 8, 16, 3, 3)), "y", 16, 5)
    return g.network({"x": (3, 10, 10)}, {"y": ("n", 5)})


def depthwise() -> Network:
    g = Maker()
    features = g.node("Clip", g.convolution("x", 3, 16, 1, 1), g.constant(np.float32(0)), g.constant(np.float32(6)))
    features = g.silu(g.convolution(features, 16, 16, 3, 3, group=16))
    g.pooled(g.convolution(features, 16, 12, 1, 1), "y", 12, 5)
    return g.network({"x": (3, 8, 8)}, {"y": ("n", 5)})


def conv1d() -> Network:
    g = Maker()
    features = g.node("Relu", g.convolution("x", 8, 8, 3))
    g.pooled(features, "y", 8, 4)
    return g.network({"x": (8, 32)}, {"y": ("n", 4)})


def bert_block() -> Network:
    g = Maker()
    embedded = g.node("Gather", g.constant(g.floats(40, 16)), "ids")
    rest = g.node("Sub", g.constant(np.float32(1)), g.node("Cast", "mask", to=TensorProto.FLOAT))
    barrier = g.node("Mul", rest, g.constant(np.float32(-1e9)))
    barrier = g.node("Unsqueeze", barrier, g.constant(np.array([1])))
    x = g.normed(g.node("Add", embedded, g.attention(embedded, 16, barrier)), 16)
    wide = g.linear(x, 16, 64)
    gelu = g.node("Mul", wide, g.node("Sigmoid", g.node("Mul", wide, g.constant(np.float32(1.702)))))
    x = g.normed(g.node("Add", x, g.linear(gelu, 64, 16)), 16)
    g.end(g.node("Gather", x, g.constant(np.array(0)), axis=1), "y", 16, 5)
    mask = np.ones((SAMPLES, 9), np.int64)
    mask[::2, 5:] = 0
    return g.network({"ids": (9,), "mask": (9,)}, {"y": ("n", 5)}, ids=g.rng.integers(0, 40, (SAMPLES, 9)), mask=mask)


def tied_weights() -> Network:
    """An autoencoder whose decoder is the encoder, transposed."""
    g = Maker()
    shared = g.weights(16, 16)
    hidden = g.node("Relu", g.node("Gemm", "x", shared))
    g.node("Gemm", hidden, shared, transB=1, output="y")
    return g.network({"x": (16,)}, {"y": ("n", 16)})


def squeeze_and_excitation() -> Network:
    model = block_network(quantized=False)
    model.opset_import[0].version = OPSET
    rows = np.random.default_rng(0).standard_normal((SAMPLES, 3, 12, 12)).astype(np.float32)
    return Network(model, {"input": rows})


def residual() -> Network:
    g = Maker()
    x = g.node("Relu", g.convolution("x", 3, 8, 3, 3))
    for _ in range(2):
        inner = g.node("Relu", g.convolution(x, 8, 8, 3, 3))
        x = g.node("Relu", g.node("Add", x, g.convolution(inner, 8, 8, 3, 3)))
    g.pooled(x, "y", 8, 6)
    return g.network({"x": (3, 8, 8)}, {"y": ("n", 6)})


def voice() -> Network:
    """A speaker embedding: dilated convolutions over time, and mean and deviation of what they find."""
    g = Maker()
    x = g.node("Relu", g.convolution("x", 12, 16, 5))
    x = g.node("Relu", g.node("Conv", x, g.constant(g.floats(16, 16, 3, scale=0.2)), dilations=[2], pads=[2, 2]))
    time = g.constant(np.array([2]))
    mean = g.node("ReduceMean", x, time)
    deviation = g.node("ReduceMean", g.node("Abs", g.node("Sub", x, mean)), time)
    g.end(g.node("Flatten", g.node("Concat", mean, deviation, axis=1)), "y", 32, 8)
    return g.network({"x": (12, 40)}, {"y": ("n", 8)})


def upsampling() -> Network:
    g = Maker()
    x = g.node("Relu", g.convolution("x", 3, 8, 3, 3))
    low = g.node("Relu", g.convolution(g.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 8, 12, 3, 3))
    up = g.node("ConvTranspose", low, g.constant(g.floats(12, 8, 2, 2, scale=0.3)), strides=[2, 2])
    joined = g.node("Concat", x, up, axis=1)
    g.node("Identity", g.convolution(joined, 16, 4, 1, 1), output="y")
    return g.network({"x": (3, 8, 8)}, {"y": ("n", 4, 8, 8)})


def several_inputs() -> Network:
    g = Maker()
    image = g.node("Cast", "image", to=TensorProto.FLOAT)
    image = g.node("Div", image, g.constant(np.float32(255)))
    image = g.node("Transpose", image, perm=[0, 3, 1, 2])
    features = g.node("Relu", g.convolution(image, 3, 8, 3, 3))
    flat = g.node("Flatten", g.node("GlobalAveragePool", features))
    kept = g.node("Where", "known", "facts", g.constant(np.float32(0)))
    joined = g.node("Concat", flat, g.node("Relu", g.linear(kept, 6, 8)), axis=1)
    g.end(joined, "y", 16, 3)
    pixels = g.rng.integers(0, 256, (SAMPLES, 8, 8, 3)).astype(np.uint8)
    known = g.rng.random((SAMPLES, 6)) < 0.8
    shapes = {"image": (8, 8, 3), "facts": (6,), "known": (6,)}
    return g.network(shapes, {"y": ("n", 3)}, image=pixels, known=known)


def concat_and_pool() -> Network:
    g = Maker()
    squeezed = g.node("Relu", g.convolution("x", 3, 6, 1, 1))
    branches = [g.node("Relu", g.convolution(squeezed, 6, 6, size, size)) for size in (1, 3)]
    branches.append(g.node("MaxPool", squeezed, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4))
    joined = g.node("Concat", *branches, axis=1)
    pooled = g.node("AveragePool", joined, kernel_shape=[2, 2], strides=[2, 2])
    g.pooled(g.node("Relu", g.convolution(pooled, 18, 8, 3, 3)), "y", 8, 5)
    return g.network({"x": (3, 8, 8)}, {"y": ("n", 5)})


def attention() -> Network:
    g = Maker()
    x = g.node("Add", "x", g.attention(g.normed("x", 12), 12))
    g.node("Identity", g.node("Add", x, g.linear(g.node("Relu", g.linear(x, 12, 24)), 24, 12)), output="y")
    return g.network({"x": (7, 12)}, {"y": ("n", 7, 12)})


def weights_of_three_dimensions() -> Network:
    """A linear layer for each of four groups, whose weights are one constant."""
    g = Maker()
    hidden = g.node("Relu", g.node("MatMul", "x", g.weights(4, 16, 12)))
    g.node("MatMul", hidden, g.weights(4, 12, 5), output="y")
    return g.network({"x": (4, 3, 16)}, {"y": ("n", 4, 3, 5)})


NETWORKS: dict[str, Callable[[], Network]] = {
    made.__name__: made
    for made in (
        mlp,
        convolutions,
        depthwise,
        conv1d,
        bert_block,
        tied_weights,
        squeeze_and_excitation,
        residual,
        voice,
        upsampling,
        several_inputs,
        concat_and_pool,
        attention,
        weights_of_three_dimensions,
    )
}
