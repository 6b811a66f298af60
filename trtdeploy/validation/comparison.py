"""What the answers of a target are held against: an ONNX file or a plan run here, or stages of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdeploy.data.dataset import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.engine import Engine
from trtdeploy.errors import UsageError
from trtdeploy.ledger import Ledger, StageOutputs
from trtdeploy.ledger.evaluation import evaluate
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.plan import manifest_path
from trtdeploy.tensors import DYNAMIC, Array
from trtdeploy.validation.classifiers import onnx_classifier, plan_classifier
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
    preprocessing: Preprocessing | None,
    label_map: Sequence[int] | None,
) -> Comparison:
    """Find what to hold the answers against: an ONNX file or a plan that is run here, or stages of the ledger."""
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
    preprocessing: Preprocessing | None,
    label_map: Sequence[int] | None,
) -> StageOutputs:
    """Run an ONNX file or a plan over the split; its class scores come in the order of ``labels``."""
    with _opened(path) as reference:
        known = preprocessing or reference.preprocessing
        if known is None:
            raise UsageError(
                f"Nothing says how images become the input of {path.name}.", hint="Give --preprocessing FILE.json."
            )
        return evaluate(
            _in_order(reference, path.name, labels),
            split,
            known,
            label_map=label_map,
            batch_size=reference.batch_size,
        ).outputs


@dataclass(frozen=True)
class _Reference:
    predict: Callable[[Array], Array]
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    batch_size: int


@contextmanager
def _opened(path: Path) -> Iterator[_Reference]:
    if manifest_path(path).exists():
        with Engine.load(path) as engine:
            manifest = engine.manifest
            first = engine.inputs[0]
            size = first.shape[0] if first.shape else 1
            covered = [profile[first.name].max[0] for profile in manifest.profiles if first.name in profile]
            batch = max(covered, default=_REFERENCE_BATCH) if size == DYNAMIC else size
            yield _Reference(
                plan_classifier(engine), manifest.labels, manifest.preprocessing, min(_REFERENCE_BATCH, batch)
            )
        return
    source = load_source(path)
    size = source.inputs[0].shape[0] if source.inputs[0].shape else 1
    batch = _REFERENCE_BATCH if size == DYNAMIC else size
    yield _Reference(onnx_classifier(path), source.labels, source.preprocessing, batch)


def _in_order(reference: _Reference, name: str, labels: tuple[str, ...] | None) -> Callable[[Array], Array]:
    """Return what predicts with the classes in the order of ``labels``."""
    own = reference.labels
    if labels is None or own is None or own == labels:
        return reference.predict
    if sorted(own) != sorted(labels):
        raise UsageError(f"The labels of {name} are not those of the model: the two cannot be compared.")
    columns = [own.index(label) for label in labels]
    return lambda batch: reference.predict(batch)[:, columns]
