"""FairPool: nothing lost, nothing handed out twice, first come first served, under every interleaving."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from tests.fakes.fake_runtime import WAIT_S
from trtdeploy.engine.pool import FairPool
from trtdeploy.errors import EngineBusyError, EngineClosedError


class PoolMachine(RuleBasedStateMachine):
    """Requests, cancellations, time-outs, releases and closing in any order, against a model of what must happen."""

    waiting = Bundle("waiting")

    @initialize(size=st.integers(1, 3))
    def start(self, size: int) -> None:
        self.size = size
        self.pool = FairPool(range(size), what="item")
        self.queue: deque[Future[int]] = deque()  # in the order of asking, the cancelled ones left out
        self.held: list[int] = []
        self.closed = False

    def take(self, future: Future[int]) -> None:
        item = future.result(0)
        assert item not in self.held, "handed out twice"
        self.held.append(item)

    @rule(target=waiting)
    def request(self) -> Future[int]:
        future = self.pool.request()
        if self.closed:
            assert isinstance(future.exception(0), EngineClosedError)
        elif len(self.held) < self.size:
            self.take(future)
        else:
            assert not future.done()
            self.queue.append(future)
        return future

    @rule(future=consumes(waiting))
    def cancel(self, future: Future[int]) -> None:
        assert future.cancel() == (future in self.queue)
        if future in self.queue:
            self.queue.remove(future)

    @rule()
    def acquire_without_waiting(self) -> None:
        if self.closed:
            with pytest.raises(EngineClosedError):
                self.pool.acquire(0)
        elif len(self.held) < self.size:
            item = self.pool.acquire(0)
            assert item not in self.held, "handed out twice"
            self.held.append(item)
        else:
            with pytest.raises(EngineBusyError):
                self.pool.acquire(0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.held))
        self.held.remove(item)
        self.pool.release(item)
        if self.queue:
            self.take(self.queue.popleft())

    @rule()
    def refuse(self) -> None:
        self.pool.refuse()
        self.closed = True
        while self.queue:
            assert isinstance(self.queue.popleft().exception(0), EngineClosedError)

    @rule()
    def drain_without_waiting(self) -> None:
        if self.held:
            with pytest.raises(EngineBusyError, match=rf"{len(self.held)} of {self.size} items were still in use"):
                self.pool.drain(0)
        else:
            self.pool.drain(0)

    @invariant()
    def whoever_waits_still_waits(self) -> None:
        assert not any(future.done() for future in self.queue)

    def teardown(self) -> None:
        for future in self.queue:
            future.cancel()
        for item in self.held:
            self.pool.release(item)
        self.pool.drain(0)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_items_go_to_those_who_wait_in_the_order_in_which_they_asked() -> None:
    pool = FairPool(["only"], what="item")
    pool.acquire(0)
    waiters = [pool.request() for _ in range(20)]
    order: list[int] = []
    for number, waiter in enumerate(waiters):
        waiter.add_done_callback(lambda future, number=number: order.append(number))
    for served in range(20):
        pool.release("only")
        assert order == list(range(served + 1))


def test_a_late_comer_does_not_overtake_those_who_wait() -> None:
    pool = FairPool([1], what="item")
    pool.acquire(0)
    first = pool.request()
    pool.release(1)
    assert first.result(0) == 1
    with pytest.raises(EngineBusyError):
        pool.acquire(0)


def test_a_release_skips_those_who_gave_up() -> None:
    pool = FairPool([1], what="item")
    pool.acquire(0)
    gave_up, waits = pool.request(), pool.request()
    gave_up.cancel()
    pool.release(1)
    assert waits.result(0) == 1
    with pytest.raises(CancelledError):
        gave_up.result(0)


class _Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


class _InterruptedFuture(Future[int]):
    """Ctrl-C arrives in ``result``: before the item does, or just after."""

    item_first = False
    pool: FairPool[int]
    armed = True

    def result(self, timeout: float | None = None) -> int:
        if type(self).armed:
            type(self).armed = False
            if self.item_first:
                self.pool.release(1)
                assert self.done()
            raise _Interrupted
        return super().result(timeout)


@pytest.mark.parametrize("item_first", [False, True])
def test_ctrl_c_while_waiting_does_not_lose_the_item(item_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FairPool([1], what="item")
    pool.acquire(0)
    monkeypatch.setattr(_InterruptedFuture, "pool", pool, raising=False)
    monkeypatch.setattr(_InterruptedFuture, "item_first", item_first)
    monkeypatch.setattr(_InterruptedFuture, "armed", True)
    monkeypatch.setattr("trtdeploy.engine.pool.Future", _InterruptedFuture)
    with pytest.raises(_Interrupted):
        pool.acquire(WAIT_S)
    if not item_first:
        pool.release(1)
    pool.drain(0)
    assert pool.acquire(0) == 1


class _LateFuture(Future[int]):
    """The item arrives between the time-out and the attempt to stop waiting."""

    pool: FairPool[int]
    armed = True

    def result(self, timeout: float | None = None) -> int:
        if type(self).armed:
            type(self).armed = False
            self.pool.release(1)
            raise FutureTimeoutError
        return super().result(timeout)


def test_an_item_that_arrives_at_the_last_moment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FairPool([1], what="item")
    pool.acquire(0)
    monkeypatch.setattr(_LateFuture, "pool", pool, raising=False)
    monkeypatch.setattr(_LateFuture, "armed", True)
    monkeypatch.setattr("trtdeploy.engine.pool.Future", _LateFuture)
    assert pool.acquire(0) == 1
    with pytest.raises(EngineBusyError):
        pool.drain(0)


def test_a_callback_may_use_the_pool() -> None:
    pool = FairPool([1], what="item")
    pool.acquire(0)
    second: list[int] = []
    pool.request().add_done_callback(lambda future: pool.release(future.result()))
    pool.request().add_done_callback(lambda future: second.append(future.result()))
    pool.release(1)
    assert second == [1]


@pytest.mark.parametrize("size", [1, 3])
def test_many_threads_never_hold_the_same_item(size: int) -> None:
    pool = FairPool(range(size), what="item")
    holders = [0] * size
    clashes: list[int] = []
    barrier = threading.Barrier(12)

    def work(number: int) -> None:
        barrier.wait(WAIT_S)
        for turn in range(150):
            try:
                item = pool.acquire(0 if (turn + number) % 5 == 0 else WAIT_S)
            except EngineBusyError:
                continue
            holders[item] += 1
            if holders[item] != 1:
                clashes.append(item)
            holders[item] -= 1
            pool.release(item)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    pool.drain(0)


def test_messages_say_what_is_short_and_what_helps() -> None:
    pool = FairPool([1, 2], what="execution context")
    pool.acquire(0)
    pool.acquire(0)
    with pytest.raises(EngineBusyError) as caught:
        pool.acquire(0.01)
    assert "No execution context became free within 0.01 s; all 2 are in use." in str(caught.value)
    assert "more contexts" in str(caught.value)
    assert caught.value.exit_code == 3
    assert "in time" in str(pool.busy(None))
