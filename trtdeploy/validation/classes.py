"""Whether a target's scores, its labels and the classes of a dataset belong together."""

from __future__ import annotations

import numpy as np

from trtdeploy.data.dataset import Dataset
from trtdeploy.errors import DataError, ModelError, UsageError
from trtdeploy.ledger import StageOutputs
from trtdeploy.tensors import Array
from trtdeploy.validation.target import Target


def check_classes(target: Target, count: int, dataset: Dataset) -> None:
    """Refuse a target whose scores and labels are not as many, or a dataset with more classes than it scores.

    Args:
        target: Who is asked.
        count: How many classes it scores.
        dataset: What it is asked; without labels, class ``i`` of it is score ``i``.

    Raises:
        ModelError: There are more labels than scores, or fewer.
        DataError: There are more classes than scores.
    """
    if target.labels is not None and len(target.labels) != count:
        raise ModelError(
            f"{target.name} has {len(target.labels)} labels and scores {count} classes: which score is which class is "
            "not known.",
            hint="Build the plan from a model whose ONNX metadata names every class once, in the order of its scores.",
        )
    if len(dataset.classes) > count:
        raise DataError(
            f"{dataset.name} has {len(dataset.classes)} classes; {target.name} scores {count}.",
            hint="Is this the dataset of this model?",
        )


def check_reference(target: Target, count: int, name: str | None, expected: StageOutputs | None) -> None:
    """Refuse to compare with scores of other classes.

    Raises:
        UsageError: They are not as many.
    """
    if expected is not None and expected.logits.shape[1] != count:
        raise UsageError(
            f"{target.name} scores {count} classes, {name} {expected.logits.shape[1]}: the two cannot be compared.",
            hint="Give a --reference, or a --ledger, of the same model.",
        )


def scores_of_one(target: Target, one: Array) -> int:
    """Return how many classes a target scores: as its output says, else as it answers one sample.

    Raises:
        ServerError: It does not answer.
    """
    return target.score_count if target.score_count is not None else int(np.asarray(target.scores(one)).size)
