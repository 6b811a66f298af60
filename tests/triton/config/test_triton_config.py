from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ModelError
from trtdeploy.plan import DeviceFacts, Manifest, Plan, PrecisionFacts, RuntimeFacts, SourceFacts
from trtdeploy.tensors import ShapeRange, TensorSpec
from trtdeploy.triton.config import DEFAULT_MAX_BATCH_SIZE, PackageOptions, make_config, render_config, schema
from trtdeploy.triton.repository.package import package

GOLDEN = """
name: "classifier"
backend: "python"
max_batch_size: 32
input { name: "input" data_type: TYPE_FP32 dims: [ 3, 32, 32 ] }
output { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { }
parameters { key: "trtdeploy.contexts" value { string_value: "1" } }
"""


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def profile(low: int, high: int, *size: int, name: str = "input") -> dict[str, ShapeRange]:
    return {name: ShapeRange(min=(low, *size), opt=(low, *size), max=(high, *size))}


def manifest(**changes: Any) -> Manifest:
    """A TensorRT classifier over (N, 3, 8, 8) without profiles, unless told otherwise."""
    facts: dict[str, Any] = {
        "trtdeploy_version": "0.1.0",
        "created_at": "2025-01-01T00:00:00+00:00",
        "runtime": RuntimeFacts(name="tensorrt", version="10.13.0"),
        "device": DeviceFacts(kind="gpu", name="a GPU", capability="8.9"),
        "inputs": (spec("input", "float32", -1, 3, 8, 8),),
        "outputs": (spec("logits", "float32", -1, 10),),
        "precision": PrecisionFacts(weighted_layers=1, quantized_layers=1, integer_kernels=None, note=""),
        "plan_bytes": 4,
        "plan_sha256": "0" * 64,
        "onnx": SourceFacts(file="m.onnx", sha256="0" * 64),
        "build_config": {},
        **changes,
    }
    return Manifest(**facts)


def rendered(facts: Manifest, **options: Any) -> Any:
    """What Triton's schema reads from the rendered text."""
    text = render_config(facts, "model", PackageOptions(**options))
    parsed = text_format.Parse(text, schema().ModelConfig())
    assert parsed == make_config(facts, "model", PackageOptions(**options))
    return parsed


def test_the_config_of_a_classifier_is_the_golden_one(qdq_plan: Plan) -> None:
    config = text_format.Parse(render_config(qdq_plan.manifest, "classifier", PackageOptions()), schema().ModelConfig())
    assert json.loads(config.parameters.pop("trtdeploy.labels").string_value) == [str(digit) for digit in range(10)]
    carried = Preprocessing.from_json(config.parameters.pop("trtdeploy.preprocessing").string_value)
    assert carried == qdq_plan.manifest.preprocessing
    assert config == text_format.Parse(GOLDEN, schema().ModelConfig())


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, DEFAULT_MAX_BATCH_SIZE),
        ({}, {"max_batch_size": 7}, 7),
        ({"profiles": (profile(1, 8, 3, 8, 8),)}, {}, 8),
        ({"profiles": (profile(1, 8, 3, 8, 8),)}, {"max_batch_size": 8}, 8),
        ({"profiles": (profile(1, 8, 3, 8, 8), profile(9, 64, 3, 8, 8))}, {}, 64),
        ({"inputs": (spec("input", "float32", 4, 3, 8, 8),), "outputs": (spec("logits", "float32", 4, 10),)}, {}, 0),
        ({"outputs": (spec("logits", "float32", 4, 10),)}, {}, 0),
        ({"inputs": (spec("input", "float32", -1, 3, 8, 8), spec("scale", "float32", 1))}, {}, 0),
        ({"outputs": (spec("class", "int64", -1),)}, {}, 0),
    ],
    ids=["default", "asked", "profile", "same", "profiles", "static", "mixed-output", "mixed-input", "only-a-batch"],
)
def test_the_batch_size_follows_from_the_plan(changes: dict[str, Any], options: dict[str, Any], expected: int) -> None:
    config = rendered(manifest(**changes), **options)
    facts = manifest(**changes)
    assert config.max_batch_size == expected
    first = 1 if expected else 0
    assert [list(tensor.dims) for tensor in config.input] == [list(tensor.shape[first:]) for tensor in facts.inputs]
    assert [list(tensor.dims) for tensor in config.output] == [list(tensor.shape[first:]) for tensor in facts.outputs]
    assert config.HasField("dynamic_batching") == (expected > 1)


def test_several_inputs_take_the_smallest_of_their_batches() -> None:
    shapes = profile(1, 8, 3, 8, 8) | profile(1, 4, 2, name="scale")
    inputs = (spec("input", "float32", -1, 3, 8, 8), spec("scale", "float32", -1, 2))
    assert rendered(manifest(inputs=inputs, profiles=(shapes,))).max_batch_size == 4


@pytest.mark.parametrize(
    ("changes", "asked", "words"),
    [
        ({"profiles": (profile(1, 8, 3, 8, 8),)}, 9, ["9", "8", "--shape"]),
        ({"inputs": (spec("input", "float32", 4, 3, 8, 8),)}, 2, ["input", "dynamic"]),
        ({"outputs": (spec("class", "int64", -1),)}, 2, ["class"]),
        ({"outputs": (spec("loss", "float32"),)}, None, ["scalar", "loss"]),
    ],
    ids=["beyond-the-profiles", "static", "only-a-batch", "scalar"],
)
def test_what_the_plan_cannot_do_is_refused_in_words(
    changes: dict[str, Any], asked: int | None, words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        render_config(manifest(**changes), "model", PackageOptions(max_batch_size=asked))
    assert all(word in str(caught.value) for word in words)


def test_a_tensorrt_plan_is_served_by_the_tensorrt_backend_on_a_gpu() -> None:
    config = rendered(manifest(), instances=2)
    pb = schema()
    assert config.backend == "tensorrt"
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, pb.ModelInstanceGroup.KIND_GPU)]
    assert "trtdeploy.contexts" not in config.parameters
    assert not config.instance_group[0].profile


def test_every_profile_of_a_tensorrt_plan_gets_a_context() -> None:
    profiles = (profile(1, 8, 3, 8, 8), profile(9, 64, 3, 8, 8))
    assert list(rendered(manifest(profiles=profiles)).instance_group[0].profile) == ["0", "1"]


def test_other_runtimes_are_served_by_the_python_backend() -> None:
    config = rendered(manifest(runtime=RuntimeFacts(name="tensorrt-rtx", version="1.2")), contexts=3)
    assert config.backend == "python"
    assert config.parameters["trtdeploy.contexts"].string_value == "3"


@pytest.mark.parametrize(
    ("dtype", "triton"),
    [
        ("float16", "TYPE_FP16"),
        ("float32", "TYPE_FP32"),
        ("float64", "TYPE_FP64"),
        ("int8", "TYPE_INT8"),
        ("uint8", "TYPE_UINT8"),
        ("int32", "TYPE_INT32"),
        ("int64", "TYPE_INT64"),
        ("bool", "TYPE_BOOL"),
    ],
)
def test_every_data_type_has_its_name_in_triton(dtype: str, triton: str) -> None:
    config = rendered(manifest(inputs=(spec("x", dtype, -1, 2),), outputs=(spec("y", dtype, -1, 2),)))
    assert {schema().DataType.Name(tensor.data_type) for tensor in (*config.input, *config.output)} == {triton}


def test_labels_of_several_outputs_name_no_file() -> None:
    outputs = (spec("logits", "float32", -1, 2), spec("features", "float32", -1, 4))
    config = rendered(manifest(outputs=outputs, labels=("cat", "dog")))
    assert [tensor.label_filename for tensor in config.output] == ["", ""]
    assert json.loads(config.parameters["trtdeploy.labels"].string_value) == ["cat", "dog"]


def test_names_survive_the_text_format() -> None:
    name, label = 'in"put\n{}', 'Käse "rot"\t\\'
    inputs, outputs = (spec(name, "float32", -1, 2),), (spec("score", "float32", -1, 1),)
    config = rendered(manifest(inputs=inputs, outputs=outputs, labels=(label,)))
    assert config.input[0].name == name
    assert json.loads(config.parameters["trtdeploy.labels"].string_value) == [label]


def test_options_reach_the_config() -> None:
    config = rendered(manifest(), instances=3, max_batch_size=1)
    assert not config.HasField("dynamic_batching")  # nothing to form batches of
    assert config.instance_group[0].count == 3
    assert rendered(manifest(), max_queue_delay_us=250).dynamic_batching.max_queue_delay_microseconds == 250


def test_a_tensorrt_plan_becomes_model_plan_without_model_py(qdq_plan: Plan, tmp_path: Path) -> None:
    facts = qdq_plan.manifest.model_copy(
        update={
            "runtime": RuntimeFacts(name="tensorrt", version="10.13.0"),
            "device": DeviceFacts(kind="gpu", name="a GPU", capability="8.9"),
        }
    )
    plan = tmp_path / "gpu.plan"
    plan.write_bytes(qdq_plan.path.read_bytes())
    plan.with_name("gpu.plan.json").write_text(facts.to_json())
    packaged = package(plan, tmp_path / "models", "gpu")
    assert sorted(file.name for file in (packaged.folder / "1").iterdir()) == ["model.plan", "model.plan.json"]
    assert (packaged.folder / "1" / "model.plan").read_bytes() == plan.read_bytes()
