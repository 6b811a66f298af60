"""What one stage answered, sample by sample."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trtdeploy.errors import LedgerError
from trtdeploy.statistics import Interval, PairedDifference, compare_paired, softmax_kl, wilson_percent

_TOP = 5


class Divergence(BaseModel):
    """KL divergence of the softmax from a reference's over all samples, in nats: mean and 99th percentile."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    p99: float


@dataclass(frozen=True)
class StageOutputs:
    """What one stage answered.

    Attributes:
        ids: One identifier per sample, ``(N,)``.
        labels: The true class index of each sample, ``(N,)``.
        logits: The model's outputs, ``(N, classes)`` float32.
    """

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if 0 in (n, self.logits.size) or self.labels.shape != (n,) or self.logits.ndim != 2 or len(self.logits) != n:
            raise LedgerError(
                f"{n} ids, labels {list(self.labels.shape)} and logits {list(self.logits.shape)} do not belong "
                "together; expected N ids, N labels and N rows of class scores."
            )
        broken = int((~np.isfinite(self.logits)).any(axis=1).sum())
        if broken:
            raise LedgerError(
                f"The model's answer to {broken} of {n} samples is not finite (NaN or infinity): "
                "an accuracy computed from it would mean nothing.",
                hint="Look for a division by zero, an overflow in half precision, or a scale of 0.",
            )

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The class with the highest score, ``(N,)``."""
        predictions: NDArray[np.int64] = np.argmax(self.logits, axis=1).astype(np.int64)
        return predictions

    @property
    def top1(self) -> Interval:
        """Correct answers in percent, with the 95% Wilson interval."""
        return wilson_percent(int((self.predictions == self.labels).sum()), len(self.ids))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which samples were answered correctly, ``(N,)``."""
        correct: NDArray[np.bool_] = self.predictions == self.labels
        return correct

    @property
    def top5(self) -> Interval | None:
        """Samples whose class is among the five highest scores, in percent; None below six classes.

        Of equal scores the lower class comes first, as in ``predictions``.
        """
        if self.logits.shape[1] <= _TOP:
            return None
        best = np.argsort(-self.logits, axis=1, kind="stable")[:, :_TOP]
        return wilson_percent(int((best == self.labels[:, None]).any(axis=1).sum()), len(self.ids))

    def agreement(self, other: StageOutputs) -> float:
        """Percent of samples to which both stages give the same answer.

        Raises:
            LedgerError: The samples are not the same.
        """
        self._require_same_samples(other)
        return 100 * float((self.predictions == other.predictions).mean())

    def compared_with(self, reference: StageOutputs) -> PairedDifference:
        """Return the paired difference of accuracies: these answers minus those of ``reference``.

        Raises:
            LedgerError: The samples are not the same.
        """
        self._require_same_samples(reference)
        return compare_paired(reference.correct, self.correct)

    def divergence_from(self, reference: StageOutputs) -> Divergence:
        """Return the KL divergence of the softmax from that of ``reference``, in nats.

        Raises:
            LedgerError: The samples or the numbers of classes are not the same.
        """
        self._require_same_samples(reference)
        if self.logits.shape != reference.logits.shape:
            raise LedgerError(
                f"They score {self.logits.shape[1]} and {reference.logits.shape[1]} classes and cannot be compared."
            )
        divergence = softmax_kl(reference.logits, self.logits)
        return Divergence(mean=float(divergence.mean()), p99=float(np.percentile(divergence, 99)))

    def _require_same_samples(self, other: StageOutputs) -> None:
        if self.ids != other.ids or not np.array_equal(self.labels, other.labels):
            raise LedgerError(
                f"The stages saw different samples ({len(self.ids)} and {len(other.ids)}); they cannot be compared.",
                hint="Use the same dataset and split seed for every stage, or start a new ledger.",
            )

    def to_npz(self) -> bytes:
        """Serialize without pickle."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, ids=np.asarray(self.ids, dtype=np.str_), labels=self.labels, logits=self.logits)
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, content: bytes) -> StageOutputs:
        """Read what ``to_npz`` wrote.

        Raises:
            LedgerError: It is something else, or damaged; pickled objects are never loaded.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return cls(
                    ids=tuple(arrays["ids"].tolist()),
                    labels=arrays["labels"].astype(np.int64),
                    logits=arrays["logits"].astype(np.float32),
                )
        except LedgerError:
            raise
        except Exception as error:  # numpy and zipfile raise a dozen kinds on damaged bytes
            raise LedgerError(f"These {len(content)} bytes are not a stage's outputs: {error}.") from error


def top1_of(labels: Sequence[int] | NDArray[np.int64], predictions: Sequence[int] | NDArray[np.int64]) -> Interval:
    """Return correct answers in percent with the 95% Wilson interval."""
    return wilson_percent(int((np.asarray(labels) == np.asarray(predictions)).sum()), len(labels))
