"""The pool, pinned memory and the staging ring, under the fake driver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.fake_machine import Machine
from tests.fakes.fake_cudart import FakeViolation
from trtdeploy.cuda.memory import (
    ALIGNMENT,
    DevicePool,
    PinnedBuffer,
    StagingRing,
    copy_on_device,
    copy_to_device,
    copy_to_host,
)
from trtdeploy.cuda.streams import Event, Stream
from trtdeploy.errors import CudaError, DeviceMemoryError

FLOAT = np.dtype(np.float32)


class TestPool:
    def test_memory_is_aligned_accounted_for_and_given_back(self) -> None:
        m = Machine()
        buffers = [m.pool.allocate(nbytes, m.stream) for nbytes in (1, 1000, 4096)]
        assert all(buffer.address % ALIGNMENT == 0 for buffer in buffers)
        assert m.pool.used_bytes == 5097
        assert m.pool.reserved_bytes >= 5097
        for buffer in buffers:
            buffer.free(m.stream)
        assert m.pool.used_bytes == 0
        m.end()

    def test_steady_state_takes_nothing_new_from_the_device(self) -> None:
        m = Machine()
        for _ in range(20):
            m.pool.allocate(1 << 16, m.stream).free(m.stream)
        assert m.pool.reserved_bytes == 1 << 16
        m.end()

    def test_more_than_the_device_has_is_a_memory_error_and_the_pool_goes_on(self) -> None:
        m = Machine(memory_bytes=1 << 20)
        with pytest.raises(DeviceMemoryError, match="cudaMallocFromPoolAsync"):
            m.pool.allocate(1 << 21, m.stream)
        assert m.pool.used_bytes == 0
        m.pool.allocate(1 << 10, m.stream).free(m.stream)
        m.end()

    def test_a_misaligned_address_is_refused_and_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        m = Machine()
        monkeypatch.setattr("trtdeploy.cuda.memory.ALIGNMENT", 1 << 62)
        with pytest.raises(CudaError, match="not aligned to"):
            m.pool.allocate(16, m.stream)
        assert m.pool.used_bytes == 0
        m.end()

    def test_freeing_twice_is_refused_before_cuda_sees_it(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(16, m.stream)
        buffer.free(m.stream)
        with pytest.raises(CudaError, match="freed already"):
            buffer.free(m.stream)
        m.end()

    def test_closing_with_memory_in_use_is_refused_with_its_size(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(300, m.stream)
        with pytest.raises(CudaError, match="300 bytes in 1 buffers"):
            m.pool.close()
        buffer.free(m.stream)
        m.end()

    def test_a_pool_that_cannot_be_made_says_so(self) -> None:
        m = Machine()
        m.cudart.fail_next("cudaMemPoolCreate")
        with pytest.raises(DeviceMemoryError, match="cudaMemPoolCreate"):
            DevicePool(m.device, release_threshold_bytes=0)
        m.end()


class TestPinned:
    def test_views_share_its_memory(self) -> None:
        m = Machine()
        pinned = PinnedBuffer(m.device, 64)
        pinned.view(FLOAT, (4, 4))[...] = np.arange(16).reshape(4, 4)
        np.testing.assert_array_equal(pinned.view(FLOAT, (8,), offset=32), np.arange(8, 16))
        assert pinned.view(FLOAT, ()).shape == ()
        assert pinned.view(np.dtype(bool), (2, 0)).shape == (2, 0)
        assert pinned.view(FLOAT, (1,)).ctypes.data == pinned.address
        pinned.close()
        m.end()

    @pytest.mark.parametrize(("shape", "offset"), [((17,), 0), ((16,), 4), ((1,), 64)])
    def test_a_view_beyond_its_end_is_refused(self, shape: tuple[int, ...], offset: int) -> None:
        m = Machine()
        pinned = PinnedBuffer(m.device, 64)
        with pytest.raises(CudaError, match="do not fit"):
            pinned.view(FLOAT, shape, offset=offset)
        pinned.close()
        m.end()

    def test_memory_that_cannot_be_pinned(self) -> None:
        m = Machine(memory_bytes=1 << 12)
        with pytest.raises(DeviceMemoryError, match="cudaHostAlloc"):
            PinnedBuffer(m.device, 1 << 13)
        m.end()


class TestCopies:
    def test_there_within_and_back(self) -> None:
        m = Machine()
        pinned = PinnedBuffer(m.device, 64)
        first, second = m.pool.allocate(64, m.stream), m.pool.allocate(64, m.stream)
        values = np.arange(16, dtype=np.float32)
        pinned.view(FLOAT, (16,))[...] = values
        copy_to_device(m.device, first.address, pinned.address, 64, m.stream)
        m.stream.synchronize()
        pinned.view(FLOAT, (16,))[...] = 0
        copy_on_device(m.device, second.address, first.address, 64, m.stream)
        copy_to_host(m.device, pinned.address, second.address, 64, m.stream)
        m.stream.synchronize()
        np.testing.assert_array_equal(pinned.view(FLOAT, (16,)), values)
        first.free(m.stream)
        second.free(m.stream)
        m.stream.synchronize()
        pinned.close()
        m.end()

    def test_nothing_is_copied_without_a_call(self) -> None:
        m = Machine()
        copy_to_device(m.device, 0, 0, 0, m.stream)
        assert m.cudart.calls["cudaMemcpyAsync"] == 0
        m.end()


class TestRing:
    def test_slots_come_in_turn_and_only_after_their_copies(self) -> None:
        m = Machine()
        ring = StagingRing(m.device, slots=2)
        target = m.pool.allocate(4096, m.stream)
        addresses = []
        for turn in range(6):
            with ring.slot(64, m.stream) as slot:
                addresses.append(slot.address)
                # had the ring not waited, this would change memory that is still to be copied
                slot.view(FLOAT, (16,))[...] = turn
                copy_to_device(m.device, target.address, slot.address, 64, m.stream)
        assert addresses == addresses[:2] * 3
        assert addresses[0] != addresses[1]
        target.free(m.stream)
        ring.close()
        m.end()

    def test_a_ring_that_does_not_wait_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trtdeploy.cuda.memory.StagingSlot.synchronize", lambda _: None)
        with pytest.raises(FakeViolation, match="changed while a copy"):
            self.test_slots_come_in_turn_and_only_after_their_copies()

    def test_it_waits_for_an_event_and_not_for_the_whole_stream(self) -> None:
        m = Machine()
        ring = StagingRing(m.device, slots=1)
        target = m.pool.allocate(64, m.stream)
        later = m.pool.allocate(64, m.stream)
        with ring.slot(64, m.stream) as slot:
            copy_to_device(m.device, target.address, slot.address, 64, m.stream)
        m.kernel(m.stream, writes=later, result=5.0)
        with ring.slot(64, m.stream):
            assert (m.read(later) != 5.0).all()
        for buffer in (target, later):
            buffer.free(m.stream)
        ring.close()
        assert m.cudart.calls["cudaStreamSynchronize"] == 0
        m.end()

    def test_growing_waits_for_the_copy_from_the_old_memory(self) -> None:
        m = Machine()
        ring = StagingRing(m.device, slots=1)
        target = m.pool.allocate(1 << 14, m.stream)
        with ring.slot(64, m.stream) as slot:
            slot.view(FLOAT, (16,))[...] = 3
            copy_to_device(m.device, target.address, slot.address, 64, m.stream)
        with ring.slot(1 << 14, m.stream) as slot:
            assert slot.nbytes >= 1 << 14
        assert (m.read(target)[:16] == 3).all()
        assert ring.nbytes == 1 << 14
        target.free(m.stream)
        ring.close()
        m.end()

    def test_a_sweep_over_sizes_pins_memory_a_few_times_only(self) -> None:
        m = Machine()
        ring = StagingRing(m.device, slots=1)
        for nbytes in range(64, 1 << 16, 64):
            with ring.slot(nbytes, m.stream):
                pass
        assert m.cudart.calls["cudaHostAlloc"] <= 6
        ring.close()
        m.end()

    def test_more_transfers_than_slots_is_an_error(self) -> None:
        m = Machine()
        ring = StagingRing(m.device, slots=2)
        taken = [ring.take(16), ring.take(16)]
        with pytest.raises(CudaError, match="All 2 staging slots are taken"):
            ring.take(16)
        taken[0].release()
        ring.take(16).release()
        ring.close()
        m.end()

    def test_no_memory_for_a_larger_slot_leaves_the_ring_as_it_was(self) -> None:
        m = Machine(memory_bytes=1 << 14)
        ring = StagingRing(m.device, slots=1)
        ring.take(64).release()
        with pytest.raises(DeviceMemoryError):
            ring.take(1 << 15)
        slot = ring.take(64)
        assert slot.nbytes == 4096
        slot.release()
        ring.close()
        m.end()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    eagerness=st.sampled_from([0.0, 0.2, 0.7]),
    slots=st.integers(1, 3),
    transfers=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5000), st.booleans()), min_size=1, max_size=12),
)
def test_what_is_staged_arrives_on_any_schedule(
    seed: int, eagerness: float, slots: int, transfers: list[tuple[int, int, bool]]
) -> None:
    """Two streams, each with a ring; sometimes the second goes on with what the first has copied."""
    m = Machine(seed, eagerness=eagerness)
    streams = [m.stream, Stream(m.device)]
    rings = [StagingRing(m.device, slots=slots) for _ in streams]
    results = StagingRing(m.device, slots=len(transfers))
    back, buffers, events = [], [], []
    for turn, (which, count, crosses) in enumerate(transfers):
        stream = streams[which]
        values = np.full(count, turn, np.float32)
        buffer = m.pool.allocate(values.nbytes, stream)
        with rings[which].slot(values.nbytes, stream) as slot:
            slot.view(FLOAT, values.shape)[...] = values
            copy_to_device(m.device, buffer.address, slot.address, values.nbytes, stream)
        if crosses:
            event = Event(m.device)
            stream.record(event)
            stream = streams[1 - which]
            stream.wait(event)
            events.append(event)
        result = results.take(values.nbytes)
        copy_to_host(m.device, result.address, buffer.address, values.nbytes, stream)
        result.done_after(stream)
        back.append((result, values))
        buffers.append((buffer, stream))
    for result, values in reversed(back):
        result.synchronize()
        np.testing.assert_array_equal(result.view(FLOAT, values.shape), values)
        result.release()
    for buffer, stream in buffers:
        buffer.free(stream)
    streams[1].synchronize()
    every: tuple[Any, ...] = (*rings, results, *events, streams[1])
    for owned in every:
        owned.close()
    m.end()
