"""``trtdeploy.quantizing``: an ONNX model and samples in, explicit INT8 out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.onnx_graphs import block_network, save
from trtdeploy.calibration import METHODS, AbsHistogram, amax_of
from trtdeploy.data import open_dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError, QuantizationError, UsageError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.lint.quantization_check import check_quantization
from trtdeploy.onnxgraph.qdq.pairs import pairs
from trtdeploy.onnxgraph.qdq.placement import wanted_sites
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.runtimes.onnxruntime.witness import Witness


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    return save(block_network(quantized=False), tmp_path / "blocks.onnx")


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    samples = np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)
    np.save(tmp_path / "samples.npy", samples)
    return tmp_path / "samples.npy"


def scales(path: Path) -> dict[str, np.ndarray]:
    return {
        pair.tensor: pair.quantizer.scale for pair in pairs(Graph(onnx.load(path).graph)) if pair.quantizer is not None
    }


def test_digits_from_float_to_int8(float_onnx: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8.onnx"
    done = quantize(float_onnx, output, "digits", PtqOptions(batch_size=32))
    assert (done.quantized_layers, done.layers) == (3, 3)
    assert done.output_sqnr_db > 15
    assert done.dev is not None
    assert done.dev.agreement > 90
    model = onnx.load(output)
    assert check_quantization(model) == []
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    facts = json.loads(metadata["trtdeploy.calibration"])
    assert facts == done.calibration
    assert set(facts["candidates"]) >= set(METHODS) - {"percentile"}
    chosen = facts["method"] if facts["percentile"] is None else f"percentile {facts['percentile']:g}"
    assert facts["candidates"][chosen] == max(facts["candidates"].values())
    assert metadata["trtdeploy.labels"]
    assert Preprocessing.from_json(metadata["trtdeploy.preprocessing"])


@pytest.mark.parametrize("method", METHODS)
def test_every_scale_is_that_of_its_tensor(method: str, blocks: Path, arrays: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8.onnx"
    quantize(blocks, output, str(arrays), PtqOptions(method=method, percentile=99.0, batch_size=7))
    float_model = onnx.load(blocks)
    found = scales(output)
    samples = np.load(arrays)
    wanted = wanted_sites(float_model)
    groups: dict[object, set[str]] = {}
    for site in wanted:
        if site.reason != "weight":
            groups.setdefault(site.tensor if site.group is None else site.group, set()).add(site.tensor)
    assert any(len(tensors) > 1 for tensors in groups.values())  # a concatenation
    for tensors in groups.values():
        histogram = AbsHistogram()
        for start in range(0, len(samples), 7):
            batch = samples[start : start + 7]
            for tensor in sorted(tensors):
                value = batch if tensor == "input" else run_to(float_model, tensor, batch)
                histogram.add(value)
        expected = amax_of(histogram, method, percentile=99.0) / 127
        for tensor in tensors:
            np.testing.assert_allclose(found[tensor], expected, rtol=2e-3)
    for site in wanted:
        if site.reason == "weight":
            weight = Graph(float_model.graph).constant(site.tensor)
            assert weight is not None
            assert found[site.tensor].size == weight.shape[0]
            np.testing.assert_allclose(
                found[site.tensor], np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127, rtol=1e-6
            )


def run_to(model: onnx.ModelProto, tensor: str, batch: np.ndarray) -> np.ndarray:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return Witness(copy, [tensor])({"input": batch})[0]


def test_the_same_seed_gives_the_same_file_and_another_one_does_not(blocks: Path, arrays: Path, tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        options = PtqOptions(method="max", images=5, seed=seed)
        return quantize(blocks, tmp_path / f"{seed}.onnx", str(arrays), options).sha256

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_only_the_calibration_split_is_calibrated_with(
    float_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dataset("digits") as dataset:
        split = type(dataset.split("test"))
    read: set[str] = set()
    pixels = split.pixels

    def spy(self, preprocessing, indices):
        read.add(self.name)
        return pixels(self, preprocessing, indices)

    monkeypatch.setattr(split, "pixels", spy)
    quantize(float_onnx, tmp_path / "int8.onnx", "digits", PtqOptions(method="max", images=64))
    assert read == {"calibration", "dev"}


def test_what_is_skipped_stays_in_float(float_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(float_onnx)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{index}"
    save(model, float_onnx)
    output = tmp_path / "int8.onnx"
    done = quantize(float_onnx, output, "digits", PtqOptions(method="max", images=8, skip=("Gemm*",)))
    assert (done.quantized_layers, done.layers) == (2, 3)
    assert "f" not in scales(output)
    with pytest.raises(UsageError, match=r"Gem matches no node.*Gemm"):
        quantize(float_onnx, output, "digits", PtqOptions(skip=("Gem",)))
    with pytest.raises(QuantizationError, match="Nothing in the model"):
        quantize(float_onnx, output, "digits", PtqOptions(skip=("*",)))


def test_a_dead_channel_gets_a_scale_that_tensorrt_takes(float_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(float_onnx)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    values = numpy_helper.to_array(weight).copy()
    values[3] = 0
    weight.CopyFrom(numpy_helper.from_array(values, "w1"))
    save(model, float_onnx)
    quantize(float_onnx, tmp_path / "int8.onnx", "digits", PtqOptions(method="max", images=8))
    assert scales(tmp_path / "int8.onnx")["w1"][3] > 0


def test_what_cannot_be_quantized_is_refused_and_nothing_is_written(
    float_onnx: Path, qdq_onnx: Path, arrays: Path, tmp_path: Path
) -> None:
    output = tmp_path / "int8.onnx"
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize(qdq_onnx, output, "digits")
    with pytest.raises(UsageError, match="samples to calibrate with"):
        quantize(float_onnx, output, "digits", PtqOptions(images=10**6))
    with pytest.raises(DataError, match="the model takes"):
        quantize(float_onnx, output, str(arrays))
    with pytest.raises(UsageError, match="leave --preprocessing out"):
        quantize(float_onnx, output, "digits", preprocessing=Preprocessing.square(32))
    broken = np.load(arrays)
    broken[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", broken)
    with pytest.raises(QuantizationError, match=r"'input'.*not finite"):
        quantize(save(block_network(quantized=False), tmp_path / "b.onnx"), output, str(tmp_path / "nan.npy"))
    assert not output.exists()


def test_images_for_a_model_without_preprocessing(blocks: Path, float_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say how images"):
        quantize(blocks, tmp_path / "int8.onnx", "digits")
    done = quantize(
        blocks,
        tmp_path / "int8.onnx",
        "digits",
        PtqOptions(method="max", images=8),
        preprocessing=Preprocessing.square(12),
    )
    assert done.dev is None  # the model has no labels
    keys = {entry.key for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert "trtdeploy.preprocessing" in keys


def test_a_fixed_batch_size_is_kept_to(arrays: Path, tmp_path: Path) -> None:
    model = block_network(quantized=False)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    path = save(model, tmp_path / "four.onnx")
    done = quantize(path, tmp_path / "int8.onnx", str(arrays), PtqOptions(method="max"))
    assert done.calibration["images"] == 40
    with pytest.raises(UsageError, match="batches of exactly 4"):
        quantize(path, tmp_path / "int8.onnx", str(arrays), PtqOptions(method="max", images=6))


def test_an_older_opset_is_converted(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(4, 3, dtype=np.float32).reshape(4, 3, 1, 1), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "old",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 5, 5])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4, 5, 5])],
        [weight],
    )
    old = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=6)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((8, 3, 5, 5)).astype(np.float32))
    source, output = save(old, tmp_path / "old.onnx"), tmp_path / "int8.onnx"
    done = quantize(source, output, str(tmp_path / "x.npy"), PtqOptions(method="max"))
    assert done.quantized_layers == 1
    assert onnx.load(output).opset_import[0].version >= 13
