"""The answers that a reader has to look at: certain, and not what was expected."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trtdeploy.ledger import StageOutputs
from trtdeploy.validation import Examination

SHOWN = 24
_IMAGE_SIDE = 256

Kind = Literal["lost", "won", "both wrong"]


class Disagreement(BaseModel):
    """One sample to which the model gave another answer than expected.

    Attributes:
        id: The sample's path in the dataset.
        kind: ``lost``: only the model is wrong; ``won``: only the reference is; ``both wrong``.
        label: The true class.
        expected: The reference's answer; the true class where there is no reference.
        answer: The model's answer.
        confidence: Softmax of the answer's score.
        margin: How much more of the softmax the answer has than what was expected.
        image: The image as a data URI, at most 256 pixels wide or high.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str
    kind: Kind
    label: str
    expected: str
    answer: str
    confidence: float
    margin: float
    image: str


def worst_disagreements(
    examination: Examination, classes: Sequence[str], *, at_most: int = SHOWN
) -> tuple[tuple[Disagreement, ...], int]:
    """Return the disagreements with the largest margin, worst first, and how many there are in all.

    With a reference, a disagreement is an answer other than the reference's; without one, a wrong answer.

    Args:
        examination: What was answered.
        classes: A name for every class that is true or was answered.
        at_most: How many to return.

    Raises:
        DataError: An image cannot be read.
    """
    outputs, reference = examination.answers.outputs, examination.expected
    expected = reference.predictions if reference is not None else outputs.labels
    answers = outputs.predictions
    shares = _softmax(outputs, len(classes))
    rows = np.arange(len(answers))
    margins = shares[rows, answers] - shares[rows, expected]
    different = np.flatnonzero(answers != expected)
    worst = different[np.argsort(-margins[different], kind="stable")][:at_most]
    return tuple(
        Disagreement(
            id=outputs.ids[row],
            kind=_kind(int(outputs.labels[row]), int(expected[row]), int(answers[row])),
            label=classes[outputs.labels[row]],
            expected=classes[expected[row]],
            answer=classes[answers[row]],
            confidence=float(shares[row, answers[row]]),
            margin=float(margins[row]),
            image=_data_uri(examination, int(row)),
        )
        for row in worst
    ), len(different)


def _kind(label: int, expected: int, answer: int) -> Kind:
    if answer == label:
        return "won"
    return "lost" if expected == label else "both wrong"


def _softmax(outputs: StageOutputs, classes: int) -> NDArray[np.float64]:
    """Return each class's share of a sample; a class that is not scored has none."""
    shifted = outputs.logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return np.pad(shares, ((0, 0), (0, max(0, classes - shares.shape[1]))))


def _data_uri(examination: Examination, row: int) -> str:
    image = examination.split.image(row).convert("RGB")
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    # small ones exactly, photographs as photographs
    kind = "PNG" if max(image.size) <= 64 else "JPEG"
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
