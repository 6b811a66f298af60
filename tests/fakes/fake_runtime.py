"""A runtime without arithmetic whose inferences last until a test lets them end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from trtdeploy.engine import Engine
from trtdeploy.errors import InferenceError
from trtdeploy.plan import DeviceFacts, Manifest, PrecisionFacts, RuntimeFacts, SourceFacts
from trtdeploy.runtimes.base import ExecutionContext, LoadedEngine
from trtdeploy.tensors import Array, TensorSpec

WAIT_S = 120.0
"""How long anything here waits before the test counts as hung."""


def manifest(*, batch: int = -1) -> Manifest:
    return Manifest(
        trtdeploy_version="0",
        created_at="2026-01-01T00:00:00+00:00",
        runtime=RuntimeFacts(name="onnxruntime", version="0"),
        device=DeviceFacts(kind="cpu", name="none", capability="none"),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(batch, 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(batch, 4)),),
        precision=PrecisionFacts(weighted_layers=0, quantized_layers=0, integer_kernels=None, note=""),
        plan_bytes=0,
        plan_sha256="",
        onnx=SourceFacts(file="none.onnx", sha256=""),
        build_config={},
    )


class FakeContext(ExecutionContext):
    """Doubles its input once the gate is open; fails on an input that begins with NaN."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._busy = threading.Lock()
        self.closed = False

    def execute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert not self.closed, "used after close"
        assert self._busy.acquire(blocking=False), "two inferences at a time on one context"
        try:
            self._engine.started.put(float(inputs["x"][0, 0]))
            assert self._engine.gate.wait(WAIT_S), "the test never opened the gate"
            if np.isnan(inputs["x"][0, 0]):
                raise InferenceError("The fake runtime failed.")
            return {"y": 2 * inputs["x"]}
        finally:
            self._busy.release()

    def execute_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        outputs["y"][...] = self.execute(inputs)["y"]

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeEngine(LoadedEngine):
    """Attributes: ``gate`` lets inferences end; ``started`` holds the first number of each one that began."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.started: queue.Queue[float] = queue.Queue()
        self.made: list[FakeContext] = []
        self.closings = 0

    def create_context(self) -> FakeContext:
        self.made.append(FakeContext(self))
        return self.made[-1]

    def memory(self) -> dict[str, int]:
        return {"plan": 1000}

    def close(self) -> None:
        assert all(context.closed for context in self.made), "closed before its contexts"
        self.closings += 1

    def next_started(self) -> float:
        """Wait for the next inference to begin and return its first number."""
        return self.started.get(timeout=WAIT_S)


def until(condition: Callable[[], object]) -> None:
    """Wait until another thread has got so far; for states that nobody announces."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.0005)


def batch(first: float, size: int = 1) -> dict[str, Array]:
    return {"x": np.full((size, 4), first, np.float32)}


def make_engine(
    *, contexts: int = 1, is_open: bool = False, timeout_s: float | None = WAIT_S, queue_size: int = 256
) -> tuple[Engine, FakeEngine]:
    loaded = FakeEngine(is_open=is_open)
    return Engine(loaded, manifest(), contexts=contexts, timeout_s=timeout_s, queue_size=queue_size), loaded
