"""Dynamic ranges handed to a TensorRT that still takes them, on objects that stand in for its network."""

from __future__ import annotations

import enum
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trtdeploy.errors import QuantizationError, UsageError
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.tensorrt.bindings import FLAVOURS, Bindings
from trtdeploy.runtimes.tensorrt.building.implicit import set_dynamic_ranges
from trtdeploy.runtimes.tensorrt.precision.precision import WeightedLayers

LAYERS = WeightedLayers({"/stem/Conv": 10, "/head/Gemm": 5}, frozenset())


class Tensor:
    def __init__(self, name: str) -> None:
        self.name = name
        self.range: tuple[float, float] | None = None

    def set_dynamic_range(self, min: float, max: float) -> bool:  # noqa: A002  # as TensorRT calls them
        self.range = (min, max)
        return True


class Layer:
    def __init__(self, node: str, source: Tensor, result: Tensor) -> None:
        self.metadata = f"[ONNX Layer: {node}]"
        self._source, self._result = source, result
        self.num_inputs = self.num_outputs = 1

    def get_input(self, index: int) -> Tensor:
        return self._source

    def get_output(self, index: int) -> Tensor:
        return self._result


class Network:
    """input -> Conv -> a -> Gemm -> logits."""

    def __init__(self) -> None:
        self.tensors = {name: Tensor(name) for name in ("input", "a", "logits")}
        self._layers = [
            Layer("/stem/Conv", self.tensors["input"], self.tensors["a"]),
            Layer("/head/Gemm", self.tensors["a"], self.tensors["logits"]),
        ]
        self.num_inputs, self.num_layers = 1, 2

    def get_input(self, index: int) -> Tensor:
        return self.tensors["input"]

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]


class Config:
    def __init__(self) -> None:
        self.flags: list[enum.Enum] = []

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.append(flag)


def bindings(*, has_ranges: bool = True) -> Bindings:
    trt: Any = ModuleType("implicit")
    trt.BuilderFlag = enum.Enum("BuilderFlag", "INT8 FP16" if has_ranges else "TF32")
    trt.ITensor = Tensor if has_ranges else object
    return Bindings(FLAVOURS["tensorrt"], trt, "10.16.1.11" if has_ranges else "11.4.0.106", None)  # type: ignore[arg-type]


def config(tmp_path: Path, amax: dict[str, float]) -> BuildConfig:
    path = tmp_path / "ranges.cache"
    path.write_text(DynamicRanges.from_amax(amax).to_calibration_cache())
    return BuildConfig(runtime="tensorrt", ranges=path, implicit=True)


def test_every_known_tensor_gets_its_range_and_int8_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, target = Network(), Config()
    with caplog.at_level(logging.WARNING):
        layers: Any = set_dynamic_ranges(
            bindings(),
            network,  # type: ignore[arg-type]
            target,  # type: ignore[arg-type]
            config(tmp_path, {"input": 2.0, "logits": 5.0, "of another model": 1.0}),
            LAYERS,
        )
    assert network.tensors["input"].range == pytest.approx((-2.0, 2.0), rel=1e-6)
    assert network.tensors["a"].range is None
    assert network.tensors["logits"].range == pytest.approx((-5.0, 5.0), rel=1e-6)
    assert [flag.name for flag in target.flags] == ["INT8"]
    # the head's input has no range: TensorRT leaves it in float
    assert layers.quantized == {"/stem/Conv"}
    assert "deprecated" in caplog.text


def test_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    target = Config()
    with pytest.raises(QuantizationError, match="None of the 1 tensors"):
        set_dynamic_ranges(bindings(), Network(), target, config(tmp_path, {"x": 1.0}), LAYERS)  # type: ignore[arg-type]
    assert target.flags == []


def test_where_ranges_are_gone_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Q/DQ"):
        set_dynamic_ranges(
            bindings(has_ranges=False),
            Network(),
            Config(),
            config(tmp_path, {"input": 1.0}),
            LAYERS,  # type: ignore[arg-type]
        )
