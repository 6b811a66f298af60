"""Small random changes to the pixels of training images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

_ALL = slice(None)


class Augmentation(BaseModel):
    """What is changed at random in each training image.

    Attributes:
        shift_px: Largest displacement in pixels along each axis; what moves in is filled with the nearest edge pixel.
        flip: Mirror half of the images left to right. Off by default: a mirrored digit is another sign.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift_px: int = Field(default=0, ge=0)
    flip: bool = False

    def __call__(
        self, pixels: NDArray[np.uint8], generator: np.random.Generator, *, part: slice = _ALL, of: int | None = None
    ) -> NDArray[np.uint8]:
        """Change a batch of ``(N, height, width, channels)`` bytes; the input is left as it is.

        Args:
            pixels: The batch, or a part of it.
            generator: Decides for the whole batch, so that its parts change as the whole would.
            part: Which samples of the batch these are.
            of: Samples in the whole batch; as many as there are here if None.
        """
        whole = len(pixels) if of is None else of
        height, width = pixels.shape[1:3]
        if self.shift_px:
            margin = self.shift_px
            padded = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
            corners = generator.integers(0, 2 * margin + 1, size=(whole, 2))[part]
            pixels = np.stack(
                [padded[i, top : top + height, left : left + width] for i, (top, left) in enumerate(corners)]
            )
        if self.flip:
            mirrored = generator.random(whole)[part] < 0.5
            pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
        return pixels
