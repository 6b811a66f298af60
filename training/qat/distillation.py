"""Distillation: the student learns from the answers of a float teacher, beside the labels or instead of them.

Source: Hinton et al., "Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531, section 2: the
divergence of the two softmax distributions at a temperature T, times T squared, which keeps the size of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from training.checkpoints.checkpoint import Checkpoint, CheckpointFacts, DevMetrics
from training.loop.objective import EVALUATION_BATCH, LabelObjective
from training.predict import predictor
from trtdeploy.data import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import UsageError
from trtdeploy.ledger.evaluation import evaluate


class DistillationSettings(BaseModel):
    """How much the teacher counts.

    Attributes:
        weight: Share of the teacher in the loss; at 1 the labels are not read.
        temperature: Divides the logits of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0)

    @property
    def needs_labels(self) -> bool:
        """Whether the labels count at all."""
        return self.weight < 1


def check_teacher(teacher: Checkpoint, student: CheckpointFacts) -> None:
    """Refuse a teacher that cannot be asked about the student's batches.

    Raises:
        UsageError: It is quantized, or its labels or its preprocessing are others.
    """
    facts = teacher.facts
    if facts.kind != "float":
        raise UsageError(f"--teacher {teacher.path} is a {facts.kind} checkpoint; a teacher is a float one.")
    if facts.labels != student.labels:
        raise UsageError(
            f"--teacher {teacher.path} scores other classes than the student, or in another order: "
            f"{', '.join(facts.labels[:5])} instead of {', '.join(student.labels[:5])}."
        )
    if facts.preprocessing != student.preprocessing:
        raise UsageError(
            f"--teacher {teacher.path} takes its images otherwise than the student: {facts.preprocessing} instead of "
            f"{student.preprocessing}.",
            hint="Teacher and student see the same batches, so they must agree on size and normalisation.",
        )


class Distillation:
    """An objective with a teacher.

    Args:
        teacher: A float network; it is put into evaluation mode and never trained.
        settings: How much it counts.
        label_map: The model's class index for each class of the dataset; not read where only the teacher counts.
        label_smoothing: Of the labels.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: DistillationSettings,
        label_map: Sequence[int],
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        self._teacher = teacher.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._settings = settings
        self._labels = LabelObjective(label_map, label_smoothing=label_smoothing)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted: Tensor = self._teacher(images)
        divergence = divergence_at(logits, wanted, self._settings.temperature)
        if not self._settings.needs_labels:
            return divergence
        weight = self._settings.weight
        return weight * divergence + (1 - weight) * self._labels.loss(logits, images, labels)

    def score(self, model: nn.Module, split: Split, preprocessing: Preprocessing) -> DevMetrics:
        """Score by the labels; where only the teacher counts, by how often and how closely the two agree."""
        if self._settings.needs_labels:
            return self._labels.score(model, split, preprocessing)
        answers, wanted = (
            torch.from_numpy(
                evaluate(predictor(network), split, preprocessing, batch_size=EVALUATION_BATCH).outputs.logits
            )
            for network in (model, self._teacher)
        )
        agreement = (answers.argmax(dim=1) == wanted.argmax(dim=1)).double().mean()
        return DevMetrics(
            top1=100 * float(agreement),
            loss=float(divergence_at(answers, wanted, 1.0)),
            n=len(split),
            against="teacher",
        )


def divergence_at(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence (Kullback-Leibler, in nats) from the wanted answers, times the temperature squared."""
    own, others = (nn.functional.log_softmax(values.float() / temperature, dim=1) for values in (logits, wanted))
    return nn.functional.kl_div(own, others, log_target=True, reduction="batchmean") * temperature**2
