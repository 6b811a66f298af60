"""How a network is trained: length, learning rate, regularisation and seed."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from training.loop.augmentation import Augmentation


class Schedule(BaseModel):
    """How long, how fast and in which order training goes. Every field is part of what a resumed run must repeat.

    Attributes:
        epochs: Passes over the training split.
        max_steps: Ends training earlier; the learning rate reaches its end there too.
        batch_size: Images per step.
        learning_rate: Peak of AdamW's.
        weight_decay: AdamW's, on weights of more than one axis only (no batch norm, no biases).
        warm_up: Share of the steps over which the learning rate rises linearly from 0.
        final_share: Share of the peak at which the half cosine after the warm-up ends.
        label_smoothing: Probability mass spread over all classes.
        freeze_batch_norm_after: Share of the steps after which batch-norm statistics stay as they are.
        range_learning_rate: Peak of Adam's for the logarithms of learned ranges; it rises and falls like the other.
        regularise: Keep dropout and stochastic depth on.
        augmentation: What is changed at random in the images.
        seed: Of order, augmentation, dropout and fresh weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warm_up: float = Field(default=0.0, ge=0, lt=1)
    final_share: float = Field(default=0.01, ge=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    freeze_batch_norm_after: float = Field(default=1.0, ge=0, le=1)
    range_learning_rate: float = Field(default=0.005, gt=0)
    regularise: bool = True
    augmentation: Augmentation = Augmentation()
    seed: int = Field(default=0, ge=0)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, in a run of ``steps``."""
        warm_up_steps = round(self.warm_up * steps)
        if step < warm_up_steps:
            return self.learning_rate * (step + 1) / (warm_up_steps + 1)
        progress = (step - warm_up_steps) / max(1, steps - warm_up_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)
