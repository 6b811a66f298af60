"""Small random changes to the pixels of training images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class Augmentation(BaseModel):
    """What is changed at random in each training image.

    Attributes:
        shift_px: Largest displacement in pixels along each axis; what moves in is filled with the nearest edge pixel.
        flip: Mirror half of the images left to right. Off by default: a mirrored digit is another sign.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift_px: int = Field(default=0, ge=0)
    flip: bool = False

    def __call__(self, pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        """Change a batch of ``(N, height, width, channels)`` bytes; the input is left as it is."""
        count, height, width, _ = pixels.shape
        if self.shift_px:
            margin = self.shift_px
            padded = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
            corners = generator.integers(0, 2 * margin + 1, size=(count, 2))
            pixels = np.stack(
                [padded[i, top : top + height, left : left + width] for i, (top, left) in enumerate(corners)]
            )
        if self.flip:
            mirrored = generator.random(count) < 0.5
            pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
        return pixels
