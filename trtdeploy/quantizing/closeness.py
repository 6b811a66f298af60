"""How close the answers of a quantized model are to the float model's, over all samples and in the worst channel."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.errors import GateError, QuantizationError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.quantizing.output_scores import Answers
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array

_FIRST = frozenset({"Conv", "ConvTranspose", "BatchNormalization"})
_LAST = frozenset({"Gemm", "MatMul", "LayerNormalization"})
_MOVING = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Split", "DepthToSpace"})
"""Behind these the channels of a layer may be on another axis."""


@dataclass(frozen=True)
class WorstChannel:
    """The channel of an answer whose values differ most, in relation to themselves.

    Attributes:
        name: The answer.
        axis: Of its channels.
        index: Of this one.
        sqnr_db: Of its values in all samples.
    """

    name: str
    axis: int
    index: int
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.name}[{':, ' * self.axis}{self.index}]"


@dataclass(frozen=True)
class Closeness:
    """How close the answers are.

    Attributes:
        sqnr_db: Of all answers to all samples, with the float model's as signal; None where it has no finite value.
        worst: None where ``sqnr_db`` is, or where the answers have one channel.
        why: Why ``sqnr_db`` is None.
    """

    sqnr_db: float | None
    worst: WorstChannel | None = None
    why: str = ""


class _Powers:
    """Sums of squares of the float answers and of the differences, in all and by channel."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.signal = self.noise = 0.0
        self.channels = np.zeros((2, 0))

    def add(self, expected: Array, answered: Array) -> None:
        wanted = np.asarray(expected, np.float64)
        finite = np.isfinite(wanted)
        wanted = np.where(finite, wanted, 0)
        noise = np.where(finite, np.asarray(answered, np.float64), 0) - wanted
        squares = np.square(np.stack([wanted, noise]))
        self.signal += float(squares[0].sum())
        self.noise += float(squares[1].sum())
        if self.axis is None or wanted.ndim < 2:
            return
        found = np.moveaxis(squares, self.axis + 1, 1).reshape(2, wanted.shape[self.axis], -1).sum(axis=2)
        missing = found.shape[1] - self.channels.shape[1]  # of samples that differ in length, channels may, too
        if missing > 0:
            self.channels = np.pad(self.channels, [(0, 0), (0, missing)])
        self.channels[:, : found.shape[1]] += found

    def worst(self) -> tuple[int, float] | None:
        """Return the index and SQNR of the worst channel that has a signal, where there are several."""
        signal, noise = self.channels
        heard = np.flatnonzero(signal)
        if heard.size < 2:
            return None
        with np.errstate(divide="ignore"):
            found = 10 * np.log10(signal[heard] / noise[heard])
        return int(heard[found.argmin()]), float(found.min())


def measure(
    answers: Answers, float_model: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Mapping[str, Array]]
) -> Closeness:
    """Run both models on all samples and compare their answers.

    Raises:
        ModelError: ONNX Runtime does not accept the quantized model.
        QuantizationError: The float model answers NaN.
        GateError: The quantized model's answers are not finite where the float model's are, or hold nothing of them:
            the noise is as large as the signal, as if all answers were zero.
    """
    outputs = {value.name for value in quantized.graph.output}
    whole = Witness(quantized) if outputs - set(answers.types) else None  # what is not compared has to run, too
    if whole is not None and not answers.types:
        whole(next(iter(batches)))
        return Closeness(None, why="no output is float, nor is what leads to one")
    run, run_quantized = answers.witness(float_model), answers.witness(quantized)
    powers: dict[str, _Powers] = {}
    comparable = True
    graph = Graph(float_model.graph)
    for place, batch in enumerate(batches):
        if place == 0 and whole is not None:
            whole(batch)
        expected, answered = run(batch), run_quantized(batch)
        require_numbers(answers, expected)
        for name, one, other in zip(answers.types, expected, answered, strict=True):
            if one.shape != other.shape:
                comparable = False
                continue
            _require_finite(name, one, other)
            powers.setdefault(name, _Powers(_channel_axis(graph, name, one.shape))).add(one, other)
    if not comparable:
        return Closeness(None, why="another number of values is answered")
    signal, noise = (sum(getattr(each, kind) for each in powers.values()) for kind in ("signal", "noise"))
    if not noise:
        return Closeness(None, why="no answer differs")
    found = 10 * math.log10(signal / noise) if signal else -math.inf
    if round(found, 1) <= 0:
        raise GateError(
            f"The INT8 model's answers hold nothing of the float model's: over all samples the difference is as "
            f"large as the answers themselves (SQNR {found:.1f} dB). Nothing is written.",
            hint="Give samples like those in use, another --method, or --skip the layers that cannot be quantized.",
        )
    worst = [
        WorstChannel(name, each.axis, *least)
        for name, each in powers.items()
        if each.axis is not None and (least := each.worst()) is not None
    ]
    return Closeness(found, min(worst, key=lambda channel: channel.sqnr_db, default=None))


def require_numbers(answers: Answers, expected: Iterable[Array]) -> None:
    """Refuse answers of a float model with which nothing can be compared.

    Raises:
        QuantizationError: One of them is NaN, or all of an output are infinite.
    """
    for name, values in zip(answers.types, expected, strict=True):
        broken = int(np.isnan(values).sum())
        if broken or (values.size and not np.isfinite(values).any()):
            what = f"NaN: {broken} of {values.size} values" if broken else f"nothing finite: all {values.size} values"
            raise QuantizationError(
                f"The float model answers {what} of {name!r}, so that nothing says what the quantized model has to "
                "compute. Nothing is written.",
                hint="Run the float model on these samples first; a sample may be one that it was not made for.",
            )


def _require_finite(name: str, expected: Array, answered: Array) -> None:
    broken = int(((np.isfinite(expected) & ~np.isfinite(answered)) | np.isnan(answered)).sum())
    if broken:
        raise GateError(
            f"The INT8 model answers NaN or infinity where the float model does not: {broken} of {answered.size} "
            f"values of {name!r}. Nothing is written.",
            hint="Leave the layers before it in float (--skip PATTERN), or give another --method.",
        )


def _channel_axis(graph: Graph, name: str, shape: tuple[int, ...]) -> int | None:
    """Return the axis of an answer's channels: where the nearest layer above it has them.

    Where something below every layer moves axes, the shorter of the second and the last.
    """
    if len(shape) < 2:
        return None
    last = len(shape) - 1
    queue = deque([name])
    seen: set[str] = set()
    while queue:
        node = graph.producer.get(queue.popleft())
        if node is None or node.op_type in _MOVING:
            continue
        if node.op_type in _FIRST:
            return 1
        if node.op_type in _LAST:
            return last
        queue.extend(read for read in node.input if read not in seen)
        seen.update(node.input)
    return 1 if shape[1] <= shape[last] else last
