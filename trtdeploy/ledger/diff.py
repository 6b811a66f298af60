"""Which stage lost the accuracy, and on which samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from trtdeploy.errors import LedgerError, UsageError
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.ledger.ledger import Ledger, Stage
from trtdeploy.ledger.outputs import StageOutputs
from trtdeploy.statistics import PairedDifference


class Flip(FrozenModel):
    """A sample that the two sides answer differently; classes are indices of the model's outputs."""

    id: str
    label: int
    reference: int
    answer: int


class Comparison(FrozenModel):
    """One stage against another, or against the same stage of another ledger.

    Attributes:
        reference: The side that is compared with, for example ``float``.
        stage: The side that is judged.
        agreement: Percent of samples with the same answer.
        difference: Paired difference of accuracies, ``stage`` minus ``reference``.
        loss_shown: The interval of the difference lies below 0 and the loss exceeds the threshold.
        flips: How many samples are answered differently.
        flipped: The first of them: lost ones, then gained ones, then those that are wrong on both sides.
    """

    reference: str
    stage: str
    agreement: float
    difference: PairedDifference
    loss_shown: bool
    flips: int
    flipped: tuple[Flip, ...]


class LedgerDiff(FrozenModel):
    """What ``diff_stages`` and ``diff_ledgers`` found; ``lost_at`` is the first stage with a shown loss, if any."""

    threshold: float
    comparisons: tuple[Comparison, ...]
    lost_at: str | None

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        for comparison in self.comparisons:
            if comparison.loss_shown:
                change = comparison.difference
                return (
                    f"{comparison.stage} lost the accuracy: {change.difference.format()} points against "
                    f"{comparison.reference} ({change.lost} lost, {change.gained} gained of {change.n}; "
                    f"exact McNemar p = {change.mcnemar_p:.2g})."
                )
        more = f" of more than {self.threshold:g} points" if self.threshold else ""
        return f"No loss{more} is shown."


def diff_stages(
    ledger: Ledger,
    *,
    start: Stage | None = None,
    end: Stage | None = None,
    threshold: float = 0.0,
    limit: int = 10,
) -> LedgerDiff:
    """Compare every stage with the one before it; with ``start`` or ``end``, compare the one with the other only.

    Args:
        ledger: At least two stages.
        start: The reference; the first recorded stage if only ``end`` is given.
        end: The stage that is judged; the last recorded stage if only ``start`` is given.
        threshold: Losses up to so many percentage points are not named.
        limit: How many flipped samples to list for each comparison.

    Raises:
        UsageError: There are not two stages, or both are the same.
        LedgerError: A stage is not recorded, or its outputs were changed afterwards.
    """
    stages = list(ledger.stages)
    if len(stages) < 2:
        raise UsageError(f"{ledger.path} has {len(stages)} stage(s) ({', '.join(stages)}); a difference needs two.")
    if start is None and end is None:
        pairs = list(pairwise(stages))
    else:
        pairs = [(start or stages[0], end or stages[-1])]
        if pairs[0][0] == pairs[0][1]:
            raise UsageError(f"Stage {pairs[0][0]!r} would be compared with itself; give --from and --to.")
    outputs = {stage: ledger.outputs(stage) for pair in pairs for stage in pair}
    return _diff([(a, b, outputs[a], outputs[b]) for a, b in pairs], threshold, limit)


def diff_ledgers(
    reference: Ledger, other: Ledger, *, stage: Stage | None = None, threshold: float = 0.0, limit: int = 10
) -> LedgerDiff:
    """Compare every stage that two ledgers have in common, or ``stage`` only; the second ledger is judged.

    Raises:
        UsageError: They have no stage in common.
        LedgerError: The ledgers saw different samples.
    """
    common = [name for name in reference.stages if name in other.stages and stage in (None, name)]
    if not common:
        raise UsageError(
            f"{reference.path} has the stages {', '.join(reference.stages)} and {other.path} has "
            f"{', '.join(other.stages)}; expected {stage or 'one'} in both."
        )
    first, second = _names(reference.path, other.path)
    rows = [
        (f"{name} of {first}", f"{name} of {second}", reference.outputs(name), other.outputs(name)) for name in common
    ]
    return _diff(rows, threshold, limit)


def compare_outputs(
    reference_name: str,
    name: str,
    reference: StageOutputs,
    outputs: StageOutputs,
    *,
    threshold: float = 0.0,
    limit: int = 10,
) -> Comparison:
    """Compare the answers of two stages.

    Raises:
        LedgerError: The samples are not the same.
    """
    try:
        difference = outputs.compared_with(reference)
    except LedgerError as error:
        raise LedgerError(f"{name} cannot be compared with {reference_name}: {error}") from error
    flips = np.flatnonzero(outputs.predictions != reference.predictions)
    # lost first: 0 where only the reference is right, 1 where only the other is, 2 where both are wrong
    rank = np.where(reference.correct[flips], 0, np.where(outputs.correct[flips], 1, 2))
    shown = flips[np.argsort(rank, kind="stable")][:limit]
    return Comparison(
        reference=reference_name,
        stage=name,
        agreement=outputs.agreement(reference),
        difference=difference,
        loss_shown=difference.difference.high < 0 and -difference.difference.value > threshold,
        flips=len(flips),
        flipped=tuple(
            Flip(
                id=outputs.ids[index],
                label=int(outputs.labels[index]),
                reference=int(reference.predictions[index]),
                answer=int(outputs.predictions[index]),
            )
            for index in shown
        ),
    )


def _diff(rows: Sequence[tuple[str, str, StageOutputs, StageOutputs]], threshold: float, limit: int) -> LedgerDiff:
    if threshold < 0 or limit < 0:
        raise UsageError(f"--threshold {threshold:g} and --limit {limit} must not be negative.")
    comparisons = tuple(compare_outputs(*row, threshold=threshold, limit=limit) for row in rows)
    lost = next((item.stage for item in comparisons if item.loss_shown), None)
    return LedgerDiff(threshold=threshold, comparisons=comparisons, lost_at=lost)


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Return how two files are told apart: by their names, or by their whole paths where those are the same."""
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))
