"""The whole validation of a target: checks, answers, comparison, gates, ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtdeploy.data.dataset import Dataset, Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ShapeError, UsageError
from trtdeploy.ledger import Ledger, StageOutputs
from trtdeploy.ledger.evaluation import Progress, map_labels, median_latency_ms
from trtdeploy.statistics import NonInferiority, non_inferiority, percentile
from trtdeploy.tensors import DYNAMIC
from trtdeploy.validation.classes import check_classes, check_reference, scores_of_one
from trtdeploy.validation.comparison import Comparison, find_comparison
from trtdeploy.validation.consistency import Consistency, compare_versions, measure_instances
from trtdeploy.validation.invariance import measure_variation
from trtdeploy.validation.options import Gate, ValidationOptions, ValidationReport
from trtdeploy.validation.send_split import Answers, ask
from trtdeploy.validation.target import ServerTimes, Target
from trtdeploy.validation.top_k import compare_top_k

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Examination:
    """A validation with everything that it was computed from, for a report.

    Attributes:
        report: The outcome.
        split: The samples that were sent.
        classes: The model's class names, in the order of its scores; numbers where it has no labels.
        answers: What the target answered, and when.
        expected: What the answers were compared with, if anything.
        server_times: Where the server says that the time went, if it says so.
    """

    report: ValidationReport
    split: Split
    classes: tuple[str, ...]
    answers: Answers
    expected: StageOutputs | None
    server_times: ServerTimes | None


def validate(
    target: Target,
    dataset: Dataset,
    options: ValidationOptions,
    *,
    ledger: Ledger | None = None,
    others: Sequence[Target] = (),
    progress: Progress | None = None,
) -> ValidationReport:
    """Send the test split of a dataset to a target and check what comes back; see ``examine``."""
    return examine(target, dataset, options, ledger=ledger, others=others, progress=progress).report


def examine(
    target: Target,
    dataset: Dataset,
    options: ValidationOptions,
    *,
    ledger: Ledger | None = None,
    others: Sequence[Target] = (),
    progress: Progress | None = None,
) -> Examination:
    """Send the test split of a dataset to a target and check what comes back.

    Args:
        target: Who is asked.
        dataset: Labelled images.
        options: What to check.
        ledger: Where to record the target's stage. Its ``float`` stage is the baseline of the drop, and its ``onnx``
            stage is what answers are compared with, where there is no ``reference``.
        others: Other versions of it, which are asked for the same samples afterwards.
        progress: Called with (samples done, samples in all).

    Returns:
        The report and what it was computed from; a gate that does not hold is in it, not raised.

    Raises:
        ServerError: The server does not answer, or died meanwhile. The ledger is as it was.
        UsageError: A gate was asked for without anything to compare with.
        ShapeError: The target does not take batches of these images.
        ModelError: The target's labels are not as many as its scores.
        DataError: An image cannot be read, or the dataset's classes are not the model's, or more than it scores.
        LedgerError: An answer is not finite, or the ledger belongs to other samples.
    """
    preprocessing = options.preprocessing or target.preprocessing
    recorded = ledger.stages if ledger is not None and ledger.path.exists() else {}
    _check_comparable(options, float_stage="float" in recorded, onnx_stage="onnx" in recorded)
    label_map = map_labels(dataset, target.labels) if target.labels is not None else None
    split = dataset.split("test")
    for asked in (target, *others):
        if asked.score_count is not None:
            check_classes(asked, asked.score_count, dataset)
        _check_interface(asked, preprocessing, options.batch_size)
    _check_versions(target, others, options)
    # first of all: the very first answer is a cold one
    variation = (
        measure_variation(target, split, preprocessing, concurrency=options.concurrency)
        if options.max_variation is not None
        else None
    )
    instances = measure_instances(target, split, preprocessing) if options.max_instance_difference is not None else None
    # alone, before the load: what one caller sees, comparable with the other stages of the ledger
    one = target.prepare(split, preprocessing, [0])
    counts = [scores_of_one(asked, one) for asked in (target, *others)]
    for asked, count in zip((target, *others), counts, strict=True):
        check_classes(asked, count, dataset)
    latency_ms = median_latency_ms(lambda: target.scores(one))
    against = find_comparison(target, options, ledger, split, preprocessing, label_map)
    check_reference(target, counts[0], against.reference, against.expected)

    def answers_of(asked: Target) -> Answers:
        return ask(
            asked,
            split,
            preprocessing,
            label_map=map_labels(dataset, asked.labels) if asked.labels is not None else None,
            batch_size=options.batch_size,
            concurrency=options.concurrency,
            progress=progress,
        )

    before, by_version = target.server_totals(), target.answered_by()
    answers = answers_of(target)
    after, by_version = target.server_totals(), target.answered_by() - by_version
    versions = tuple(compare_versions(other.version, answers.outputs, answers_of(other).outputs) for other in others)
    found = Consistency(variation, instances, versions)
    report = _report(target, answers, against, options, found).model_copy(update={"answered_by": dict(by_version)})
    if ledger is not None:
        ledger.record(
            target.stage,
            answers.outputs,
            seconds=answers.seconds,
            source=target.source,
            dataset={"name": Path(dataset.name).name, "fingerprint": dataset.fingerprint},
            latency_ms=latency_ms,
            answered_by=by_version,
        )
    scored = answers.outputs.logits.shape[1]
    return Examination(
        report=report,
        split=split,
        classes=target.labels if target.labels is not None else tuple(map(str, range(scored))),
        answers=answers,
        expected=against.expected,
        server_times=after.since(before) if before is not None and after is not None else None,
    )


def _shown_drop(outputs: StageOutputs, baseline: StageOutputs, max_drop: float) -> NonInferiority:
    """Test non-inferiority on the samples that only one of the two answers correctly."""
    outputs.agreement(baseline)  # refuses other samples
    right = outputs.predictions == outputs.labels
    was_right = baseline.predictions == baseline.labels
    return non_inferiority(
        int((right & ~was_right).sum()), int((~right & was_right).sum()), len(right), max_drop=max_drop
    )


def _check_comparable(options: ValidationOptions, *, float_stage: bool, onnx_stage: bool) -> None:
    """Refuse a gate that has nothing to compare with, before anything is sent."""
    if options.prove_drop and not (options.max_drop is not None and 0 < options.max_drop < 100):
        raise UsageError(
            "--prove-drop needs a --max-drop between 0 and 100 percentage points.",
            hint="No finite number of samples shows that nothing at all was lost.",
        )
    if options.max_drop is not None and options.reference is None and not float_stage:
        raise UsageError(
            "--max-drop needs something to drop from.",
            hint="Give --reference MODEL.onnx, or a --ledger with a float stage.",
        )
    if options.min_agreement is not None and options.reference is None and not onnx_stage:
        raise UsageError(
            "--min-agreement needs something to agree with.",
            hint="Give --reference MODEL.onnx, or a --ledger with an onnx stage.",
        )


def _check_interface(target: Target, preprocessing: Preprocessing | None, batch_size: int) -> None:
    """Refuse a target that does not take one batch of these images, before anything is sent."""
    wanted = target.input.shape
    given = (batch_size, *target.sample_shape(preprocessing))
    if len(wanted) != len(given) or any(size not in (DYNAMIC, have) for size, have in zip(wanted, given, strict=True)):
        raise ShapeError(f"{target.name} takes {target.input}; the preprocessed images have shape {list(given)}.")
    if wanted[0] not in (DYNAMIC, 1):
        raise ShapeError(
            f"{target.name} takes exactly {wanted[0]} samples per request, and the last request may have fewer.",
            hint="Export the model with a dynamic batch, or with a batch of 1.",
        )
    if target.max_batch_size is not None and batch_size > target.max_batch_size:
        raise ShapeError(f"{target.name} takes at most {target.max_batch_size} samples per request, not {batch_size}.")


def _check_versions(target: Target, others: Sequence[Target], options: ValidationOptions) -> None:
    """Refuse a comparison of versions with nothing, or with itself."""
    if options.min_version_agreement is not None and not others:
        raise UsageError(
            "--min-version-agreement needs another version to agree with.", hint="Give --compare-version V."
        )
    if target.version in [other.version for other in others]:
        raise UsageError(
            f"Version {target.version} of {target.name} would be compared with itself.",
            hint="Name the version that is validated: --version V.",
        )


def _report(
    target: Target, answers: Answers, against: Comparison, options: ValidationOptions, found: Consistency
) -> ValidationReport:
    top1 = answers.outputs.top1
    agreement = answers.outputs.agreement(against.expected) if against.expected is not None else None
    drop = against.baseline["top1"] - top1.value if against.baseline is not None else None
    gates = []
    if options.max_drop is not None and drop is not None:
        # percentages are rounded: a drop of exactly the limit passes
        within = drop <= options.max_drop + _ROUNDING
        gates.append(Gate(name="top-1 drop", value=drop, limit=options.max_drop, passed=within))
    if options.max_drop is not None and options.prove_drop and against.baseline_outputs is not None:
        shown = _shown_drop(answers.outputs, against.baseline_outputs, options.max_drop)
        gates.append(Gate(name="top-1 drop, shown", value=-shown.lower, limit=options.max_drop, passed=shown.shown))
    if options.min_agreement is not None and agreement is not None:
        gates.append(
            Gate(
                name="agreement",
                value=agreement,
                limit=options.min_agreement,
                passed=agreement >= options.min_agreement - _ROUNDING,
            )
        )
    variation = max(found.variation.values()) if found.variation is not None else None
    if options.max_variation is not None and variation is not None:
        within = variation <= options.max_variation + _ROUNDING
        gates.append(Gate(name="variation", value=variation, limit=options.max_variation, passed=within))
    if options.max_instance_difference is not None and found.instances is not None:
        limit, largest = options.max_instance_difference, found.instances.largest
        within = found.instances.differing == 0 or (limit > 0 and largest <= limit + _ROUNDING)
        gates.append(Gate(name="instances", value=largest, limit=limit, passed=within))
    for other in found.versions if options.min_version_agreement is not None else ():
        limit = options.min_version_agreement or 0.0
        within = other.agreement >= limit - _ROUNDING
        name = f"agreement with version {other.version}"
        gates.append(Gate(name=name, value=other.agreement, limit=limit, passed=within))
    n = len(answers.outputs.ids)
    return ValidationReport(
        name=target.name,
        version=target.version,
        n=n,
        top1=top1,
        baseline=against.baseline,
        drop=drop,
        reference=against.reference,
        agreement=agreement,
        variation=variation,
        variation_by_cause=found.variation,
        instances=found.instances,
        versions=found.versions,
        top_k=compare_top_k(answers.outputs, against.expected, target.top_k) if target.top_k is not None else None,
        latency_ms={f"p{q:g}": percentile(answers.latencies_ms.tolist(), q) for q in PERCENTILES},
        throughput_per_s=n / answers.seconds,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        gates=tuple(gates),
    )
