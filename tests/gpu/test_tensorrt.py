"""TensorRT on a real GPU: every flavour that is installed. One command: ``pytest -m gpu``."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from trtdeploy.building import BuildConfig, build
from trtdeploy.cuda.api import load_api
from trtdeploy.cuda.device import Device
from trtdeploy.engine import Engine
from trtdeploy.errors import PlanIncompatibleError, RuntimeUnavailableError
from trtdeploy.plan import Plan
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime
from trtdeploy.tensors import Array, ShapeRange

pytestmark = pytest.mark.gpu

INSTALLED = [
    name
    for name, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx"))
    if importlib.util.find_spec(module) is not None
]
# INT8 kernels of a GPU round sums differently from a CPU: a code next door, a few steps of the last scale.
TOLERANCE = 0.05


def obstacle() -> str:
    try:
        load_api()
    except RuntimeUnavailableError as error:
        return error.message
    return "" if INSTALLED else "neither tensorrt nor tensorrt_rtx is installed"


if reason := obstacle():
    pytestmark = [pytest.mark.gpu, pytest.mark.skip(reason=reason)]


def batch(size: int, seed: int = 0) -> dict[str, Array]:
    return {"input": np.random.default_rng(seed).standard_normal((size, 3, 32, 32)).astype(np.float32)}


def reference(model: Path, inputs: dict[str, Array]) -> Array:
    result: Array = make_session(str(model)).run(None, inputs)[0]
    return result


def close_enough(given: Array, wanted: Array) -> bool:
    return bool(np.linalg.norm(given - wanted) <= TOLERANCE * np.linalg.norm(wanted))


@pytest.fixture(scope="module", params=INSTALLED or ["none"])
def plan(request: pytest.FixtureRequest, qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    shapes = ShapeRange(min=(1, 3, 32, 32), opt=(8, 3, 32, 32), max=(32, 3, 32, 32))
    path = tmp_path_factory.mktemp("gpu") / f"{request.param}.plan"
    built = build(qdq_onnx, path, BuildConfig(runtime=request.param, profiles=({"input": shapes},)))
    if not TensorRTRuntime.runs_here(request.param):
        # TensorRT-RTX names no data-centre target: what loading makes of it is worth knowing all the same
        with pytest.raises(PlanIncompatibleError):
            Engine.load(built.path)
        pytest.skip(f"{request.param} {built.manifest.runtime.version} does not support this GPU")
    return built


def test_outputs_are_those_of_onnx_runtime(plan: Plan, qdq_onnx: Path) -> None:
    with Engine.load(plan.path) as engine:
        for size in (1, 3, 8, 32):
            assert close_enough(engine.infer(batch(size))["logits"], reference(qdq_onnx, batch(size)))


def test_the_engine_inspector_proves_int8(plan: Plan) -> None:
    precision = plan.manifest.precision
    assert precision.evidence == "engine inspector"
    assert precision.int8_macs_percent is not None
    assert precision.int8_macs_percent > 0


def test_graph_replay_gives_the_same_bits(plan: Plan) -> None:
    with Engine.load(plan.path, options=LoadOptions(cuda_graphs=0)) as plain:
        wanted = [plain.infer(batch(4, seed))["logits"] for seed in range(8)]
    with Engine.load(plan.path, options=LoadOptions(cuda_graphs=4)) as graphs:
        for _ in range(3):
            for seed, expected in enumerate(wanted):
                np.testing.assert_array_equal(graphs.infer(batch(4, seed))["logits"], expected)


def test_eight_threads_with_a_thousand_requests_each_mix_nothing_up(plan: Plan) -> None:
    with Engine.load(plan.path, contexts=4, timeout_s=None) as engine:
        inputs = [batch(1, seed) for seed in range(64)]
        wanted = [engine.infer(one)["logits"] for one in inputs]
        wrong: list[int] = []

        def ask(first: int) -> None:
            for turn in range(1000):
                index = (first * 13 + turn) % len(inputs)
                if not np.array_equal(engine.infer(inputs[index])["logits"], wanted[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_steady_state_allocates_nothing(plan: Plan) -> None:
    with Engine.load(plan.path, contexts=2) as engine:
        for _ in range(10):
            list(engine.map([batch(8)] * 8, in_flight=4))
        before = engine.memory_report()
        for _ in range(50):
            list(engine.map([batch(8)] * 8, in_flight=4))
        assert engine.memory_report() == before


def test_loading_and_closing_leaks_nothing(plan: Plan) -> None:
    device = Device(load_api(), 0)

    def once() -> None:
        with Engine.load(plan.path, contexts=2) as engine:
            engine.infer(batch(8))

    for _ in range(3):
        once()
    before = device.free_bytes()
    for _ in range(10):
        once()
    assert before - device.free_bytes() < 8 << 20


def test_shared_activations_give_the_same_answers(plan: Plan) -> None:
    with Engine.load(plan.path) as own:
        wanted = [own.infer(batch(2, seed))["logits"] for seed in range(32)]
    with Engine.load(plan.path, contexts=4, options=LoadOptions(activations="shared")) as shared:
        given = list(shared.map([batch(2, seed) for seed in range(32)], in_flight=8))
    for out, expected in zip(given, wanted, strict=True):
        np.testing.assert_array_equal(out["logits"], expected)


def test_a_torch_tensor_on_the_gpu_is_read_where_it_lies(plan: Plan) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    host = batch(4)
    with Engine.load(plan.path) as engine:
        on_device = torch.from_numpy(host["input"]).cuda()
        np.testing.assert_array_equal(engine.infer({"input": on_device})["logits"], engine.infer(host)["logits"])


def test_a_second_build_from_one_timing_cache_takes_the_same_tactics(
    plan: Plan, qdq_onnx: Path, tmp_path: Path
) -> None:
    if plan.manifest.runtime.name != "tensorrt":
        pytest.skip("TensorRT-RTX has no timing cache")
    cache = tmp_path / "b.timing"
    build(qdq_onnx, tmp_path / "a.plan", BuildConfig(runtime="tensorrt", timing_cache=cache))
    verified = BuildConfig(runtime="tensorrt", timing_cache=cache, timing_cache_mode="verify")
    build(qdq_onnx, tmp_path / "b.plan", verified)


def test_a_model_with_data_dependent_output(plan: Plan, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("NonZero", ["input"], ["where"])],
        "nonzero",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("where", TensorProto.INT64, [2, "n"])],
    )
    path = tmp_path / "nonzero.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    built = build(path, tmp_path / "n.plan", BuildConfig(runtime=plan.manifest.runtime.name))
    with Engine.load(built.path) as engine:
        for count in (0, 1, 40):
            values = np.zeros((1, 64), np.float32)
            values[0, :count] = 1
            np.testing.assert_array_equal(engine.infer({"input": values})["where"], np.nonzero(values))
