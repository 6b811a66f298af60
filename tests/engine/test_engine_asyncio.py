"""Engine.ainfer: many at once, cancellation, time-outs and the end, without blocking the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tests.fakes.fake_runtime import WAIT_S, batch, make_engine
from tests.onnx_graphs import as_exported
from trtdeploy.engine import Engine
from trtdeploy.errors import DtypeError, EngineBusyError, EngineClosedError, InferenceError, InputNameError, UsageError
from trtdeploy.plan import Plan


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(test(), WAIT_S)

    return asyncio.run(limited())


async def started(loaded: Any) -> float:
    return await asyncio.to_thread(loaded.next_started)


def image(number: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(number).standard_normal((1, 3, 32, 32)).astype(np.float32)}


@pytest.mark.parametrize(("contexts", "queue_size"), [(1, 256), (4, 256), (2, 3)])
def test_two_hundred_at_once_each_get_their_own_answer(qdq_plan: Plan, contexts: int, queue_size: int) -> None:
    content = qdq_plan.path.read_bytes()

    async def gather(engine: Engine) -> list[dict[str, np.ndarray]]:
        return await asyncio.gather(*(engine.ainfer(image(number)) for number in range(200)))

    with Engine.load(qdq_plan.path, contexts=contexts, threads=1, queue_size=queue_size) as engine:
        outputs = run(lambda: gather(engine))
        assert engine.memory_report().queued == 0
    for number in range(0, 200, 7):
        expected = as_exported(content, image(number))[0]
        np.testing.assert_allclose(outputs[number]["logits"], expected, rtol=1e-4, atol=1e-4)


def test_the_loop_goes_on_while_inferences_run() -> None:
    engine, loaded = make_engine()

    async def test() -> None:
        task = asyncio.create_task(engine.ainfer(batch(1)))
        assert await started(loaded) == 1
        for _ in range(50):
            await asyncio.sleep(0)
        assert not task.done()
        loaded.gate.set()
        assert (await task)["y"][0, 0] == 2

    with engine:
        run(test)


def test_inputs_are_copied_when_it_is_called() -> None:
    engine, loaded = make_engine()

    async def test() -> None:
        inputs = batch(5)
        first = asyncio.create_task(engine.ainfer(batch(1)))
        task = asyncio.create_task(engine.ainfer(inputs))
        await started(loaded)
        inputs["x"][:] = -1
        loaded.gate.set()
        assert (await task)["y"][0, 0] == 10
        await first

    with engine:
        run(test)


@pytest.mark.parametrize(
    ("inputs", "options", "kind"),
    [
        ({}, {}, InputNameError),
        ({"x": [1.0]}, {}, DtypeError),
        (batch(float("nan")), {}, InferenceError),
        (batch(1), {"timeout_s": -1}, UsageError),
    ],
)
def test_it_raises_what_infer_raises(inputs: Any, options: dict[str, Any], kind: type[Exception]) -> None:
    engine, _ = make_engine(is_open=True, queue_size=0)

    async def test() -> None:
        for _ in range(3):
            with pytest.raises(kind):
                await engine.ainfer(inputs, **options)
        assert (await engine.ainfer(batch(1), timeout_s=0))["y"][0, 0] == 2

    with engine:
        run(test)


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_a_full_pool_and_a_full_queue_are_busy(seconds: float) -> None:
    engine, loaded = make_engine(queue_size=0)

    async def test() -> None:
        with engine.lease():
            with pytest.raises(EngineBusyError, match="No execution context became free"):
                await engine.ainfer(batch(1), timeout_s=seconds)
            task = asyncio.create_task(engine.ainfer(batch(2)))
            await asyncio.sleep(0)
            with pytest.raises(EngineBusyError, match="No place in the queue became free"):
                await engine.ainfer(batch(3), timeout_s=seconds)
        loaded.gate.set()
        assert (await task)["y"][0, 0] == 4
        assert (await engine.ainfer(batch(4)))["y"][0, 0] == 8

    with engine:
        run(test)


def test_a_cancelled_task_that_waits_for_a_place_leaves_the_queue() -> None:
    engine, loaded = make_engine(queue_size=0)

    async def test() -> None:
        running = asyncio.create_task(engine.ainfer(batch(1)))
        assert await started(loaded) == 1
        waiting = [asyncio.create_task(engine.ainfer(batch(number))) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        loaded.gate.set()
        outputs = await asyncio.gather(running, *waiting, return_exceptions=True)
        assert [type(output) for output in outputs] == [dict, asyncio.CancelledError, asyncio.CancelledError, dict]
        assert isinstance(outputs[3], dict)
        assert outputs[3]["y"][0, 0] == 8
        assert await started(loaded) == 4

    with engine:
        run(test)
    assert len(engine._queue._free) == 1


def test_a_cancelled_task_that_has_a_place_never_runs() -> None:
    engine, loaded = make_engine(queue_size=5)

    async def test() -> None:
        running = asyncio.create_task(engine.ainfer(batch(1)))
        assert await started(loaded) == 1
        queued = [asyncio.create_task(engine.ainfer(batch(number))) for number in (2, 3)]
        await asyncio.sleep(0)
        queued[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued[0]
        loaded.gate.set()
        assert (await queued[1])["y"][0, 0] == 6
        assert await started(loaded) == 3
        await running

    with engine:
        run(test)
    assert len(engine._queue._free) == 6


def test_a_cancelled_running_task_ends_at_once_and_its_context_comes_back() -> None:
    engine, loaded = make_engine(queue_size=0)

    async def test() -> None:
        task = asyncio.create_task(engine.ainfer(batch(1)))
        assert await started(loaded) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        loaded.gate.set()
        assert (await engine.ainfer(batch(2)))["y"][0, 0] == 4

    with engine:
        run(test)


def test_cancelling_just_when_the_place_arrives_loses_no_place() -> None:
    """A place is handed over by a worker thread; cancel at every distance from that moment."""
    engine, _ = make_engine(is_open=True, queue_size=0)

    async def test() -> None:
        for turn in range(150):
            tasks = [asyncio.create_task(engine.ainfer(batch(number))) for number in range(4)]
            for _ in range(turn % 12):
                await asyncio.sleep(0)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (await engine.ainfer(batch(3)))["y"][0, 0] == 6

    with engine:
        run(test)
    assert len(engine._queue._free) == 1
    assert len(engine._pool._free) == 1


def test_timing_out_just_when_the_place_arrives_loses_no_place() -> None:
    engine, _ = make_engine(is_open=True, queue_size=0)

    async def test() -> None:
        for turn in range(100):
            tasks = [engine.ainfer(batch(number), timeout_s=turn * 2e-6) for number in range(4)]
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, dict | EngineBusyError)
        assert (await engine.ainfer(batch(3)))["y"][0, 0] == 6

    with engine:
        run(test)
    assert len(engine._queue._free) == 1
    assert len(engine._pool._free) == 1


def test_closing_fails_those_who_wait_for_a_place() -> None:
    engine, loaded = make_engine(queue_size=0)

    async def test() -> None:
        running = asyncio.create_task(engine.ainfer(batch(1)))
        assert await started(loaded) == 1
        waiting = asyncio.create_task(engine.ainfer(batch(2)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        with pytest.raises(EngineClosedError):
            await waiting
        loaded.gate.set()
        assert (await running)["y"][0, 0] == 2
        await closing
        with pytest.raises(EngineClosedError):
            await engine.ainfer(batch(3))

    run(test)
    assert loaded.closings == 1


def test_two_loops_in_two_threads_share_an_engine(qdq_plan: Plan) -> None:
    async def both(engine: Engine) -> None:
        async def gather() -> list[Any]:
            return await asyncio.gather(*(engine.ainfer(image(number)) for number in range(20)))

        other = asyncio.to_thread(asyncio.run, gather())
        for mine, others in zip(*await asyncio.gather(gather(), other), strict=True):
            np.testing.assert_array_equal(mine["logits"], others["logits"])

    with Engine.load(qdq_plan.path, contexts=2, threads=1, queue_size=1) as engine:
        run(lambda: both(engine))
