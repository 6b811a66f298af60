"""The engine on a fake GPU: every order of events that CUDA allows, checked for races, mix-ups and leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.fake_cudart import OUT_OF_MEMORY, FakeViolation
from tests.fakes.fake_gpu import (
    FakeGpu,
    batch,
    batches,
    constant,
    expected,
    linear,
    manifest,
    nonzero,
    reshaping,
    tiling,
)
from tests.fakes.fake_tensorrt import make_plan
from trtdeploy.engine import Engine
from trtdeploy.errors import (
    DeviceMemoryError,
    DtypeError,
    EngineClosedError,
    InferenceError,
    PlanCorruptError,
    PlanIncompatibleError,
    ShapeError,
    UsageError,
)
from trtdeploy.plan import LayerPrecision, PrecisionFacts
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.execution.description import describe_plan, version_in_header
from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime
from trtdeploy.tensors import ShapeRange

SCHEDULES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(out: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(out["y"], expected(inputs["x"]), atol=1e-4)


request = st.tuples(st.integers(1, 32), st.integers(0, 1000))


@SCHEDULES
@given(
    seed=st.integers(0, 2**16),
    eagerness=st.sampled_from([0.0, 0.2, 0.6]),
    contexts=st.integers(1, 3),
    requests=st.lists(request, min_size=1, max_size=12),
    shared=st.booleans(),
    graphs=st.sampled_from([0, 1, 4]),
)
def test_every_answer_belongs_to_its_request_whatever_the_schedule(
    seed: int, eagerness: float, contexts: int, requests: list[tuple[int, int]], shared: bool, graphs: int
) -> None:
    gpu = FakeGpu(seed, eagerness=eagerness)
    options = {"activations": "shared" if shared else "own", "cuda_graphs": graphs}
    with gpu.engine(contexts=contexts, **options) as engine:
        inputs = [batch(size, number) for size, number in requests]
        futures = [engine.submit(one) for one in inputs]
        for future, one in zip(futures, inputs, strict=True):
            check(future.result(), one)
        for out, one in zip(engine.map(inputs, in_flight=4), inputs, strict=True):
            check(out, one)
        check(engine.infer(inputs[0]), inputs[0])


@SCHEDULES
@given(seed=st.integers(0, 2**16), requests=st.lists(request, min_size=1, max_size=10))
def test_a_lease_may_have_two_inferences_under_way_on_one_context(seed: int, requests: list[tuple[int, int]]) -> None:
    gpu = FakeGpu(seed, eagerness=0.2)
    loaded = gpu.load()
    context = loaded.create_context()
    inputs = [batch(size, number) for size, number in requests]
    pending = context.start(inputs[0])
    for before, after in itertools.pairwise(inputs):
        following = context.start(after)
        check(pending.wait(), before)
        pending = following
    check(pending.wait(), inputs[-1])
    context.close()
    loaded.close()
    del context, loaded
    gpu.assert_clean()


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_and_asyncio_at_once(contexts: int) -> None:
    gpu = FakeGpu(1)
    with gpu.engine(contexts=contexts) as engine:
        wrong: list[object] = []

        def ask(first: int) -> None:
            try:
                for index in range(15):
                    one = batch(1 + (first + index) % 5, first * 100 + index)
                    check(engine.infer(one), one)
            except BaseException as error:
                wrong.append(error)

        async def ask_all() -> None:
            ones = [batch(2, 5000 + index) for index in range(15)]
            for out, one in zip(await asyncio.gather(*map(engine.ainfer, ones)), ones, strict=True):
                check(out, one)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(ask_all())
        for thread in threads:
            thread.join()
        assert wrong == []


def test_inputs_may_be_changed_as_soon_as_submit_has_returned() -> None:
    gpu = FakeGpu(2, eagerness=0.0)
    with gpu.engine() as engine:
        one = batch(4, 1)
        wanted = expected(one["x"].copy())
        future = engine.submit(one)
        one["x"][...] = 0
        np.testing.assert_allclose(future.result()["y"], wanted, atol=1e-4)


def test_outputs_stay_as_they_are() -> None:
    gpu = FakeGpu(3)
    with gpu.engine() as engine:
        kept = [(one, engine.infer(one)) for one in (batch(3, index) for index in range(10))]
        for one, out in kept:
            check(out, one)


def test_steady_state_allocates_nothing() -> None:
    gpu = FakeGpu(4)
    with gpu.engine(contexts=2) as engine:
        ones = [batch(8, index) for index in range(6)]
        for _ in range(4):
            list(engine.map(ones, in_flight=4))
        # every context has seen the shape
        with engine.lease() as first, engine.lease() as second:
            for lease in (first, second) * 4:
                lease.execute(ones[0])
        before = gpu.cudart.allocations, gpu.cudart.calls["cudaStreamCreateWithFlags"]
        for _ in range(5):
            list(engine.map(ones, in_flight=4))
        assert (gpu.cudart.allocations, gpu.cudart.calls["cudaStreamCreateWithFlags"]) == before


def test_shapes_and_addresses_are_set_only_when_they_change() -> None:
    gpu = FakeGpu(5)
    with gpu.engine(cuda_graphs=0) as engine:
        calls: list[str] = []
        context = gpu.trt.IExecutionContext
        for name in ("set_input_shape", "set_tensor_address", "infer_shapes"):
            original = getattr(context, name)

            def counting(*arguments: object, name: str = name, original: object = original) -> object:
                calls.append(name)
                return original(*arguments)  # type: ignore[operator]

            setattr(context, name, counting)
        engine.infer(batch(4, 0))
        assert calls
        calls.clear()
        engine.infer(batch(4, 1))
        assert calls == []


class TestGraphs:
    def test_a_shape_that_comes_again_is_captured_and_replayed(self) -> None:
        gpu = FakeGpu(6)
        with gpu.engine() as engine:
            for index in range(6):
                one = batch(4, index)
                check(engine.infer(one), one)
            facts = engine._contexts[0].graphs  # type: ignore[attr-defined]
            assert facts["captured"] == 1
            assert facts["launched"] == 4
            assert gpu.trt.enqueues == 3  # twice plainly, once into the capture

    def test_the_least_recently_used_goes(self) -> None:
        gpu = FakeGpu(7)
        with gpu.engine(cuda_graphs=2) as engine:
            for _ in range(4):
                for size in (32, 1, 2):
                    one = batch(size, size)
                    check(engine.infer(one), one)
            facts = engine._contexts[0].graphs  # type: ignore[attr-defined]
            assert facts["evicted"] >= 1
            assert facts["kept"] == 2

    def test_a_buffer_that_grows_drops_graphs_with_its_old_address(self) -> None:
        gpu = FakeGpu(8)
        with gpu.engine() as engine:
            for size in (2, 2, 2, 2, 16, 2, 2, 2, 2):
                one = batch(size, size)
                check(engine.infer(one), one)

    def test_a_failed_capture_falls_back_and_says_why(self) -> None:
        gpu = FakeGpu(9)
        with gpu.engine() as engine:
            engine.infer(batch(2, 0))
            gpu.cudart.fail_next("cudaGraphInstantiate", 1)
            for index in range(3):
                check(engine.infer(batch(2, index)), batch(2, index))
            assert "cannot be instantiated" in str(engine._contexts[0].graphs["reason"])  # type: ignore[attr-defined]

    def test_data_dependent_sizes_are_never_captured(self) -> None:
        gpu = FakeGpu(10)
        with gpu.engine(nonzero(), profiles=()) as engine:
            for count in (3, 0, 64, 1, 1, 1, 1):
                values = np.zeros((1, 64), np.float32)
                values[0, :count] = 1
                np.testing.assert_array_equal(engine.infer({"x": values})["y"], np.nonzero(values))
            facts = engine._contexts[0].graphs  # type: ignore[attr-defined]
            assert facts["captured"] == 0
            assert "depends on the data" in str(facts["reason"])


class TestProfiles:
    def test_the_profile_that_fits_is_chosen_and_kept(self) -> None:
        gpu = FakeGpu(11)
        switches: list[int] = []
        original = gpu.trt.IExecutionContext.set_optimization_profile_async

        def counting(self: object, index: int, stream: int) -> bool:
            switches.append(index)
            return bool(original(self, index, stream))

        gpu.trt.IExecutionContext.set_optimization_profile_async = counting
        profiles = batches((1, 1, 4), (3, 8, 32), (3, 30, 32))
        with gpu.engine(profiles=profiles) as engine:
            for size in (1, 4, 3, 5, 3, 8, 32, 1):
                one = batch(size, size)
                check(engine.infer(one), one)
        # 1, 4 and 3 fit profile 0; 5 is nearest to 8; 3 still fits there, and so do 8 and 32; 1 needs profile 0 again
        assert switches == [1, 0]

    def test_a_switch_that_fails_is_an_error_and_the_next_call_tries_again(self) -> None:
        gpu = FakeGpu(48)
        with gpu.engine(profiles=batches((1, 1, 4), (5, 8, 32))) as engine:
            check(engine.infer(batch(2, 0)), batch(2, 0))
            gpu.trt.refuse_profiles = True  # type: ignore[attr-defined]
            with pytest.raises(InferenceError, match="cannot switch to profile 1: Error in set optimization profile"):
                engine.infer(batch(8, 1))
            check(engine.infer(batch(2, 2)), batch(2, 2))
            gpu.trt.refuse_profiles = False  # type: ignore[attr-defined]
            check(engine.infer(batch(8, 3)), batch(8, 3))

    def test_sizes_that_depend_on_the_data_in_two_profiles(self) -> None:
        gpu = FakeGpu(49)
        model = nonzero()
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        with gpu.engine(model, profiles=batches((1, 1, 2), (3, 4, 8))) as engine:
            for size in (1, 4, 2, 8):
                values = batch(size, size)["x"]
                np.testing.assert_array_equal(engine.infer({"x": values})["y"], np.nonzero(values))

    def test_a_shape_outside_is_refused_before_anything_runs(self) -> None:
        gpu = FakeGpu(12)
        with gpu.engine() as engine:
            with pytest.raises(ShapeError):
                engine.infer(batch(33, 0))
            assert gpu.trt.enqueues == 0


class TestMemory:
    def test_the_report_accounts_for_every_byte_of_the_driver(self) -> None:
        gpu = FakeGpu(13)
        with gpu.engine(contexts=2) as engine:
            list(engine.map([batch(size, size) for size in (1, 8, 32, 2)], in_flight=4))
            report = engine.memory_report().runtime
            live = {kind: gpu.cudart._live_bytes(kind) for kind in ("device", "pinned")}
            pinned = sum(nbytes for owner, nbytes in report.items() if "pinned" in owner)
            on_device = sum(report.values()) - pinned - report["plan"] - report["device pool, not in use"]
            assert pinned == live["pinned"]
            assert on_device == live["device"]

    def test_too_little_memory_at_load_is_an_error_and_leaves_nothing(self) -> None:
        gpu = FakeGpu(14, memory_bytes=6000)  # one context's activations, not two
        loaded = gpu.load()
        first = loaded.create_context()
        with pytest.raises((DeviceMemoryError, InferenceError)):
            loaded.create_context()
        first.close()
        loaded.close()
        del first, loaded
        gpu.assert_clean()

    def test_too_little_memory_for_one_request_fails_that_request_alone(self) -> None:
        gpu = FakeGpu(15)
        with gpu.engine() as engine:
            gpu.cudart.fail_next("cudaMallocFromPoolAsync", OUT_OF_MEMORY)
            with pytest.raises(DeviceMemoryError, match="cudaErrorMemoryAllocation"):
                engine.infer(batch(4, 0))
            check(engine.infer(batch(4, 0)), batch(4, 0))

    def test_shared_activations_are_allocated_once(self) -> None:
        gpu = FakeGpu(16)
        with gpu.engine(contexts=4, activations="shared") as engine:
            report = engine.memory_report().runtime
            assert report["activations, shared"] == 4096
            assert not any(", activations" in owner and owner.startswith("context") for owner in report)


def test_garbage_is_refused_by_the_library_with_its_own_words() -> None:
    gpu = FakeGpu(17)
    with pytest.raises(PlanCorruptError, match="Magic tag"):
        gpu.load(content=b"garbage")


def test_options_that_mean_nothing_are_refused() -> None:
    gpu = FakeGpu(18)
    with pytest.raises(UsageError, match="weight streaming"):
        gpu.load(weight_streaming_bytes=100)
    with pytest.raises(UsageError, match="runtime_cache"):
        gpu.load(runtime_cache="x.cache")


def test_closing_waits_for_what_runs_and_refuses_what_comes() -> None:
    gpu = FakeGpu(19, eagerness=0.0)
    with gpu.engine(contexts=2) as engine:
        ones = [batch(2, index) for index in range(6)]
        futures = [engine.submit(one) for one in ones]
        engine.close()
        for future, one in zip(futures, ones, strict=True):
            if future.exception() is None:
                check(future.result(), one)
            else:
                assert isinstance(future.exception(), EngineClosedError)
        with pytest.raises(EngineClosedError):
            engine.submit(ones[0])


class OnFakeGpu:
    """An array of another library, on the fake GPU, with the stream that still writes it."""

    def __init__(self, gpu: FakeGpu, values: np.ndarray, *, shift: int = 0) -> None:
        from trtdeploy.cuda.memory import DevicePool, PinnedBuffer, copy_to_device
        from trtdeploy.cuda.streams import Stream

        self.stream = Stream(gpu.device)
        self.pool = DevicePool(gpu.device, release_threshold_bytes=0)
        self.buffer = self.pool.allocate(values.nbytes + 256, self.stream)
        self.pinned = PinnedBuffer(gpu.device, values.nbytes)
        self.pinned.view(values.dtype, values.shape)[...] = values
        copy_to_device(gpu.device, self.buffer.address + shift, self.pinned.address, values.nbytes, self.stream)
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.buffer.address + shift, True),
            "stream": self.stream.handle,
            "version": 3,
        }

    def release(self, engine: Engine) -> None:
        self.stream.synchronize()
        self.buffer.free(self.stream)
        self.stream.synchronize()
        self.pinned.close()
        self.pool.close()
        self.stream.close()


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("graphs", [0, 4])
def test_an_array_on_the_gpu_is_read_there_after_its_owner_has_written_it(shift: int, graphs: int) -> None:
    gpu = FakeGpu(20, eagerness=0.0)
    with gpu.engine(cuda_graphs=graphs) as engine:
        one = batch(4, 7)
        array = OnFakeGpu(gpu, one["x"], shift=shift)
        for _ in range(4):
            check(engine.infer({"x": array}), one)
        array.release(engine)


def test_a_plan_without_manifest_is_described_by_its_engine() -> None:
    gpu = FakeGpu(21)
    plan = gpu.plan(linear(), batches((1, 8, 32)))
    manifest = describe_plan(gpu.bindings, plan, LoadOptions(), gpu.device)
    assert [str(spec) for spec in (*manifest.inputs, *manifest.outputs)] == ["x float32[?, 64]", "y float32[?, 64]"]
    assert manifest.profiles[0]["x"].max == (32, 64)
    assert manifest.plan_bytes == len(plan)
    gpu.assert_clean()


def test_the_version_in_a_header_is_read_before_anything_is_deserialized() -> None:
    header = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes(100)
    assert version_in_header(header) == (10, 3, 0, 26)
    assert version_in_header(b"vtrt" + bytes(100)) is None
    assert version_in_header(b"ftrt") is None
    gpu = FakeGpu(22)
    with pytest.raises(PlanIncompatibleError, match=r"10\.3\.0\.26"):
        describe_plan(gpu.bindings, header, LoadOptions(), gpu.device)


@pytest.mark.parametrize("eagerness", [0.0, 0.4])
def test_outputs_may_stay_on_the_gpu_and_outlive_the_engine(eagerness: float) -> None:
    gpu = FakeGpu(23, eagerness=eagerness)
    loaded = gpu.load()
    engine = Engine(loaded, manifest(linear(), batches((1, 8, 32))), contexts=2, timeout_s=30, queue_size=8)
    kept = [(one, engine.infer(one, outputs="device")["y"]) for one in (batch(3, index) for index in range(6))]
    engine.close()
    del engine, loaded
    for one, array in kept:
        assert array.__cuda_array_interface__["shape"] == (3, 64)
        np.testing.assert_allclose(array.numpy(), expected(one["x"]), atol=1e-4)
    with pytest.raises(FakeViolation, match="not released"):
        gpu.assert_clean()
    del kept, array
    gpu.assert_clean()


def test_an_output_on_the_gpu_is_an_input() -> None:
    gpu = FakeGpu(24, eagerness=0.1)
    with gpu.engine() as engine:
        one = batch(5, 1)
        with engine.lease() as lease:
            middle = lease.execute(one, outputs="device")["y"]
        np.testing.assert_allclose(engine.infer({"x": middle})["y"], expected(expected(one["x"])), rtol=1e-3, atol=1e-2)
        del middle


def test_a_started_inference_cannot_be_cancelled_and_never_keeps_its_context() -> None:
    gpu = FakeGpu(25, eagerness=0.0)
    with gpu.engine() as engine:
        for index in range(20):
            one = batch(2, index)
            first, second = engine.submit(one), engine.submit(one)
            first.cancel()
            second.cancel()
            if not first.cancelled():
                check(first.result(120), one)
        check(engine.infer(batch(1, 0), timeout_s=10), batch(1, 0))


def test_waiting_requests_never_stand_before_the_end_of_what_they_wait_for() -> None:
    gpu = FakeGpu(26)
    with gpu.engine(timeout_s=5.0) as engine:
        stop = threading.Event()
        failures: list[BaseException] = []

        def ask(first: int) -> None:
            try:
                while not stop.is_set():
                    one = batch(1, first)
                    check(engine.submit(one).result(120), one)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        stop.wait(1.0)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventRecord", "cudaHostAlloc", "cudaSetDevice"])
def test_a_call_of_cuda_that_fails_once_fails_one_request(function: str) -> None:
    gpu = FakeGpu(27)
    with gpu.engine() as engine:
        check(engine.infer(batch(2, 0)), batch(2, 0))
        for size in (3, 16, 31, 2):
            gpu.cudart.fail_next(function, OUT_OF_MEMORY)
            with contextlib.suppress(InferenceError):  # not every request makes every call
                engine.infer(batch(size, size))
            one = batch(size, size + 1)
            check(engine.infer(one), one)


def test_an_array_on_the_gpu_is_kept_until_the_device_has_read_it() -> None:
    gpu = FakeGpu(28, eagerness=0.0)
    with gpu.engine(cuda_graphs=0) as engine:
        one = batch(4, 7)
        array = OnFakeGpu(gpu, one["x"])
        gone: list[str] = []
        keeper = type("Keeper", (), {})()
        keeper.__cuda_array_interface__ = array.__cuda_array_interface__
        weakref.finalize(keeper, gone.append, "gone")
        gate = threading.Event()
        engine._finishers.submit(gate.wait, 30)  # nobody waits for the device yet
        future = engine.submit({"x": keeper})
        del keeper
        gc.collect()
        assert gone == []
        gate.set()
        check(future.result(120), one)
        engine._contexts[0]._stream.synchronize()  # type: ignore[attr-defined]  # the fake knows no order by futures
        array.release(engine)


def test_results_in_a_reference_cycle_do_not_stop_the_thread_that_collects_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(29)
    allocate = gpu.cudart.cudaMallocFromPoolAsync

    def collecting(*arguments: int) -> object:
        gc.collect()  # it may come at any moment, here while the memory of results is locked
        return allocate(*arguments)

    with gpu.engine() as engine:
        engine.infer(batch(2, 0), outputs="device")
        monkeypatch.setattr(gpu.cudart, "cudaMallocFromPoolAsync", collecting)
        done = threading.Event()

        def work() -> None:
            for index in range(5):
                cycle: list[object] = [engine.infer(batch(2, index), outputs="device")]
                cycle.append(cycle)
            del cycle
            gc.collect()  # in this thread: the fake knows no order by events of Python
            done.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert done.wait(120), "the collector waits for a lock that its own thread holds"


def test_an_output_that_found_no_memory_once_is_given_the_next_time() -> None:
    gpu = FakeGpu(30)
    with gpu.engine(nonzero(), profiles=()) as engine:
        values = np.ones((1, 64), np.float32)
        engine.infer({"x": np.zeros((1, 64), np.float32)})
        gpu.cudart.fail_next("cudaMallocFromPoolAsync", OUT_OF_MEMORY)
        with pytest.raises(DeviceMemoryError):
            engine.infer({"x": values})
        np.testing.assert_array_equal(engine.infer({"x": values})["y"], np.nonzero(values))
        assert not engine._loaded.asynchronous  # an enqueue that waits must not stop an event loop


def test_a_failed_export_of_outputs_leaves_no_writer_behind() -> None:
    gpu = FakeGpu(31, eagerness=0.0)
    with gpu.engine() as engine:
        engine.infer(batch(2, 0), outputs="device")
        gpu.cudart.fail_next("cudaMallocFromPoolAsync", OUT_OF_MEMORY)
        with pytest.raises(DeviceMemoryError):
            engine.infer(batch(2, 0), outputs="device")
        check(engine.infer(batch(2, 1)), batch(2, 1))


def test_a_load_that_fails_late_leaves_nothing() -> None:
    gpu = FakeGpu(32)
    gpu.cudart.fail_next("cudaMallocFromPoolAsync", OUT_OF_MEMORY)  # the shared activations
    with pytest.raises(DeviceMemoryError):
        gpu.load(activations="shared")
    gpu.assert_clean()


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaGraphGetNodes", "cudaEventCreateWithFlags"])
def test_a_capture_that_fails_does_not_fail_the_request_before_it(function: str) -> None:
    gpu = FakeGpu(33)
    with gpu.engine() as engine:
        engine.infer(batch(2, 0))
        gpu.cudart.fail_next(function, 1)
        for index in range(4):
            check(engine.infer(batch(2, index)), batch(2, index))
        assert "reason" in engine._contexts[0].graphs  # type: ignore[attr-defined]


def test_closing_twice_or_after_a_failure_releases_all() -> None:
    gpu = FakeGpu(34)
    loaded = gpu.load()
    engine = Engine(loaded, manifest(linear(), batches((1, 8, 32))), contexts=2, timeout_s=30, queue_size=8)
    closing = [engine._contexts[1].close]

    def failing() -> None:
        closing.pop()()
        raise InferenceError("the clean-up failed")

    engine._contexts[1].close = failing  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="clean-up"):
        engine.close()
    engine.close()
    del engine, loaded
    gpu.assert_clean()


def test_a_plan_that_was_built_without_a_gpu_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(35)
    monkeypatch.setattr("trtdeploy.runtimes.tensorrt.runtime._device", lambda _: gpu.device)
    model = linear()
    model.graph.node[0].name = "/fc/MatMul"
    built = PrecisionFacts(
        weighted_layers=1,
        quantized_layers=1,
        integer_kernels=None,
        int8_macs_percent=100.0,  # type: ignore[call-arg]  # as an older manifest has it
        evidence="parsed network",
        layers={"/fc/MatMul": LayerPrecision(macs=4096, quantized=True)},
        note="not known",
    )
    facts = manifest(model, batches((1, 8, 32))).model_copy(update={"precision": built})
    plan = gpu.plan(model, batches((1, 8, 32)))
    found = TensorRTRuntime(gpu.bindings).precision_of(plan, facts, LoadOptions())
    assert found.evidence == "engine inspector"
    assert found.layers["/fc/MatMul"].runs_in == "int8"
    again = facts.model_copy(update={"precision": found})
    assert TensorRTRuntime(gpu.bindings).precision_of(b"not read", again, LoadOptions()) == found
    gpu.assert_clean()


def ranges(**inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> dict[str, ShapeRange]:
    return {name: ShapeRange(min=low, opt=best, max=high) for name, (low, best, high) in inputs.items()}


RESHAPING = ranges(x=((1, 64), (8, 64), (32, 64)), shape=((1, 1), (8, 64), (2048, 2048)))


def shape_of(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


class TestShapeTensors:
    def test_values_are_read_on_the_host_and_belong_to_their_request(self) -> None:
        gpu = FakeGpu(36, eagerness=0.0)
        with gpu.engine(reshaping(), profiles=(RESHAPING,), contexts=2) as engine:
            x = batch(2, 1)["x"]
            wanted = [(128, 1), (64, 2), (2, 64), (2, 64), (1, 128), (128, 1)] * 3
            futures = [engine.submit({"x": x, "shape": shape_of(*shape)}) for shape in wanted]
            for future, shape in zip(futures, wanted, strict=True):
                np.testing.assert_array_equal(future.result(120)["y"], x.reshape(shape))
            assert "shape tensors" in str(engine._contexts[0].graphs["reason"])  # type: ignore[attr-defined]
            with engine.lease() as lease:
                out = lease.execute({"x": x, "shape": shape_of(4, 32)})
                np.testing.assert_array_equal(out["y"], x.reshape(4, 32))

    def test_values_outside_of_the_profile_are_refused_before_anything_runs(self) -> None:
        gpu = FakeGpu(38)
        narrow = ranges(x=((1, 64), (8, 64), (32, 64)), shape=((2, 2), (8, 64), (64, 64)))
        with gpu.engine(reshaping(), profiles=(narrow,)) as engine:
            with pytest.raises(
                ShapeError, match=r"values shape=\[128, 1\] lie in no profile(?s:.)*shape=2x2:8x64:64x64"
            ):
                engine.infer({"x": batch(2, 1)["x"], "shape": shape_of(128, 1)})
            with engine.lease() as lease, pytest.raises(ShapeError, match="lie in no profile"):
                lease.execute({"x": batch(2, 1)["x"], "shape": shape_of(128, 1)})
            assert gpu.trt.enqueues == 0

    def test_values_choose_the_profile_too(self) -> None:
        gpu = FakeGpu(39)
        tall = ranges(x=((1, 64), (8, 64), (32, 64)), shape=((64, 1), (128, 1), (2048, 2)))
        wide = ranges(x=((1, 64), (8, 64), (32, 64)), shape=((1, 64), (1, 128), (2, 2048)))
        with gpu.engine(reshaping(), profiles=(tall, wide)) as engine:
            x = batch(2, 1)["x"]
            for shape in ((128, 1), (1, 128), (2, 64), (64, 2)):
                out = engine.infer({"x": x, "shape": shape_of(*shape)})
                np.testing.assert_array_equal(out["y"], x.reshape(shape))

    def test_a_plan_without_manifest_has_the_ranges_of_its_values(self) -> None:
        gpu = FakeGpu(40)
        found = describe_plan(gpu.bindings, gpu.plan(reshaping(), (RESHAPING,)), LoadOptions(), gpu.device)
        written = manifest(reshaping(), (RESHAPING,))
        assert (found.profiles, found.profile_values) == (written.profiles, written.profile_values)
        assert found.profile_values[0]["shape"].max == (2048, 2048)

    def test_values_on_the_gpu_are_refused_not_read(self) -> None:
        gpu = FakeGpu(37)
        with gpu.engine(reshaping(), profiles=(RESHAPING,)) as engine:
            array = OnFakeGpu(gpu, shape_of(2, 64))
            with pytest.raises(DtypeError, match="reads on the host"):
                engine.infer({"x": batch(2, 1)["x"], "shape": array})
            array.release(engine)

    def test_a_refused_call_changes_nothing_for_the_next_one(self) -> None:
        """Of two shape tensors the first is good and new, the second is refused: the first must not count as seen."""
        gpu = FakeGpu(41)
        both = ranges(x=((1, 64), (8, 64), (32, 64)), first=((1, 1), (8, 64), (999, 999)), second=((1,), (1,), (999,)))
        with gpu.engine(tiling(), profiles=(both,)) as engine:
            x = batch(2, 1)["x"]

            def ask(first: object, second: object) -> np.ndarray:
                return engine.infer({"x": x, "first": first, "second": second})["y"]

            np.testing.assert_array_equal(ask(shape_of(1, 1), shape_of(128)), x.reshape(128))
            on_gpu = OnFakeGpu(gpu, shape_of(128))
            with pytest.raises(DtypeError, match="reads on the host"):
                ask(shape_of(3, 2), on_gpu)
            on_gpu.release(engine)
            for wrong in (128, 5, 5):
                with pytest.raises(ShapeError, match="No output shapes follow"):
                    ask(shape_of(3, 2), shape_of(wrong))
            np.testing.assert_array_equal(ask(shape_of(3, 2), shape_of(768)), np.tile(x, (3, 2)).reshape(768))


class TestTheCallersDevice:
    """The thread has the first GPU, the engine runs on the second."""

    def test_it_is_the_same_after_every_call(self) -> None:
        gpu = FakeGpu(42)

        def check_device(call: str) -> None:
            assert gpu.cudart.cudaGetDevice() == (0, 0), call

        loaded = gpu.load()
        check_device("load")
        facts = manifest(linear(), batches((1, 8, 32)))
        engine = Engine(loaded, facts, contexts=2, timeout_s=30, queue_size=8)
        check_device("contexts")
        one = batch(2, 0)
        for _ in range(4):  # a graph is captured and launched
            engine.infer(one)
            check_device("infer")
            engine.submit(one).result()
            check_device("submit")
        out = engine.infer(one, outputs="device")
        check_device("infer on the device")
        engine.infer({"x": out["y"]})
        check_device("infer from the device")
        out["y"].numpy()
        check_device("numpy")
        del out
        gc.collect()
        check_device("the end of an output")
        engine.memory_report()
        check_device("memory_report")
        asyncio.run(engine.ainfer(one))
        check_device("ainfer")
        kept = engine.infer(one, outputs="device")
        engine.close()
        check_device("close")
        del engine, loaded, kept
        gc.collect()
        check_device("the end of the last output")
        describe_plan(gpu.bindings, gpu.plan(linear(), batches((1, 8, 32))), LoadOptions(), gpu.device)
        check_device("describe")
        gpu.assert_clean()

    def test_also_after_an_inference_that_failed(self) -> None:
        gpu = FakeGpu(43)
        with gpu.engine() as engine:
            gpu.cudart.fail_next("cudaMallocFromPoolAsync", OUT_OF_MEMORY)
            with pytest.raises(DeviceMemoryError):
                engine.infer(batch(2, 0))
            assert gpu.cudart.cudaGetDevice() == (0, 0)

    def test_threads_of_the_engine_leave_the_first_gpu_alone(self) -> None:
        """A context there costs memory that belongs to others."""
        gpu = FakeGpu(44)
        gpu.device.make_current()
        with gpu.engine(contexts=2) as engine:
            for future in [engine.submit(batch(2, index)) for index in range(8)]:
                future.result()
        assert gpu.cudart.contexts == {1}


class TestFormats:
    @pytest.mark.parametrize("tensor", ["x", "y"])
    @pytest.mark.parametrize("profile", [0, 1])
    def test_one_that_is_not_linear_is_refused(self, tensor: str, profile: int) -> None:
        gpu = FakeGpu(45)
        formats: list[dict[str, str]] = [{}, {}]
        formats[profile] = {tensor: "CHW16"}
        shapes = [{"x": ((1, 64), (8, 64), (high, 64))} for high in (8, 32)]
        content = make_plan(linear(), shapes, formats)
        with pytest.raises(PlanIncompatibleError, match=rf"tensor {tensor} (?s:.)*CHW16"):
            gpu.load(content=content)
        with pytest.raises(PlanIncompatibleError, match="linear"):
            describe_plan(gpu.bindings, content, LoadOptions(), gpu.device)
        gpu.assert_clean()


def test_a_model_without_inputs() -> None:
    gpu = FakeGpu(46)
    with gpu.engine(constant(), profiles=()) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine.infer({})["y"], np.arange(6, dtype=np.float32))


def test_a_new_shape_and_a_capture_do_not_stop_an_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(47)
    slow: list[str] = []
    quick: list[str] = []
    enqueue, launch = gpu.trt.IExecutionContext.execute_async_v3, gpu.cudart.cudaGraphLaunch

    def enqueuing(self: object, stream: int) -> bool:
        slow.append(threading.current_thread().name)
        return bool(enqueue(self, stream))

    def launching(*arguments: int) -> object:
        quick.append(threading.current_thread().name)
        return launch(*arguments)

    monkeypatch.setattr(gpu.trt.IExecutionContext, "execute_async_v3", enqueuing)
    monkeypatch.setattr(gpu.cudart, "cudaGraphLaunch", launching)

    async def ask_all(engine: Engine) -> None:
        for size in (5, 4, 4, 4, 4, 5):
            check(await engine.ainfer(batch(size, size)), batch(size, size))

    with gpu.engine() as engine:
        asyncio.run(ask_all(engine))
    assert len(slow) == 6  # 5, 4, 4 and its capture, 5 and its capture
    assert all(name.startswith("trtdeploy-engine") for name in slow)
    assert quick == [threading.current_thread().name] * 2  # and what is quick goes to no other thread
