"""Who is asked: a classifier that answers batches, a plan in this process or a model on a server."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.engine import Engine
from trtdeploy.errors import UsageError
from trtdeploy.tensors import DYNAMIC, Array, TensorSpec
from trtdeploy.validation.classifiers import plan_classifier


@dataclass(frozen=True)
class ServerTimes:
    """Where the server says that the time of a request went: means in milliseconds over ``requests`` requests."""

    requests: int
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float


@dataclass(frozen=True)
class ServerTotals:
    """Sums since the server started, in nanoseconds, over ``requests`` successful requests.

    Source: Triton's statistics extension, ``inference_stats``.
    """

    requests: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def since(self, before: ServerTotals) -> ServerTimes | None:
        """Return the means over the requests between two looks; None where there was none, or the server restarted."""
        requests = self.requests - before.requests
        if requests <= 0:
            return None

        def mean_ms(now: int, then: int) -> float:
            return (now - then) / requests / 1e6

        return ServerTimes(
            requests=requests,
            queue_ms=mean_ms(self.queue_ns, before.queue_ns),
            input_ms=mean_ms(self.input_ns, before.input_ns),
            infer_ms=mean_ms(self.infer_ns, before.infer_ns),
            output_ms=mean_ms(self.output_ns, before.output_ns),
        )


class Target(ABC):
    """A classifier that can be asked from several threads at once.

    Attributes:
        stage: The ledger's stage that its answers belong to.
        name: What reports call it.
        version: Its version, where it has one.
        input: Its one input, with the batch dimension.
        max_batch_size: Largest batch of one request; None where there is no limit.
        preprocessing: How images become its input, if it knows.
        labels: Its class names, if it knows.
        score_count: How many classes it scores; None where its output does not say.
        source: Where the answers come from, for the ledger.
        timeout_s: How long one request may take at most; None where there is no limit.
        takes_files: Whether it takes image files as they are, and not model input.
        top_k: How many classes it scores per sample, the best ones; None where it scores all of them.
        loop: The event loop that it can be asked in; None where it can only be asked with blocking calls.
        instances: How many batches it computes at a time: instances, times the contexts of each.
    """

    stage: Literal["plan", "served"]
    name: str
    version: str
    input: TensorSpec
    max_batch_size: int | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    score_count: int | None = None
    source: dict[str, Any]
    timeout_s: float | None = None
    instances: int = 1

    takes_files: bool = False
    top_k: int | None = None
    loop: asyncio.AbstractEventLoop | None = None

    @abstractmethod
    def scores(self, batch: Array) -> Array:
        """Return the class scores of a batch that ``prepare`` has made."""

    async def awaited_scores(self, batch: Array) -> Array:
        """Return the same without blocking; only where there is a ``loop``, and in that loop."""
        raise NotImplementedError

    def prepare(self, split: Split, preprocessing: Preprocessing | None, indices: Sequence[int]) -> Array:
        """Return some samples as the target takes them.

        Raises:
            DataError: An image cannot be read.
            UsageError: Nothing says how images become input.
        """
        known = self._known(preprocessing)
        return known.normalise(split.pixels(known, indices))

    def sample_shape(self, preprocessing: Preprocessing | None) -> tuple[int, ...]:
        """Return the shape of one sample that ``prepare`` makes, -1 where it differs from sample to sample.

        Raises:
            UsageError: Nothing says how images become input.
        """
        return self._known(preprocessing).sample_shape

    def _known(self, preprocessing: Preprocessing | None) -> Preprocessing:
        if preprocessing is None:
            raise UsageError(
                f"{self.name} says nothing about preprocessing.",
                hint="Give --preprocessing FILE.json, or use a model whose ONNX metadata carries it.",
            )
        return preprocessing

    def server_totals(self) -> ServerTotals | None:
        """Return what a server has counted so far; None where there is no server."""
        return None

    def answered_by(self) -> Counter[str]:
        """Return how many samples each version has answered so far; empty where there are no versions."""
        return Counter()


def scores_per_sample(output: TensorSpec) -> int | None:
    """Return how many scores one row of an output has; None where a dimension is dynamic."""
    row = output.shape[1:]
    return None if DYNAMIC in row else math.prod(row)


class PlanTarget(Target):
    """A loaded plan in this process."""

    stage = "plan"

    def __init__(self, engine: Engine, path: str | Path) -> None:
        manifest = engine.manifest
        self._predict = plan_classifier(engine)
        self.name = Path(path).name
        self.version = ""
        self.input = engine.inputs[0]
        self.max_batch_size = None
        self.preprocessing = manifest.preprocessing
        self.labels = manifest.labels
        self.score_count = scores_per_sample(engine.outputs[0])
        self.instances = engine.contexts
        self.source = {
            "file": Path(path).name,
            "sha256": manifest.plan_sha256,
            "runtime": f"{manifest.runtime.name} {manifest.runtime.version}",
        }

    def scores(self, batch: Array) -> Array:
        return self._predict(batch)
