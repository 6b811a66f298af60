"""What training minimises, and what a network is scored by on the dev split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from training.checkpoints.checkpoint import DevMetrics
from training.predict import predictor
from trtdeploy.data import Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.ledger.evaluation import evaluate

EVALUATION_BATCH = 128


class Objective(Protocol):
    """A loss for training and a score for choosing the best epoch."""

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch: logits ``(N, classes)``, images ``(N, C, H, W)``, labels ``(N,)``."""

    def score(self, model: nn.Module, split: Split, preprocessing: Preprocessing) -> DevMetrics:
        """Return how good the network is on a split; a higher ``top1`` is better, then a lower ``loss``."""


class LabelObjective:
    """Cross-entropy with the labels.

    Args:
        label_map: The model's class index for each class of the dataset.
        label_smoothing: Probability mass spread over all classes while training.
    """

    def __init__(self, label_map: Sequence[int], *, label_smoothing: float = 0.0) -> None:
        self._label_map = label_map
        self._label_smoothing = label_smoothing

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)

    def score(self, model: nn.Module, split: Split, preprocessing: Preprocessing) -> DevMetrics:
        return score(model, split, preprocessing, self._label_map)


def score(model: nn.Module, split: Split, preprocessing: Preprocessing, label_map: Sequence[int]) -> DevMetrics:
    """Return top-1 and mean cross-entropy of a network on a split.

    Raises:
        LedgerError: An answer is not finite.
    """
    outputs = evaluate(predictor(model), split, preprocessing, label_map=label_map, batch_size=EVALUATION_BATCH).outputs
    loss = nn.functional.cross_entropy(torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels))
    return DevMetrics(top1=outputs.top1.value, loss=float(loss), n=len(outputs.ids))
