"""Engine: answers, messages, threads, futures, order and the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.fake_runtime import WAIT_S, batch, make_engine, until
from tests.onnx_graphs import as_exported
from trtdeploy.engine import Engine
from trtdeploy.errors import (
    DtypeError,
    EngineBusyError,
    EngineClosedError,
    InferenceError,
    InputError,
    InputNameError,
    PlanCorruptError,
    ShapeError,
    UsageError,
)
from trtdeploy.plan import Plan
from trtdeploy.runtimes.onnxruntime.engine import OnnxRuntimeContext
from trtdeploy.tensors import Array


def image(number: int, size: int = 1) -> dict[str, Array]:
    return {"input": np.random.default_rng(number).standard_normal((size, 3, 32, 32)).astype(np.float32)}


@pytest.fixture(scope="module")
def engine(qdq_plan: Plan) -> Iterator[Engine]:
    with Engine.load(qdq_plan.path, contexts=2, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def answers(qdq_plan: Plan) -> list[Array]:
    """What the plan's session answers to ``image(0)`` ... ``image(199)``, one at a time."""
    return [as_exported(qdq_plan.path.read_bytes(), image(number))[0] for number in range(200)]


# answers


def test_infer_gives_what_a_session_of_the_plan_gives(engine: Engine, qdq_plan: Plan) -> None:
    for size in (1, 7, 32):
        [expected] = as_exported(qdq_plan.path, image(1, size))
        np.testing.assert_allclose(engine.infer(image(1, size))["logits"], expected, rtol=1e-5, atol=1e-5)


def test_the_engine_says_what_it_takes_and_gives(engine: Engine) -> None:
    assert [str(spec) for spec in engine.inputs] == ["input float32[?, 3, 32, 32]"]
    assert [str(spec) for spec in engine.outputs] == ["logits float32[?, 10]"]
    assert engine.contexts == 2


def test_outputs_stay_as_they_are_for_as_long_as_they_are_held(engine: Engine) -> None:
    held = [engine.infer(image(number))["logits"] for number in range(5)]
    copies = [output.copy() for output in held]
    for number in range(100):
        engine.infer(image(1000 + number))
    for output, copy in zip(held, copies, strict=True):
        np.testing.assert_array_equal(output, copy)


def test_outputs_belong_to_the_caller(engine: Engine) -> None:
    before = engine.infer(image(0))["logits"].copy()
    output = engine.infer(image(0))["logits"]
    output[:] = 7
    np.testing.assert_array_equal(engine.infer(image(0))["logits"], before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: np.asfortranarray(x),
        lambda x: x[::2],
        lambda x: x[:, :, ::-1],
        lambda x: x.transpose(0, 1, 3, 2),
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x)[::2],
        lambda x: torch.from_numpy(x).transpose(2, 3),
        lambda x: torch.from_numpy(x).to(memory_format=torch.channels_last),
    ],
)
def test_any_strides_and_dlpack_are_taken(engine: Engine, view: Callable[[Array], Any]) -> None:
    value = view(image(3, 4)["input"])
    plain = np.ascontiguousarray(value.numpy() if isinstance(value, torch.Tensor) else value)
    np.testing.assert_array_equal(engine.infer({"input": value})["logits"], engine.infer({"input": plain})["logits"])


def test_a_read_only_array_is_taken(engine: Engine) -> None:
    array = image(0)["input"]
    array.flags.writeable = False
    assert engine.infer({"input": array})["logits"].shape == (1, 10)


# refusals


class OnDevice:
    __cuda_array_interface__ = {"shape": (1, 3, 32, 32), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class DlpackOnDevice:
    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


@pytest.mark.parametrize(
    ("inputs", "kind", "words"),
    [
        ({}, InputNameError, ["[]", "input"]),
        ({"imput": np.zeros((1, 3, 32, 32), np.float32)}, InputNameError, ["imput", "['input']"]),
        ({**image(0), "more": np.zeros(1)}, InputNameError, ["more", "['input']"]),
        ({"input": np.zeros((3, 32, 32), np.float32)}, ShapeError, ["'input'", "[3, 32, 32]", "[?, 3, 32, 32]"]),
        ({"input": np.zeros((1, 3, 32, 31), np.float32)}, ShapeError, ["'input'", "[1, 3, 32, 31]", "[?, 3, 32, 32]"]),
        ({"input": np.zeros((33, 3, 32, 32), np.float32)}, ShapeError, ["input=[33, 3, 32, 32]", "32x3x32x32"]),
        ({"input": np.zeros((0, 3, 32, 32), np.float32)}, ShapeError, ["'input'", "[0, 3, 32, 32]"]),
        ({"input": np.zeros((1, 3, 32, 32))}, DtypeError, ["'input'", "float64", "float32"]),
        ({"input": np.zeros((1, 3, 32, 32), np.uint8)}, DtypeError, ["'input'", "uint8", "float32"]),
        ({"input": np.zeros((1, 3, 32, 32), ">f4")}, DtypeError, ["'input'", ">f4", "float32"]),
        ({"input": np.array(["a"])}, DtypeError, ["'input'", "<U1", "float32"]),
        ({"input": [[1.0, 2.0]]}, DtypeError, ["'input'", "list", "numpy"]),
        ({"input": None}, DtypeError, ["'input'", "NoneType"]),
        ({"input": OnDevice()}, DtypeError, ["'input'", "CUDA", "CPU"]),
        ({"input": DlpackOnDevice()}, DtypeError, ["'input'", "DLPack type 2", "CPU"]),
        ({"input": torch.zeros(1, 3, 32, 32, requires_grad=True)}, DtypeError, ["'input'", "DLPack"]),
        ({"input": torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)}, DtypeError, ["'input'", "DLPack"]),
        ({"input": torch.zeros(1, 3, 32, 32, device="meta")}, DtypeError, ["'input'", "DLPack"]),
        ({"input": torch.zeros(1, 3, 32, 32).to_sparse()}, DtypeError, ["'input'", "DLPack"]),
        ({"input": torch.zeros(1, 3, 32, 32, dtype=torch.float64)}, DtypeError, ["'input'", "float64", "float32"]),
        (np.zeros((1, 3, 32, 32), np.float32), DtypeError, ["dict", "ndarray"]),
        ([image(0)], DtypeError, ["dict", "list"]),
    ],
)
def test_a_wrong_input_is_refused_by_name_with_what_was_given_and_what_is_taken(
    engine: Engine, inputs: Any, kind: type[InputError], words: list[str]
) -> None:
    for call in (engine.infer, engine.submit):
        with pytest.raises(kind) as caught:
            call(inputs)
        assert caught.value.exit_code == 2
        for word in words:
            assert word in str(caught.value)
    with engine.lease() as lease, pytest.raises(kind):
        lease.execute(inputs)
    engine.infer(image(0))


@pytest.mark.parametrize("seconds", [-1, float("nan"), -0.001])
def test_an_impossible_timeout_is_a_usage_error(engine: Engine, seconds: float) -> None:
    for call in (engine.infer, engine.submit):
        with pytest.raises(UsageError, match="timeout_s"):
            call(image(0), timeout_s=seconds)


@pytest.mark.parametrize("seconds", [0, 0.0, 1e18, float("inf"), None])
def test_extreme_timeouts_work_while_a_context_is_free(seconds: float | None) -> None:
    engine, _ = make_engine(is_open=True)
    with engine:
        assert engine.infer(batch(1), timeout_s=seconds)["y"][0, 0] == 2
        future = engine.submit(batch(2), timeout_s=seconds)
        assert future.result(WAIT_S)["y"][0, 0] == 4


def test_an_infinite_timeout_waits() -> None:
    engine, loaded = make_engine(timeout_s=float("inf"))
    with engine, ThreadPoolExecutor(1) as pool:
        first = engine.submit(batch(1))
        loaded.next_started()
        second = pool.submit(engine.infer, batch(2))
        assert not wait([second], 0.02).done
        loaded.gate.set()
        assert second.result(WAIT_S)["y"][0, 0] == 4
        first.result(WAIT_S)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, None])
def test_what_the_runtime_raises_is_an_inference_error_and_the_context_is_free_again(
    qdq_plan: Plan, kind: type[Exception] | None
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    class Broken:
        def run(self, *_: object) -> None:
            raise (kind or Fail)("[ONNXRuntimeError] : 1 : FAIL : out of tune\nmore")

    with Engine.load(qdq_plan.path) as engine:
        good = engine._contexts[0]
        engine._contexts[0] = OnnxRuntimeContext(Broken(), engine.outputs)
        for call in (engine.infer, lambda inputs: engine.submit(inputs).result(WAIT_S)):
            with pytest.raises(InferenceError, match="out of tune"):
                call(image(0))
        engine._contexts[0] = good
        engine.infer(image(0), timeout_s=0)


# many at once


@pytest.mark.parametrize("contexts", [1, 4])
def test_sixteen_threads_each_get_the_answers_to_their_own_inputs(
    qdq_plan: Plan, contexts: int, answers: list[Array]
) -> None:
    wrong: list[int] = []
    barrier = threading.Barrier(16)
    inputs = [image(number) for number in range(200)]

    with Engine.load(qdq_plan.path, contexts=contexts, threads=1) as engine, ThreadPoolExecutor(16) as pool:

        def work(thread: int) -> None:
            barrier.wait(WAIT_S)
            for turn in range(200):
                number = (turn + 13 * thread) % 200
                output = engine.infer(inputs[number], timeout_s=None)["logits"]
                if not np.allclose(output, answers[number], rtol=1e-4, atol=1e-4):
                    wrong.append(number)

        for future in [pool.submit(work, thread) for thread in range(16)]:
            future.result()
    assert wrong == []
    assert not np.allclose(answers[0], answers[1], rtol=1e-2, atol=1e-2), "the answers must tell inputs apart"


@pytest.mark.parametrize("contexts", [1, 4])
def test_submitted_from_many_threads_every_future_has_its_own_answer(
    qdq_plan: Plan, contexts: int, answers: list[Array]
) -> None:
    with Engine.load(qdq_plan.path, contexts=contexts, threads=1, queue_size=20) as engine:
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda t: [(n, engine.submit(image(n))) for n in range(t, 200, 8)], range(8)))
        for number, future in (pair for part in parts for pair in part):
            np.testing.assert_allclose(future.result(WAIT_S)["logits"], answers[number], rtol=1e-4, atol=1e-4)


def test_submit_copies_its_inputs() -> None:
    engine, loaded = make_engine()
    with engine:
        blocker = engine.submit(batch(0))
        loaded.next_started()
        inputs = batch(5)
        future = engine.submit(inputs)
        inputs["x"][:] = -1
        inputs["more"] = inputs["x"]
        loaded.gate.set()
        assert future.result(WAIT_S)["y"].tolist() == [[10.0] * 4]
        blocker.result(WAIT_S)


def test_submitted_requests_run_in_the_order_in_which_they_came() -> None:
    engine, loaded = make_engine()
    with engine:
        futures = [engine.submit(batch(number)) for number in range(30)]
        loaded.gate.set()
        wait(futures, WAIT_S)
        assert [loaded.next_started() for _ in range(30)] == list(range(30))


def test_blocked_callers_get_the_context_in_the_order_in_which_they_came() -> None:
    engine, loaded = make_engine(is_open=True)
    with engine, ThreadPoolExecutor(10) as pool:
        with engine.lease():
            futures = []
            for number in range(10):
                futures.append(pool.submit(engine.infer, batch(number)))
                until(lambda number=number: len(engine._pool._waiting) > number)
        wait(futures, WAIT_S)
        assert [loaded.next_started() for _ in range(10)] == list(range(10))


def test_contexts_run_at_the_same_time_but_never_more_than_there_are() -> None:
    engine, loaded = make_engine(contexts=3)
    with engine:
        futures = [engine.submit(batch(number)) for number in range(5)]
        assert sorted(loaded.next_started() for _ in range(3)) == [0, 1, 2]
        assert loaded.started.empty()
        loaded.gate.set()
        assert [future.result(WAIT_S)["y"][0, 0] for future in futures] == [0, 2, 4, 6, 8]


# a full pool, a full queue


def test_a_full_pool_is_an_error_that_says_so(qdq_plan: Plan) -> None:
    with Engine.load(qdq_plan.path, contexts=2, timeout_s=0.01) as engine:
        with engine.lease(), engine.lease():
            for call in (
                lambda: engine.infer(image(0)),
                lambda: engine.infer(image(0), timeout_s=0),
                lambda: engine.submit(image(0)).result(WAIT_S),
                lambda: engine.submit(image(0), timeout_s=0).result(WAIT_S),
                lambda: engine.lease(timeout_s=0.01).__enter__(),
            ):
                with pytest.raises(EngineBusyError, match=r"No execution context became free .*all 2 are in use") as e:
                    call()
                assert e.value.exit_code == 3
        engine.infer(image(0))
        assert engine.submit(image(0)).result(WAIT_S)["logits"].shape == (1, 10)


def test_every_queued_request_fails_when_its_time_has_passed() -> None:
    engine, _ = make_engine(timeout_s=0.02, is_open=True)
    with engine:
        with engine.lease():
            futures = [engine.submit(batch(number)) for number in range(20)]
            for future in futures:
                with pytest.raises(EngineBusyError):
                    future.result(WAIT_S)
        assert engine.infer(batch(1))["y"][0, 0] == 2


def test_a_full_queue_is_an_error_that_says_so() -> None:
    engine, loaded = make_engine(queue_size=2)
    with engine:
        futures = [engine.submit(batch(number)) for number in range(3)]
        loaded.next_started()
        for seconds in (0, 0.01):
            with pytest.raises(EngineBusyError, match=r"No place in the queue became free .*all 3 are in use"):
                engine.submit(batch(9), timeout_s=seconds)
        loaded.gate.set()
        assert [future.result(WAIT_S)["y"][0, 0] for future in futures] == [0, 2, 4]
        assert engine.submit(batch(9)).result(WAIT_S)["y"][0, 0] == 18


def test_a_full_queue_lets_the_next_in_as_soon_as_one_is_done() -> None:
    engine, loaded = make_engine(queue_size=0)
    with engine, ThreadPoolExecutor(1) as pool:
        first = engine.submit(batch(1))
        second = pool.submit(engine.submit, batch(2))
        assert loaded.next_started() == 1
        assert not wait([second], 0.02).done
        loaded.gate.set()
        assert second.result(WAIT_S).result(WAIT_S)["y"][0, 0] == 4
        first.result(WAIT_S)


def test_cancelling_a_queued_request_frees_its_place_and_it_never_runs() -> None:
    engine, loaded = make_engine(queue_size=1)
    with engine:
        running = engine.submit(batch(1))
        assert loaded.next_started() == 1
        queued = engine.submit(batch(2))
        assert queued.cancel()
        assert engine.memory_report().queued == 0
        instead = engine.submit(batch(3), timeout_s=0.5)
        assert not running.cancel(), "a running inference cannot be stopped"
        loaded.gate.set()
        assert instead.result(WAIT_S)["y"][0, 0] == 6
        assert loaded.next_started() == 3
        with pytest.raises(CancelledError):
            queued.result(0)


def test_a_failed_request_gives_its_place_and_context_back() -> None:
    engine, _ = make_engine(is_open=True, queue_size=0)
    with engine:
        for _ in range(3):
            with pytest.raises(InferenceError, match="fake runtime failed"):
                engine.submit(batch(float("nan"))).result(WAIT_S)
            with pytest.raises(InferenceError):
                engine.infer(batch(float("nan")))
        assert engine.submit(batch(1)).result(WAIT_S)["y"][0, 0] == 2


# map


class Reader:
    """An iterator that counts what was read from it."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = iter(batches)
        self.read = 0

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        item = next(self._batches)
        self.read += 1
        if isinstance(item, Exception):
            raise item
        return item


@pytest.mark.parametrize("in_flight", [None, 1, 3, 50])
def test_map_keeps_the_order(engine: Engine, answers: list[Array], in_flight: int | None) -> None:
    outputs = list(engine.map((image(number) for number in range(20)), in_flight=in_flight))
    assert len(outputs) == 20
    for output, answer in zip(outputs, answers, strict=False):
        np.testing.assert_allclose(output["logits"], answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_map_reads_no_further_ahead_than_in_flight(in_flight: int) -> None:
    engine, _ = make_engine(is_open=True)
    reader = Reader([batch(number) for number in range(12)])
    with engine:
        outputs = engine.map(reader, in_flight=in_flight)
        assert reader.read == 0
        for taken in range(12):
            assert next(outputs)["y"][0, 0] == 2 * taken
            assert reader.read <= min(12, taken + in_flight)
        assert next(outputs, None) is None


def test_map_really_runs_several_at_a_time() -> None:
    engine, loaded = make_engine(contexts=3)
    with engine, ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, engine.map((batch(number) for number in range(9)), in_flight=3))
        assert sorted(loaded.next_started() for _ in range(3)) == [0, 1, 2]
        loaded.gate.set()
        assert first.result(WAIT_S)["y"][0, 0] == 0


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (batch(float("nan")), InferenceError),
        ({"x": np.zeros((1, 5), np.float32)}, ShapeError),
        ({"z": np.zeros((1, 4), np.float32)}, InputNameError),
        (KeyError("the dataset broke"), KeyError),
    ],
    ids=["runtime", "shape", "name", "iterator"],
)
@pytest.mark.parametrize("in_flight", [1, 4, 20])
def test_an_error_in_map_comes_after_the_outputs_before_it(bad: Any, kind: type[Exception], in_flight: int) -> None:
    engine, _ = make_engine(is_open=True, queue_size=2)
    with engine:
        outputs = engine.map(Reader([batch(0), batch(1), batch(2), bad, batch(4)]), in_flight=in_flight)
        assert [next(outputs)["y"][0, 0] for _ in range(3)] == [0, 2, 4]
        with pytest.raises(kind):
            next(outputs)
        assert next(outputs, None) is None
        assert engine.infer(batch(1), timeout_s=1)["y"][0, 0] == 2


class Tickets:
    """A gate that lets as many inferences through as there are tickets."""

    def __init__(self, count: int) -> None:
        self._tickets = threading.Semaphore(count)

    def wait(self, timeout: float) -> bool:
        return self._tickets.acquire(timeout=timeout)

    def add(self, count: int) -> None:
        self._tickets.release(count)


def test_leaving_map_early_cancels_what_waits_and_the_engine_goes_on() -> None:
    engine, loaded = make_engine()
    loaded.gate = tickets = Tickets(1)  # type: ignore[assignment]
    with engine:
        outputs = engine.map((batch(number) for number in range(100)), in_flight=10)
        assert next(outputs)["y"][0, 0] == 0
        assert [loaded.next_started(), loaded.next_started()] == [0, 1]
        outputs.close()  # type: ignore[attr-defined]
        tickets.add(100)
        assert engine.infer(batch(50))["y"][0, 0] == 100
    assert loaded.next_started() == 50
    assert loaded.started.empty()
    assert len(engine._queue._free) == 257, "every place in the queue is free again"


def test_an_empty_map_is_empty_and_in_flight_must_be_positive(engine: Engine) -> None:
    assert list(engine.map([])) == []
    for in_flight in (0, -1):
        with pytest.raises(UsageError, match=f"in_flight={in_flight}"):
            engine.map([], in_flight=in_flight)


# memory


def test_memory_is_reported_by_owner() -> None:
    engine, loaded = make_engine(contexts=2)
    with engine:
        assert (engine.memory_report().in_flight, engine.memory_report().queued) == ((0, 0), 0)
        with engine.lease(), ThreadPoolExecutor(1) as pool:
            direct = pool.submit(engine.infer, batch(0, size=3))
            loaded.next_started()
            futures = [engine.submit(batch(number, size=5)) for number in range(4)]
            report = engine.memory_report()
            assert sorted(report.in_flight) == [0, 3 * 4 * 4]
            assert report.queued == 4 * 5 * 4 * 4
            assert report.runtime == {"plan": 1000}
            assert report.total == 1000 + 48 + 320
            loaded.gate.set()
            direct.result(WAIT_S)
            wait(futures, WAIT_S)
    with pytest.raises(EngineClosedError):
        engine.memory_report()


def test_bytes_are_queued_or_in_flight_but_never_both() -> None:
    engine, loaded = make_engine()
    with engine:
        futures = [engine.submit(batch(number)) for number in range(3)]
        loaded.next_started()
        report = engine.memory_report()
        assert (report.in_flight, report.queued, report.total) == ((16,), 32, 1048)
        loaded.gate.set()
        wait(futures, WAIT_S)
        engine.close()


def test_the_onnxruntime_engine_reports_its_plan(engine: Engine, qdq_plan: Plan) -> None:
    report = engine.memory_report()
    assert report.runtime == {"plan": qdq_plan.manifest.plan_bytes}
    assert report.total == qdq_plan.manifest.plan_bytes


# the end


def test_closing_waits_for_what_runs_and_fails_what_waits() -> None:
    engine, loaded = make_engine(contexts=2)
    with ThreadPoolExecutor(3) as pool:
        running = [engine.submit(batch(number)) for number in range(2)]
        for _ in running:
            loaded.next_started()
        queued = [engine.submit(batch(number)) for number in range(5)]
        blocked = pool.submit(engine.infer, batch(9))
        until(lambda: engine._pool._waiting)
        closing = pool.submit(engine.close)
        with pytest.raises(EngineClosedError):
            blocked.result(WAIT_S)
        assert not closing.done()
        assert loaded.closings == 0
        loaded.gate.set()
        closing.result(WAIT_S)
        assert [future.result(WAIT_S)["y"][0, 0] for future in running] == [0, 2]
        for future in queued:
            with pytest.raises(EngineClosedError):
                future.result(WAIT_S)
    assert loaded.closings == 1


def test_a_full_queue_fails_whoever_waits_for_a_place_when_the_engine_closes() -> None:
    engine, loaded = make_engine(queue_size=0)
    with ThreadPoolExecutor(2) as pool:
        running = engine.submit(batch(1))
        loaded.next_started()
        waiting = pool.submit(engine.submit, batch(2))
        until(lambda: engine._queue._waiting)
        closing = pool.submit(engine.close)
        with pytest.raises(EngineClosedError):
            waiting.result(WAIT_S)
        loaded.gate.set()
        closing.result(WAIT_S)
        assert running.result(0)["y"][0, 0] == 2


def test_closing_again_and_from_many_threads_does_nothing_more() -> None:
    engine, loaded = make_engine(contexts=2, is_open=True)
    engine.infer(batch(1))
    barrier = threading.Barrier(8)

    def close() -> None:
        barrier.wait(WAIT_S)
        engine.close()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(close) for _ in range(8)]:
            future.result(WAIT_S)
    engine.close()
    assert loaded.closings == 1
    assert engine.contexts == 2


def test_closing_while_a_lease_is_held_times_out_refuses_requests_and_can_be_repeated() -> None:
    engine, loaded = make_engine(is_open=True)
    with engine.lease() as lease:
        with pytest.raises(EngineBusyError, match=r"1 of 1 execution contexts were still in use after 0\.01 s"):
            engine.close(timeout_s=0.01)
        with pytest.raises(EngineClosedError):
            engine.infer(batch(1))
        assert lease.execute(batch(1))["y"][0, 0] == 2
        assert loaded.closings == 0
    engine.close()
    assert loaded.closings == 1


@pytest.mark.parametrize("what", ["infer", "submit", "map", "lease", "memory_report"])
def test_every_method_of_a_closed_engine_says_that_it_is_closed(qdq_plan: Plan, what: str) -> None:
    engine = Engine.load(qdq_plan.path)
    engine.close()
    calls: dict[str, Callable[[], object]] = {
        "infer": lambda: engine.infer(image(0)),
        "submit": lambda: engine.submit(image(0)),
        "map": lambda: list(engine.map([image(0)])),
        "lease": lambda: engine.lease().__enter__(),
        "memory_report": engine.memory_report,
    }
    with pytest.raises(EngineClosedError, match="closed") as caught:
        calls[what]()
    assert "Engine.load" in str(caught.value)


def test_leaving_the_block_with_an_error_closes_and_keeps_the_error() -> None:
    engine, loaded = make_engine(is_open=True)
    with pytest.raises(KeyError), engine:
        raise KeyError("mine")
    assert loaded.closings == 1


def test_requests_that_race_with_close_end_one_way_or_the_other() -> None:
    for _ in range(20):
        engine, loaded = make_engine(contexts=2, is_open=True)
        barrier = threading.Barrier(5)
        futures: list[Future[Any]] = []

        def work(engine: Engine = engine, barrier: threading.Barrier = barrier, futures: list[Any] = futures) -> int:
            barrier.wait(WAIT_S)
            answered = 0
            try:
                while True:
                    futures.append(engine.submit(batch(1)))
                    assert engine.infer(batch(answered))["y"][0, 0] == 2 * answered
                    answered += 1
            except EngineClosedError:
                return answered

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            barrier.wait(WAIT_S)
            engine.close()
            for worker in workers:
                worker.result(WAIT_S)
        for future in futures:
            assert isinstance(future.exception(WAIT_S), EngineClosedError | None)
        assert loaded.closings == 1


def test_a_plan_without_manifest_loads_only_on_request(qdq_plan: Plan, tmp_path: Path) -> None:
    copy = tmp_path / "bare.plan"
    copy.write_bytes(qdq_plan.path.read_bytes())
    with pytest.raises(PlanCorruptError, match="no readable manifest"):
        Engine.load(copy)
    inputs = {"input": np.zeros((2, 3, 32, 32), np.float32)}
    with Engine.load(copy, without_manifest="onnxruntime") as bare, Engine.load(qdq_plan.path) as whole:
        assert bare.inputs == whole.inputs
        np.testing.assert_array_equal(bare.infer(inputs)["logits"], whole.infer(inputs)["logits"])
