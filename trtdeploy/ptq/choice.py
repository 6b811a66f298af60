"""Choosing a calibration method for a model without labels: which one leaves held-out answers closest to float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.calibration import Method
from trtdeploy.ptq.observe import runner
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import Array


@dataclass(frozen=True)
class Candidate:
    """A method with its percentile, where it has one."""

    method: Method
    percentile: float | None = None

    @property
    def name(self) -> str:
        """How people write it."""
        return self.method if self.percentile is None else f"{self.method} {self.percentile:g}"


CANDIDATES = (
    Candidate("max"),
    Candidate("percentile", 99.9),
    Candidate("percentile", 99.99),
    Candidate("percentile", 99.999),
    Candidate("mse"),
    Candidate("relative-mse"),
    Candidate("entropy"),
)
"""No method is best everywhere: entropy collapses on some networks where max is fine, and the squared error follows
a few images with values a hundred times larger than all others."""


def score_candidates(
    float_model: onnx.ModelProto,
    quantized: Callable[[Candidate], onnx.ModelProto],
    held_out: Sequence[Mapping[str, Array]],
    progress: Callable[[int, int], None],
) -> dict[Candidate, float]:
    """Return for each candidate the median over held-out samples of the outputs' SQNR in dB.

    The median, because what matters is how many samples keep their answer, and one broken sample outweighs all others
    in a mean.

    Args:
        float_model: What the answers are compared with.
        quantized: Makes the model of a candidate.
        held_out: Batches of inputs that no range was found on.
        progress: Called with the candidates done and in all.
    """
    outputs = [value.name for value in float_model.graph.output]
    run = runner(float_model, outputs)
    expected = [run(batch) for batch in held_out]
    scores: dict[Candidate, float] = {}
    for index, candidate in enumerate(CANDIDATES, 1):
        run = runner(quantized(candidate), outputs)
        found: list[float] = []
        for batch, reference in zip(held_out, expected, strict=True):
            found += _per_sample(reference, run(batch))
        scores[candidate] = float(np.median(found))
        progress(index, len(CANDIDATES))
    return scores


def _per_sample(expected: Sequence[Array], answered: Sequence[Array]) -> list[float]:
    """Return the SQNR of each row over all floating-point outputs."""
    pairs = [
        (np.reshape(one, (len(one), -1)), np.reshape(other, (len(other), -1)))
        for one, other in zip(expected, answered, strict=True)
        if np.issubdtype(one.dtype, np.floating) and one.ndim
    ]
    if not pairs or len({len(one) for one, _ in pairs}) != 1:
        return [float("inf")]
    left = np.concatenate([one for one, _ in pairs], axis=1)
    right = np.concatenate([other for _, other in pairs], axis=1)
    return [sqnr_db(one, other) for one, other in zip(left, right, strict=True)]
