"""An engine of the fake TensorRT on the fake driver, and models for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.fake_cudart import FakeCudart
from tests.fakes.fake_tensorrt import make_fake_tensorrt, make_plan
from trtdeploy.cuda.api import CudaApi
from trtdeploy.cuda.device import Device
from trtdeploy.engine import Engine
from trtdeploy.plan import DeviceFacts, Manifest, PrecisionFacts, RuntimeFacts, SourceFacts
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import FLAVOURS, Bindings
from trtdeploy.runtimes.tensorrt.execution.engine import TensorRTEngine
from trtdeploy.runtimes.tensorrt.messages import Messages
from trtdeploy.tensors import Array, ShapeRange, TensorSpec, ValueRange

WIDTH = 64
_WEIGHTS = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def linear() -> onnx.ModelProto:
    """y = x @ W for x (batch, 64): every output row belongs to one input row."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(_WEIGHTS, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def nonzero() -> onnx.ModelProto:
    """Where x is not zero: the size of the output depends on the data."""
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"])],
        "nonzero",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2, "n"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def reshaping() -> onnx.ModelProto:
    """y = x reshaped to the values of "shape", which TensorRT reads on the host."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshaping",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def tiling() -> onnx.ModelProto:
    """y = x tiled as often as "first" says, in the shape that "second" says: two shape tensors."""
    graph = helper.make_graph(
        [helper.make_node("Tile", ["x", "first"], ["t"]), helper.make_node("Reshape", ["t", "second"], ["y"])],
        "tiling",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH]),
            helper.make_tensor_value_info("first", TensorProto.INT64, [2]),
            helper.make_tensor_value_info("second", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def constant() -> onnx.ModelProto:
    """y = 0 to 5; there is no input."""
    values = numpy_helper.from_array(np.arange(6, dtype=np.float32), "values")
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=values), helper.make_node("Identity", ["c"], ["y"])],
        "constant",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def expected(x: Array) -> Array:
    result: Array = x @ _WEIGHTS
    return result


def batch(size: int, seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((size, WIDTH)).astype(np.float32)}


def batches(*ranges: tuple[int, int, int]) -> tuple[dict[str, ShapeRange], ...]:
    return tuple(
        {"x": ShapeRange(min=(low, WIDTH), opt=(best, WIDTH), max=(high, WIDTH))} for low, best, high in ranges
    )


Ranges = tuple[dict[str, ShapeRange], ...]
"""Profiles as a build is given them: ranges of shapes, or, for a shape tensor, of its values."""
BATCHES: Ranges = batches((1, 8, 32))


class FakeGpu:
    """A machine with fake GPUs, whose second one is used: threads that did not choose it have the first one.

    Attributes:
        cudart: The driver.
        trt: The library.
        device: The GPU.
    """

    def __init__(self, seed: int = 0, *, memory_bytes: int = 1 << 30, eagerness: float = 0.3) -> None:
        self.cudart = FakeCudart(seed, memory_bytes=memory_bytes, eagerness=eagerness, devices=2)
        self.trt: ModuleType = make_fake_tensorrt(self.cudart)
        self.device = Device(CudaApi(self.cudart), 1)

    @property
    def bindings(self) -> Bindings:
        return Bindings(FLAVOURS["tensorrt"], self.trt, str(self.trt.__version__), Messages(self.trt))

    def load(
        self,
        model: onnx.ModelProto | None = None,
        *,
        profiles: Ranges = BATCHES,
        content: bytes | None = None,
        **options: Any,
    ) -> TensorRTEngine:
        """Load a plan below the engine that users see."""
        plan = self.plan(model or linear(), profiles) if content is None else content
        return TensorRTEngine(self.bindings, plan, LoadOptions(**options), self.device)

    @contextmanager
    def engine(
        self,
        model: onnx.ModelProto | None = None,
        *,
        contexts: int = 1,
        profiles: Ranges = BATCHES,
        timeout_s: float | None = 30.0,
        queue_size: int = 256,
        **options: Any,
    ) -> Iterator[Engine]:
        """Give an engine, and check at its end that nothing was violated and nothing is left."""
        loaded = self.load(model, profiles=profiles, **options)
        engine = Engine(
            loaded,
            manifest(model or linear(), profiles),
            contexts=contexts,
            timeout_s=timeout_s,
            queue_size=queue_size,
        )
        with engine:
            yield engine
        del engine, loaded
        self.assert_clean()

    def assert_clean(self) -> None:
        """Check that nothing was violated and nothing is left."""
        gc.collect()
        if self.trt.misuses:
            raise self.trt.misuses[0]
        self.cudart.assert_clean()

    @staticmethod
    def plan(model: onnx.ModelProto, profiles: Ranges) -> bytes:
        shapes = [{name: (r.min, r.opt, r.max) for name, r in profile.items()} for profile in profiles]
        return make_plan(model, shapes)


def manifest(model: onnx.ModelProto, profiles: Ranges) -> Manifest:
    """Return a manifest as a build writes it: with ranges of shapes, and apart from them those of values."""
    holding = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.INT64}
    shapes = tuple({name: r for name, r in profile.items() if name not in holding} for profile in profiles)
    values = tuple(
        {name: ValueRange(**r.model_dump()) for name, r in profile.items() if name in holding} for profile in profiles
    )

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype="float32" if value.type.tensor_type.elem_type == TensorProto.FLOAT else "int64",
                shape=tuple(
                    dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
                ),
            )
            for value in values
        )

    return Manifest(
        trtdeploy_version="0",
        created_at="2026-01-01T00:00:00+00:00",
        runtime=RuntimeFacts(name="tensorrt", version="10.16.1.11"),
        device=DeviceFacts(kind="gpu", name="Fake GPU", capability="9.0"),
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output),
        profiles=shapes,
        profile_values=values if any(values) else (),
        precision=PrecisionFacts(weighted_layers=0, quantized_layers=0, integer_kernels=None, note=""),
        plan_bytes=0,
        plan_sha256="",
        onnx=SourceFacts(file="none.onnx", sha256=""),
        build_config={},
    )
