"""Run a classifier over a split and keep what it answers, whatever the classifier is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trtdeploy.data.dataset import Batch, Dataset, Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DataError, InferenceError
from trtdeploy.ledger import StageOutputs
from trtdeploy.tensors import Array

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


@dataclass(frozen=True)
class Evaluation:
    """Outputs per sample and the wall time that producing them took, preprocessing included."""

    outputs: StageOutputs
    seconds: float


def evaluate(
    predict: Callable[[Array], Array],
    split: Split,
    preprocessing: Preprocessing,
    *,
    label_map: Sequence[int] | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Evaluation:
    """Run ``predict`` over ``split`` in order.

    Args:
        predict: Maps model input ``(N, ...)`` to class scores ``(N, classes)``.
        split: The samples.
        preprocessing: How images become model input.
        label_map: The model's class index for each class index of the dataset; the same order if None.
        batch_size: Samples per call of ``predict``.
        progress: Called after every batch.

    Raises:
        DataError: An image cannot be read.
        InferenceError: The answer has not one row per sample.
        LedgerError: An answer is not finite.
    """
    start = time.perf_counter()
    batches: list[Batch] = []
    scores: list[Array] = []
    done = 0
    for batch in split.batches(preprocessing, batch_size):
        answer = np.asarray(predict(batch.inputs))
        if answer.ndim < 2 or len(answer) != len(batch.ids):
            raise InferenceError(
                f"The model answered {len(batch.ids)} samples with an array of shape {list(answer.shape)}; "
                "expected one row of class scores per sample."
            )
        scores.append(answer.reshape(len(batch.ids), -1))
        batches.append(batch)
        done += len(batch.ids)
        if progress:
            progress(done, len(split))
    return Evaluation(collect(split, scores, label_map=label_map), time.perf_counter() - start)


def collect(split: Split, scores: Iterable[Array], *, label_map: Sequence[int] | None = None) -> StageOutputs:
    """Join the class scores of consecutive batches of ``split``."""
    labels = split.labels if label_map is None else np.asarray(label_map, dtype=np.int64)[split.labels]
    return StageOutputs(ids=split.ids, labels=labels, logits=np.concatenate(list(scores)).astype(np.float32))


def map_labels(dataset: Dataset, model_labels: Sequence[str]) -> list[int]:
    """Return the model's class index for each class of the dataset, matched by name.

    Raises:
        DataError: The dataset has a class that the model does not know, or that several of its outputs are named for.
    """
    index = {label: position for position, label in enumerate(model_labels)}
    strangers = [name for name in dataset.classes if name not in index]
    if strangers:
        raise DataError(
            f"{dataset.name} has classes that the model does not know: {', '.join(strangers[:5])}.",
            hint=f"The model's labels are {', '.join(list(model_labels)[:5])}, ...",
        )
    ambiguous = [name for name in dataset.classes if list(model_labels).count(name) > 1]
    if ambiguous:
        raise DataError(f"Several of the model's outputs are named {', '.join(ambiguous[:5])}.")
    return [index[name] for name in dataset.classes]


def median_latency_ms(call: Callable[[], object], *, warm_up: int = 5, repeats: int = 30) -> float:
    """Return the median wall time of ``call`` in milliseconds."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
