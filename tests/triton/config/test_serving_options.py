from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from trtdeploy.doctor.triton_releases import preflight
from trtdeploy.errors import ModelError, UsageError
from trtdeploy.plan import DeviceFacts, Manifest, Plan, RuntimeFacts
from trtdeploy.triton.config import PackageOptions, check_config, make_config, predicted_memory, read_options, schema
from trtdeploy.triton.repository.package import package

pytest.importorskip("tritonclient.grpc")

FULL = """
max_batch_size: 16
instances: 2
max_queue_delay_us: 500
preferred_batch_sizes: [4, 16]
queue_policy: {timeout_action: DELAY, timeout_us: 1000, max_queue_size: 100}
priorities: {levels: 2, default: 2, queue_policy: {1: {timeout_us: 10}}}
gpus: [0, 1]
profiles: [0]
cuda_graphs:
  - {batch_size: 4}
  - {batch_size: 16, dims: {input: [3, 32, 32]}, lower_bound_batch_size: 5}
response_cache: true
rate_limiter: {resources: [{name: dla, count: 1, shared: true}], priority: 3}
version_policy: {latest: 2}
"""


def on_tensorrt(plan: Plan) -> Manifest:
    return plan.manifest.model_copy(
        update={
            "runtime": RuntimeFacts(name="tensorrt", version="10.16.1.11"),
            "device": DeviceFacts(kind="gpu", name="a GPU", capability="9.0"),
        }
    )


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serving.yaml"
    path.write_text(text)
    return path


def test_every_option_reaches_the_config(qdq_plan: Plan, tmp_path: Path) -> None:
    config = make_config(on_tensorrt(qdq_plan), "m", read_options(written(tmp_path, FULL)))
    assert [f for f in check_config(config, gpus=2) if f.severity == "error"] == []
    batching = config.dynamic_batching
    assert (config.max_batch_size, list(batching.preferred_batch_size)) == (16, [4, 16])
    assert batching.max_queue_delay_microseconds == 500
    assert batching.default_queue_policy.timeout_action == schema().ModelQueuePolicy.DELAY
    assert batching.default_queue_policy.max_queue_size == 100
    assert (batching.priority_levels, batching.default_priority_level) == (2, 2)
    assert batching.priority_queue_policy[1].default_timeout_microseconds == 10
    group = config.instance_group[0]
    assert (group.count, list(group.gpus), list(group.profile)) == (2, [0, 1], ["0"])
    assert group.rate_limiter.priority == 3
    assert getattr(group.rate_limiter.resources[0], "global") is True
    assert config.response_cache.enable
    assert config.version_policy.latest.num_versions == 2
    graphs = config.optimization.cuda.graph_spec
    assert [(graph.batch_size, list(graph.input["input"].dim)) for graph in graphs] == [
        (4, [3, 32, 32]),
        (16, [3, 32, 32]),
    ]
    assert graphs[1].graph_lower_bound.batch_size == 5
    assert list(graphs[1].graph_lower_bound.input["input"].dim) == [3, 32, 32]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instance: 2", "instance"),
        ("queue_policy: {timeout: 2}", "queue_policy.timeout"),
        ("instances: 0", "instances"),
        ("priorities: {levels: 2, default: 3}", "priority levels are 1 to 2"),
        ("version_policy: {latest: 1, all: true}", "exactly one"),
        ("queue_policy: {timeout_us: -1}", "timeout_us"),
        ("queue_policy: {allow_timeout_override: true}", "needs timeout_us"),
        ("[1, 2]", "list"),
        ("a: b: c", "YAML"),
    ],
)
def test_an_impossible_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        read_options(written(tmp_path, text))


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    options = read_options(written(tmp_path, "instances: 2\ncontexts: 3"), instances=4, contexts=None)
    assert (options.instances, options.contexts) == (4, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("preferred_batch_sizes: [33]", "33"),
        ("{max_batch_size: 1, preferred_batch_sizes: [1]}", "need batches of more than one"),
        ("{max_batch_size: 1, max_queue_delay_us: 5000}", "max_queue_delay_us need batches of more than one"),
        ("{preserve_ordering: true, priorities: {levels: 2, default: 1}}", "preserve_ordering"),
        ("gpus: [0]", "a CPU"),
        ("cuda_graphs: [{batch_size: 1}]", "TensorRT backend"),
        ("profiles: [0]", "TensorRT backend"),
    ],
)
def test_what_this_plan_cannot_do_is_refused(text: str, words: str, qdq_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        make_config(qdq_plan.manifest, "m", read_options(written(tmp_path, text)))


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ("{batch_size: 64}", "batches are 1 to 32"),
        ("{batch_size: 2, dims: {input: [3, 64, 64]}}", "No profile"),
        ("{batch_size: 2, dims: {image: [3, 32, 32]}}", "every input"),
    ],
)
def test_a_cuda_graph_needs_a_profile(graph: str, words: str, qdq_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        make_config(on_tensorrt(qdq_plan), "m", read_options(written(tmp_path, f"cuda_graphs: [{graph}]")))


def test_contexts_are_refused_where_the_backend_has_none(qdq_plan: Plan) -> None:
    with pytest.raises(UsageError, match="contexts 3 are for the Python backend") as caught:
        make_config(on_tensorrt(qdq_plan), "m", PackageOptions(contexts=3, instances=2))
    assert "instances 6" in str(caught.value)


def test_a_class_without_a_label_is_refused_and_a_label_too_many_is_not(qdq_plan: Plan) -> None:
    labels = qdq_plan.manifest.labels
    assert labels is not None
    with pytest.raises(ModelError, match="scores 10 classes and has 9 labels"):
        make_config(qdq_plan.manifest.model_copy(update={"labels": labels[:9]}), "m", PackageOptions())
    make_config(qdq_plan.manifest.model_copy(update={"labels": (*labels, "more")}), "m", PackageOptions())


def test_warm_up_requests_come_from_a_real_sample(qdq_plan: Plan, tmp_path: Path) -> None:
    sample = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", sample)
    text = "preferred_batch_sizes: [8]\nwarmup: {samples: {input: x.npy}, count: 2}"
    folder = package(qdq_plan.path, tmp_path / "models", "m", options=read_options(written(tmp_path, text))).folder
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema().ModelConfig())
    assert [(request.batch_size, request.count) for request in config.model_warmup] == [(1, 2), (8, 2), (32, 2)]
    file = folder / "warmup" / config.model_warmup[0].inputs["input"].input_data_file
    assert file.read_bytes() == sample.tobytes()
    assert [f for f in check_config(config, folder) if f.severity == "error"] == []
    np.save(tmp_path / "x.npy", sample.astype(np.float64))
    with pytest.raises(ModelError, match="float64"):
        package(qdq_plan.path, tmp_path / "models", "m", options=read_options(written(tmp_path, text)))


def test_instances_multiply_memory_where_shapes_are_dynamic(qdq_plan: Plan, tmp_path: Path) -> None:
    options = read_options(written(tmp_path, "instances: 3"))
    dynamic = on_tensorrt(qdq_plan)
    assert predicted_memory(dynamic, options).total_bytes == 3 * dynamic.plan_bytes

    def fixed(spec: Any) -> Any:
        return spec.model_copy(update={"shape": (4, *spec.shape[1:])})

    static = dynamic.model_copy(
        update={"inputs": tuple(map(fixed, dynamic.inputs)), "outputs": tuple(map(fixed, dynamic.outputs))}
    )
    assert predicted_memory(static, options).copies == 1
    on_cpu = qdq_plan.manifest.model_copy(update={"inputs": static.inputs, "outputs": static.outputs})
    assert predicted_memory(on_cpu, options).copies == 3


def test_the_preflight_says_which_containers_load_a_plan(qdq_plan: Plan) -> None:
    verdicts = preflight(on_tensorrt(qdq_plan))
    assert verdicts["load it"] == ["26.05"]
    assert {"25.12", "26.06", "26.07", "26.03", "26.08"} <= set(verdicts["refuse it"])
    assert set(verdicts["not known"]) == {"26.02", "26.04"}
    assert not any(preflight(qdq_plan.manifest).values())
