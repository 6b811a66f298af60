"""Q/DQ from dynamic ranges stands wherever the placement rules want it and a range is known, not only on layers."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges, parse_calibration_cache
from trtdeploy.onnxgraph.qdq.pairs import Site, merge_equal, pairs, take_out
from trtdeploy.onnxgraph.qdq.placement import wanted_sites
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import (
    apply_ranges,
    canonical_qdq,
    quantize_with_ranges,
    ranges_of,
    without_qdq,
)

CHANNELS = 16


def residual_network() -> onnx.ModelProto:
    """As a ResNet with a squeeze-and-excitation gate and a concatenation: every rule of placement has a site."""
    g = GraphMaker(quantized=False)
    stem = g.node("MaxPool", g.node("Relu", g.conv("input", 3, CHANNELS, 3, stride=2)), kernel_shape=[2, 2])
    inner = g.node("Relu", g.conv(stem, CHANNELS, CHANNELS, 3))
    summed = g.node("Relu", g.node("Add", g.conv(inner, CHANNELS, CHANNELS, 3), stem, output="added"), output="summed")
    pooled = g.node("GlobalAveragePool", summed, output="pooled")
    gate = g.node("Sigmoid", g.conv(pooled, CHANNELS, CHANNELS), output="gate")
    gated = g.node("Mul", gate, summed, output="gated")
    left = g.node("Relu", g.conv(gated, CHANNELS, CHANNELS), output="left")
    joined = g.node("Concat", left, summed, axis=1, output="joined")
    last = g.node("Relu", g.conv(joined, 2 * CHANNELS, CHANNELS), output="last")
    flat = g.node("Flatten", g.node("GlobalAveragePool", last))
    g.node("Gemm", flat, g.weight(5, CHANNELS), transB=1, output="logits")
    return g.model({"input": ["n", 3, 16, 16]}, {"logits": ["n", 5]})


def all_ranges(model: onnx.ModelProto) -> DynamicRanges:
    """A range for every tensor, as a calibration cache has, by running the model."""
    inputs = {"input": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = [node.output[0] for node in model.graph.node]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = dict(zip(names, as_exported(watched, inputs), strict=True)) | inputs
    return DynamicRanges.from_amax({name: float(np.abs(array).max()) for name, array in values.items()})


def sites(model: onnx.ModelProto) -> set[Site]:
    return set(take_out(model, lambda _: True)[1])


def scale_of(model: onnx.ModelProto, tensor: str) -> float:
    [found] = {
        float(pair.quantizer.scale) for pair in pairs(Graph(model.graph)) if pair.quantizer and pair.tensor == tensor
    }
    return found


@pytest.fixture(scope="module")
def quantized() -> onnx.ModelProto:
    model = residual_network()
    cache = all_ranges(model).to_calibration_cache()
    return quantize_with_ranges(model, parse_calibration_cache(cache))


def test_every_wanted_site_with_a_range_has_a_pair_and_the_linter_is_content(quantized: onnx.ModelProto) -> None:
    wanted = {each.site: each.reason for each in wanted_sites(residual_network())}
    assert {"residual", "gate", "pooling", "concat"} < set(wanted.values())
    assert sites(quantized) == set(wanted)
    assert lint(quantized) == []
    tensors = [pair.tensor for pair in pairs(Graph(quantized.graph))]
    assert len(tensors) == len(set(tensors))  # one pair for all readers of a tensor


def test_ranges_of_the_result_lead_to_the_same_model(quantized: onnx.ModelProto) -> None:
    assert quantize_with_ranges(without_qdq(quantized), ranges_of(quantized)) == canonical_qdq(quantized) == quantized


def test_answers_stay_close_to_float(quantized: onnx.ModelProto) -> None:
    inputs = {"input": np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    [expected], [answered] = as_exported(residual_network(), inputs), as_exported(quantized, inputs)
    assert 0 < np.abs(answered - expected).max() < 0.1 * np.abs(expected).max()


def test_only_known_ranges_become_pairs() -> None:
    model = residual_network()
    known = {name: scale for name, scale in all_ranges(model).scales.items() if name not in ("gate", "joined")}
    wanted = {each.site for each in wanted_sites(model) if each.tensor not in ("gate", "joined")}
    applied = apply_ranges(model, DynamicRanges(known))
    [reason] = applied.left_float.values()
    assert reason == "its input 'joined' has no range"
    weight = next(node.input[1] for node in model.graph.node if node.op_type == "Conv" and node.input[0] == "joined")
    assert sites(applied.model) == {site for site in wanted if site_tensor(model, site) != weight}


def site_tensor(model: onnx.ModelProto, site: Site) -> str:
    return str(next(node for node in model.graph.node if node.output[0] == site[0]).input[site[1]])


def test_what_a_concat_joins_shares_the_largest_scale(caplog: pytest.LogCaptureFixture) -> None:
    model = residual_network()
    amax = dict(all_ranges(model).amax) | {"left": 1.0, "summed": 3.0, "joined": 2.0}
    applied = apply_ranges(model, DynamicRanges.from_amax(amax))
    assert set(applied.widened) == {"left", "joined"}
    largest = float(np.float32(3 / 127))
    assert {scale_of(applied.model, name) for name in ("left", "summed", "joined")} == {largest}
    assert lint(applied.model) == []
    with caplog.at_level(logging.WARNING):
        quantize_with_ranges(model, DynamicRanges.from_amax(amax))
    assert "ranges of 2 tensors are wider now" in caplog.text


def test_tensorrt_rtx_takes_all_of_it_in_int8(quantized: onnx.ModelProto, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = residual_network()
    cache = tmp_path / "ranges.cache"
    cache.write_text(all_ranges(model).to_calibration_cache())
    config = BuildConfig(runtime="tensorrt-rtx", ranges=cache)
    plan = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", config)
    assert plan.manifest.precision.asked_for == plan.manifest.precision.runs_in == {"int8": 100.0}


def test_equal_pairs_of_one_tensor_become_one() -> None:
    g = GraphMaker()
    first, second, other = g.qdq("x", 0.1), g.qdq("x", 0.1), g.qdq("x", 0.2)
    g.node("Add", first, second, output="same")
    g.node("Mul", "same", other, output="y")
    g.qdq("x", 0.1, output="z")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4], "z": ["n", 4]})
    merged = merge_equal(model)
    onnx.checker.check_model(merged, full_check=True)
    assert [node.op_type for node in merged.graph.node].count("QuantizeLinear") == 3  # z keeps its own
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    for one, two in zip(as_exported(model, inputs), as_exported(merged, inputs), strict=True):
        np.testing.assert_array_equal(one, two)
