"""TensorRT on a real GPU: every flavour that is installed. One command: ``pytest -m gpu``."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cuda.api import CudaApi, load_api
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DevicePool, PinnedBuffer, copy_to_device
from trtdeploy.cuda.streams import Stream
from trtdeploy.engine import Engine
from trtdeploy.errors import PlanIncompatibleError, RuntimeUnavailableError, ShapeError, TrtDeployError
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.onnxruntime.session import make_session
from trtdeploy.runtimes.tensorrt.bindings import load_bindings
from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime
from trtdeploy.tensors import Array, ShapeRange

pytestmark = [pytest.mark.gpu]

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
    pytestmark.append(pytest.mark.skip(reason=reason))


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


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: tuple[Any, ...] = ()) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def tensor(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def covering(low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> ShapeRange:
    return ShapeRange(min=low, opt=best, max=high)


@pytest.fixture
def reshaping(plan: Plan, tmp_path: Path) -> Plan:
    """A plan that reshapes x to the values of "shape", in two profiles: tall and wide."""
    path = saved(
        tmp_path / "reshaping.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [tensor("x", ["batch", 64]), tensor("shape", [2], TensorProto.INT64)],
        [tensor("y", ["a", "b"])],
    )
    x = covering((1, 64), (8, 64), (32, 64))
    tall, wide = covering((64, 1), (128, 4), (2048, 64)), covering((1, 64), (4, 128), (32, 2048))
    profiles = ({"x": x, "shape": tall}, {"x": x, "shape": wide})
    return build(path, tmp_path / "r.plan", BuildConfig(runtime=plan.manifest.runtime.name, profiles=profiles))


def test_values_of_shape_tensors_choose_the_profile(reshaping: Plan) -> None:
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    with Engine.load(reshaping.path, contexts=2) as engine:
        for shape in ((128, 1), (1, 128), (2, 64), (128, 1)):
            out = engine.infer({"x": x, "shape": np.array(shape, np.int64)})
            np.testing.assert_array_equal(out["y"], x.reshape(shape))
        with pytest.raises(ShapeError, match="lie in no profile"):
            engine.infer({"x": x, "shape": np.array((33, 65), np.int64)})


def test_an_engine_without_manifest_has_the_ranges_of_its_values(reshaping: Plan) -> None:
    manifest_path(reshaping.path).unlink()
    with Engine.load(reshaping.path, without_manifest=reshaping.manifest.runtime.name) as engine:
        assert engine.manifest.profiles == reshaping.manifest.profiles
        assert engine.manifest.profile_values == reshaping.manifest.profile_values


def test_values_that_fit_no_shape_leave_nothing_behind(reshaping: Plan) -> None:
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    with Engine.load(reshaping.path) as engine:
        for _ in range(2):
            with pytest.raises(TrtDeployError):
                engine.infer({"x": x, "shape": np.array((128, 2), np.int64)})
            out = engine.infer({"x": x, "shape": np.array((64, 2), np.int64)})
            np.testing.assert_array_equal(out["y"], x.reshape(64, 2))


@pytest.mark.parametrize("graphs", [0, 4])
def test_two_profiles_in_turn(plan: Plan, qdq_onnx: Path, tmp_path: Path, graphs: int) -> None:
    small = covering((1, 3, 32, 32), (1, 3, 32, 32), (2, 3, 32, 32))
    large = covering((3, 3, 32, 32), (8, 3, 32, 32), (16, 3, 32, 32))
    config = BuildConfig(runtime=plan.manifest.runtime.name, profiles=({"input": small}, {"input": large}))
    built = build(qdq_onnx, tmp_path / "two.plan", config)
    with Engine.load(built.path, options=LoadOptions(cuda_graphs=graphs)) as engine:
        for size in (1, 8, 2, 2, 2, 2, 16, 16, 16, 16, 1, 3):
            assert close_enough(engine.infer(batch(size))["logits"], reference(qdq_onnx, batch(size)))


def test_a_model_without_inputs(plan: Plan, tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.arange(6, dtype=np.float32), "values")
    nodes = [helper.make_node("Constant", [], ["c"], value=values), helper.make_node("Relu", ["c"], ["y"])]
    path = saved(tmp_path / "constant.onnx", nodes, [], [tensor("y", [6])])
    built = build(path, tmp_path / "c.plan", BuildConfig(runtime=plan.manifest.runtime.name))
    with Engine.load(built.path) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine.infer({})["y"], np.arange(6, dtype=np.float32))


def test_a_plan_with_a_vectorized_input_is_refused(plan: Plan, tmp_path: Path) -> None:
    name = plan.manifest.runtime.name
    bindings = load_bindings(name)
    trt: Any = bindings.trt
    weights = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float16)
    path = saved(
        tmp_path / "conv.onnx",
        [helper.make_node("Conv", ["input", "w"], ["y"], pads=[1, 1, 1, 1])],
        [tensor("input", [1, 16, 8, 8], TensorProto.FLOAT16)],
        [tensor("y", [1, 16, 8, 8], TensorProto.FLOAT16)],
        (numpy_helper.from_array(weights, "w"),),
    )
    builder = trt.Builder(bindings.messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, bindings.messages.logger)
    assert parser.parse(path.read_bytes())
    network.get_input(0).allowed_formats = 1 << int(trt.TensorFormat.HWC8)
    content = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    vectorized = tmp_path / "hwc8.plan"
    vectorized.write_bytes(content)
    with pytest.raises(PlanIncompatibleError, match="tensor input has another format than linear"):
        Engine.load(vectorized, without_manifest=name)


class DeviceInput:
    """An array on GPU 0, through ``__cuda_array_interface__``."""

    def __init__(self, values: Array, api: CudaApi) -> None:
        self._device = Device(api, 0)
        self._stream = Stream(self._device)
        self._pool = DevicePool(self._device, release_threshold_bytes=0)
        self._buffer = self._pool.allocate(values.nbytes, self._stream)
        pinned = PinnedBuffer(self._device, values.nbytes)
        pinned.view(values.dtype, values.shape)[...] = values
        copy_to_device(self._device, self._buffer.address, pinned.address, values.nbytes, self._stream)
        self._stream.synchronize()
        pinned.close()
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self._buffer.address, True),
            "version": 3,
        }

    def release(self) -> None:
        self._buffer.free(self._stream)
        self._stream.synchronize()
        self._pool.close()
        self._stream.close()


def test_a_caller_keeps_its_gpu(plan: Plan) -> None:
    api = load_api()
    if api.device_count() < 2:
        pytest.skip("this needs two GPUs")

    def check_device(call: str) -> None:
        assert int(api.call("cudaGetDevice")) == 1, call

    before = int(api.call("cudaGetDevice"))
    api.call("cudaSetDevice", 1)
    try:
        with Engine.load(plan.path, contexts=2) as engine:  # on GPU 0
            check_device("load")
            for size in (2, 2, 2, 3):
                engine.infer(batch(size))
                check_device("infer")
                engine.submit(batch(size)).result()
                check_device("submit")
            out = engine.infer(batch(2), outputs="device")
            check_device("infer on the device")
            on_gpu = DeviceInput(batch(2)["input"], api)
            engine.infer({"input": on_gpu})
            on_gpu.release()
            check_device("infer from the device")
            out["logits"].numpy()
            check_device("numpy")
            del out
            check_device("the end of an output")
        check_device("close")
    finally:
        api.call("cudaSetDevice", before)
