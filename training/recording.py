"""Score a stage on a split and record it in the accuracy ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoints.checkpoint import CheckpointFacts
from trtdeploy.data import Dataset
from trtdeploy.ledger import Ledger, Stage
from trtdeploy.ledger.evaluation import Evaluation, Progress, evaluate, map_labels, median_latency_ms
from trtdeploy.tensors import Array

_BATCH = 128


def score_split(
    predict: Callable[[Array], Array],
    facts: CheckpointFacts,
    dataset: Dataset,
    *,
    split: str = "test",
    progress: Progress | None = None,
) -> Evaluation:
    """Run a network over a split of ``dataset``, whose classes are matched to the network's by name.

    Raises:
        DataError: The network does not know a class, or an image cannot be read.
        LedgerError: An answer is not finite.
    """
    return evaluate(
        predict,
        dataset.split(split),
        facts.preprocessing,
        label_map=map_labels(dataset, facts.labels),
        batch_size=_BATCH,
        progress=progress,
    )


def record(
    ledger: Path,
    stage: Stage,
    evaluation: Evaluation,
    *,
    predict: Callable[[Array], Array],
    facts: CheckpointFacts,
    dataset: Dataset,
    file: Path,
    sha256: str,
    command: str,
    device: str,
) -> dict[str, Any]:
    """Record a stage's answers and the median latency of one image, on ``device``; return the record as JSON.

    Raises:
        LedgerError: The ledger holds other samples.
    """
    split = dataset.split("test")
    image = facts.preprocessing.normalise(split.pixels(facts.preprocessing, [0]))
    recorded = Ledger(ledger).record(
        stage,
        evaluation.outputs,
        seconds=evaluation.seconds,
        source={"file": str(file), "sha256": sha256, "command": command, "device": device}
        | _calibration(facts)
        | _layers(facts),
        dataset={"name": Path(dataset.name).name, "fingerprint": dataset.fingerprint},
        latency_ms=round(median_latency_ms(lambda: predict(image)), 4),
    )
    return recorded.model_dump(mode="json")


def _calibration(facts: CheckpointFacts) -> dict[str, str]:
    """Say which images the ranges are from."""
    calibration = facts.calibration
    if calibration is None:
        return {}
    known = {
        "calibration_ids_sha256": calibration.image_ids_sha256,
        "calibration_pixels_sha256": calibration.pixels_sha256,
    }
    return {name: digest for name, digest in known.items() if digest is not None}


def _layers(facts: CheckpointFacts) -> dict[str, Any]:
    """Say how many layers are in INT8, and which are not, of a quantized network."""
    return {} if facts.layers is None else {"layers": facts.layers.summary()}


def has_stage(ledger: Path, stage: Stage) -> bool:
    """Say whether a ledger exists and holds a stage.

    Raises:
        LedgerError: The file is no ledger.
    """
    return ledger.exists() and stage in Ledger(ledger).stages
