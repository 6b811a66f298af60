"""What the answers of a target are held against: an ONNX file that is run here, or stages of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.classifiers import onnx_classifier
from trtdeploy.datasets.dataset import Split
from trtdeploy.errors import UsageError
from trtdeploy.evaluation import evaluate
from trtdeploy.ledger import Ledger, StageOutputs
from trtdeploy.onnxgraph.source import load_source
from trtdeploy.preprocessing import Preprocessing
from trtdeploy.tensors import DYNAMIC, Array
from trtdeploy.validation.options import ValidationOptions
from trtdeploy.validation.target import Target

_REFERENCE_BATCH = 32


@dataclass(frozen=True)
class Comparison:
    """What the answers are held against: the baseline of the accuracy, and the reference of the single answers."""

    baseline: dict[str, Any] | None
    baseline_outputs: StageOutputs | None
    reference: str | None
    expected: StageOutputs | None


def find_comparison(
    target: Target,
    options: ValidationOptions,
    ledger: Ledger | None,
    split: Split,
    preprocessing: Preprocessing,
    label_map: Sequence[int] | None,
) -> Comparison:
    """Find what to hold the answers against: an ONNX file that is run here, or stages of the ledger."""
    recorded = ledger.stages if ledger is not None and ledger.path.exists() else {}
    baseline: dict[str, Any] | None = None
    baseline_outputs: StageOutputs | None = None
    reference: str | None = None
    expected: StageOutputs | None = None
    if options.reference is not None:
        reference = options.reference.name
        expected = _reference_outputs(options.reference, target.labels, split, preprocessing, label_map)
        baseline = {"name": reference, "top1": expected.top1.value}
        baseline_outputs = expected
    elif ledger is not None and "onnx" in recorded:
        reference = "onnx stage"
        expected = ledger.outputs("onnx")
    if ledger is not None and "float" in recorded:
        baseline = {"name": "float stage", "top1": recorded["float"].top1.value}
        baseline_outputs = ledger.outputs("float")
    return Comparison(baseline, baseline_outputs, reference, expected)


def _reference_outputs(
    path: Path,
    labels: tuple[str, ...] | None,
    split: Split,
    preprocessing: Preprocessing,
    label_map: Sequence[int] | None,
) -> StageOutputs:
    """Run an ONNX file over the split; its class scores come in the order of ``labels``."""
    source = load_source(path)
    predict = onnx_classifier(path)
    own = source.labels
    if labels is None or own is None or own == labels:
        in_order = predict
    elif sorted(own) == sorted(labels):
        columns = [own.index(label) for label in labels]

        def in_order(batch: Array) -> Array:
            return predict(batch)[:, columns]

    else:
        raise UsageError(f"The labels of {path.name} are not those of the model: the two cannot be compared.")
    batch_size = source.inputs[0].shape[0] if source.inputs[0].shape else 1
    return evaluate(
        in_order,
        split,
        preprocessing,
        label_map=label_map,
        batch_size=_REFERENCE_BATCH if batch_size == DYNAMIC else batch_size,
    ).outputs
