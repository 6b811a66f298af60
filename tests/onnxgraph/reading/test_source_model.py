"""ONNX files that are none, or that break a rule: always ModelError, never another exception, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network, doubling, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.engine import Engine
from trtdeploy.errors import ModelError
from trtdeploy.files import sha256_bytes
from trtdeploy.onnxgraph.reading.source import CALIBRATION_KEY, LABELS_KEY, PREPROCESSING_KEY, load_source
from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for
from trtdeploy.validation.classifiers import onnx_classifier

QUICK = BuildConfig(timing_rounds=1, threads=1)
SMALL = block_network(channels=4).SerializeToString()
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(content: bytes | onnx.ModelProto, tmp_path: Path) -> ModelError:
    """Build and expect ModelError with no trace left on disk."""
    folder = tmp_path / "refused"
    folder.mkdir(exist_ok=True)
    source = folder / "model.onnx"
    source.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(ModelError) as caught:
        build(source, folder / "model.plan", QUICK)
    assert caught.value.exit_code == 2
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    return caught.value


def built_or_refused(content: bytes, tmp_path: Path) -> None:
    """Build: either there is a plan that loads, or a ModelError and nothing on disk."""
    source, plan = tmp_path / "fuzzed.onnx", tmp_path / "fuzzed.plan"
    source.write_bytes(content)
    for path in (plan, tmp_path / "fuzzed.plan.json"):
        path.unlink(missing_ok=True)
    try:
        build(source, plan, QUICK)
    except ModelError:
        assert not plan.exists()
        assert not (tmp_path / "fuzzed.plan.json").exists()
    else:
        Engine.load(plan).close()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model\n", b"\x00" * 100, b"\x08\x09", b"{}", b"\x89PNG\r\n\x1a\n" + bytes(64)],
    ids=["empty", "text", "zeros", "version-only", "json", "png"],
)
def test_what_is_no_onnx_file_is_a_model_error(content: bytes, tmp_path: Path) -> None:
    assert "is not an ONNX model" in str(refused(content, tmp_path))


def test_a_torch_checkpoint_is_a_model_error_that_says_how_to_export(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "checkpoint.pt")
    error = refused((tmp_path / "checkpoint.pt").read_bytes(), tmp_path)
    assert "not an ONNX model" in str(error)


def test_a_missing_file_or_a_folder_is_a_model_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.onnx", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            build(path, tmp_path / "model.plan", QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999])
def test_a_truncated_model_is_a_model_error(share: float, tmp_path: Path) -> None:
    refused(SMALL[: int(len(SMALL) * share)], tmp_path)


@given(st.binary(max_size=300))
@FUZZ
def test_any_bytes_are_a_model_error(tmp_path: Path, content: bytes) -> None:
    refused(content, tmp_path)


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@example([(0, 0)])
@FUZZ
def test_a_model_with_changed_bytes_is_built_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for position, value in changes:
        content[position] = value
    built_or_refused(bytes(content), tmp_path)


@given(st.integers(0, len(SMALL)), st.integers(0, len(SMALL)))
@FUZZ
def test_a_model_with_a_part_missing_is_built_or_refused(tmp_path: Path, first: int, second: int) -> None:
    built_or_refused(SMALL[: min(first, second)] + SMALL[max(first, second) :], tmp_path)


def test_an_operator_that_the_runtime_does_not_have_is_named(tmp_path: Path) -> None:
    g = GraphMaker()
    g.nodes.append(helper.make_node("Sparkle", ["x"], ["y"], domain="somewhere.else"))
    model = g.model({"x": ["batch", 4]}, {"y": ["batch", 4]})
    model.opset_import.append(helper.make_opsetid("somewhere.else", 1))
    error = refused(model, tmp_path)
    assert "Sparkle" in str(error)
    assert "ONNX Runtime" in str(error)
    with pytest.raises(ModelError, match="Sparkle"):
        onnx_classifier(save(model, tmp_path / "m.onnx"))


def test_an_operator_that_onnx_does_not_have_breaks_its_rules(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("NoSuchOperator", "x", output="y")
    assert "NoSuchOperator" in str(refused(g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path))


def test_a_newer_opset_or_format_than_the_runtime_reads_is_a_model_error(tmp_path: Path) -> None:
    model = doubling()
    model.opset_import[0].version = 999
    refused(model, tmp_path)
    model = doubling()
    model.ir_version = 999
    refused(model, tmp_path)


def test_shapes_that_do_not_fit_each_other_are_a_model_error(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("MatMul", "x", g.constant(np.ones((5, 3), np.float32)), output="y")
    refused(g.model({"x": ["batch", 4]}, {"y": ["batch", 3]}), tmp_path)


def test_a_node_that_reads_what_nobody_makes_is_a_model_error(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Add", "x", "nobody", output="y")
    assert "nobody" in str(refused(g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path))


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.UINT16])
def test_a_data_type_that_is_not_supported_is_named_with_those_that_are(kind: int, tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Identity", "x", output="y")
    model = g.model({"x": [4]}, {"y": [4]}, dtype=kind)
    model.graph.output[0].type.tensor_type.elem_type = kind
    error = refused(model, tmp_path)
    assert f"type {kind} is not supported" in str(error)
    assert "float32" in str(error)


def test_a_sequence_input_is_a_model_error(tmp_path: Path) -> None:
    node = helper.make_node("SequenceAt", ["x", "index"], ["y"])
    graph = helper.make_graph(
        [node],
        "sequence",
        [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [onnx.numpy_helper.from_array(np.array(0), "index")],
    )
    error = refused(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path)
    assert "'x' is not a tensor" in str(error)


def test_an_input_without_a_shape_is_a_model_error_that_names_it(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Relu", "image", output="y")
    error = refused(g.model({"image": None}, {"y": [4]}), tmp_path)
    assert "'image' has no shape" in str(error)


def test_an_output_whose_shape_nothing_tells_is_a_model_error_that_names_it(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Reshape", "x", g.node("Cast", "sizes", to=TensorProto.INT64), output="reshaped")
    error = refused(g.model({"x": [4], "sizes": ["rank"]}, {"reshaped": None}), tmp_path)
    assert "output 'reshaped' has no shape" in str(error)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (PREPROCESSING_KEY, "{"),
        (PREPROCESSING_KEY, '{"resize": 32}'),
        (PREPROCESSING_KEY, '{"resize": 32, "crop": [32, 32], "zoom": 2}'),
        (PREPROCESSING_KEY, "[" * 100_000),
        (LABELS_KEY, "cat,dog"),
        (LABELS_KEY, '{"0": "cat"}'),
        (LABELS_KEY, '["cat", 1]'),
        (LABELS_KEY, "[" * 100_000),
        (LABELS_KEY, '["\\ud800"]'),
        (CALIBRATION_KEY, "[1, 2]"),
        (CALIBRATION_KEY, '{"samples": '),
        (CALIBRATION_KEY, '{"amax": NaN}'),
        (CALIBRATION_KEY, '{"amax": -Infinity}'),
        (CALIBRATION_KEY, '{"a": ' * 10_000),
    ],
)
def test_broken_metadata_is_a_model_error_that_names_it(key: str, text: str, tmp_path: Path) -> None:
    model = doubling()
    helper.set_model_props(model, {key: text})
    error = refused(model, tmp_path)
    assert key in str(error) or "preprocessing specification" in str(error)
    assert "model.onnx" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
@FUZZ
@example({"amax": 1e999})
@example({"count": 10**400})
def test_any_calibration_record_is_refused_or_comes_back_from_the_manifest(
    tmp_path: Path, record: dict[str, object]
) -> None:
    model = doubling(("batch", 1))
    helper.set_model_props(model, {CALIBRATION_KEY: json.dumps(record)})
    source = save(model, tmp_path / "m.onnx")
    try:
        plan = build(source, tmp_path / "m.plan", QUICK)
    except ModelError:
        assert "NaN" in json.dumps(record) or "Infinity" in json.dumps(record)
        return
    with Engine.load(plan.path) as engine:
        assert engine.manifest.calibration == record


def test_metadata_is_read(tmp_path: Path) -> None:
    model = doubling()
    preprocessing = Preprocessing.square(8)
    helper.set_model_props(
        model,
        {
            PREPROCESSING_KEY: preprocessing.to_json(),
            LABELS_KEY: '["Katze", "köpek"]',
            CALIBRATION_KEY: '{"samples": 3}',
            "author": "[[[",
        },
    )
    source = load_source(save(model, tmp_path / "m.onnx"))
    assert source.preprocessing == preprocessing
    assert source.labels == ("Katze", "köpek")
    assert source.calibration == {"samples": 3}
    assert source.sha256 == sha256_bytes((tmp_path / "m.onnx").read_bytes())
    assert [str(spec) for spec in source.inputs + source.outputs] == ["x float32[?, 4]", "y float32[?, 4]"]


def test_a_model_without_metadata_has_none(tmp_path: Path) -> None:
    source = load_source(save(doubling(), tmp_path / "m.onnx"))
    assert (source.preprocessing, source.labels, source.calibration) == (None, None, None)


def test_an_initializer_with_a_default_is_no_input(tmp_path: Path) -> None:
    g = GraphMaker()
    g.constant(np.ones(4, np.float32), "offset")
    g.node("Add", "x", "offset", output="y")
    source = load_source(save(g.model({"x": ["batch", 4], "offset": [4]}, {"y": ["batch", 4]}), tmp_path / "m.onnx"))
    assert [spec.name for spec in source.inputs] == ["x"]


@pytest.mark.parametrize("ir_version", [3, 9])
def test_a_model_whose_initializers_are_inputs_too_builds_like_one_where_they_are_not(
    ir_version: int, tmp_path: Path
) -> None:
    """As older exporters write it: every candidate of a build still has all its weights."""
    model = block_network()
    model.ir_version = ir_version
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    path = save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(path))
    source = load_source(path)
    assert [value.name for value in source.proto.graph.input] == ["input"]
    samples = {"input": np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)}
    expected = as_exported(block_network(), samples)
    for tactic in tactics_for(True):
        content = tactic.compile(source.proto)
        if content is not None:
            for answer, exact in zip(as_exported(content, samples), expected, strict=True):
                assert np.abs(answer - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("size", [-1, -7])
def test_a_negative_size_means_dynamic_as_some_exporters_write_it(size: int, tmp_path: Path) -> None:
    source = load_source(save(doubling((size, 4)), tmp_path / "m.onnx"))  # type: ignore[arg-type]
    assert source.inputs[0].shape == (-1, 4)


def test_an_earlier_plan_survives_a_model_that_is_refused(tmp_path: Path) -> None:
    plan = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK).path
    before = {path.name: path.read_bytes() for path in tmp_path.glob("m.plan*")}
    (tmp_path / "m.onnx").write_bytes(SMALL[:1000])
    with pytest.raises(ModelError):
        build(tmp_path / "m.onnx", plan, QUICK)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("m.plan*")} == before
    assert len(before) == 2


# Exporters put the weights of larger models into a file beside the model.


def save_with_external_weights(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=64)
    assert (path.parent / (path.name + ".data")).stat().st_size > 0
    return path


@pytest.mark.parametrize("quantized", [True, False])
def test_weights_in_a_file_beside_the_model_are_built_into_the_plan(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    source = save_with_external_weights(block_network(quantized=quantized), folder / "m.onnx")
    plan = build(source, tmp_path / "m.plan", QUICK)
    inputs = {"input": np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)}
    expected = as_exported(block_network(quantized=quantized), inputs)
    for path in folder.iterdir():
        path.unlink()
    with Engine.load(plan.path) as engine:
        np.testing.assert_allclose(engine.infer(inputs)["logits"], expected[0], rtol=1e-3, atol=0.05)


def test_the_digest_covers_weights_in_other_files(tmp_path: Path) -> None:
    source = save_with_external_weights(block_network(), tmp_path / "m.onnx")
    before = load_source(source).sha256
    assert load_source(source).sha256 == before
    data = tmp_path / "m.onnx.data"
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    data.write_bytes(content)
    assert load_source(source).sha256 != before


@pytest.mark.parametrize("damage", ["missing", "truncated", "outside"])
def test_weights_that_cannot_be_read_are_a_model_error(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save_with_external_weights(block_network(), tmp_path / "m.onnx")
    data = tmp_path / "m.onnx.data"
    if damage == "missing":
        data.unlink()
    elif damage == "truncated":
        os.truncate(data, 100)
    else:
        model = onnx.load(source, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../" + tmp_path.name + "/" + data.name
        source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError):
        build(source, tmp_path / "m.plan", QUICK)
    assert not (tmp_path / "m.plan").exists()
