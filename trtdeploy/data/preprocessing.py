"""The one implementation of image preprocessing, and the specification that travels with every artifact.

Training writes the specification; the ONNX metadata, the plan's manifest and the Triton config carry it; training,
evaluation and validation all apply it here. Nothing else in the project touches pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtdeploy.errors import DataError, UsageError, invalid_fields
from trtdeploy.files import sha256_bytes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64 << 20
"""Larger images are refused before they are decoded: a few kilobytes can claim gigabytes of pixels."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")
"""Pillow's other decoders are never tried: some of them start programs (EPS) or fail in ways of their own."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {"RGB": "RGB", "BGR": "RGB", "L": "L"}


class Preprocessing(BaseModel):
    """From an image file to one model input: resize, centre crop, scale by 1/255, subtract mean, divide by std.

    Attributes:
        resize: Pixels of the shorter side (the aspect ratio is kept), or (height, width).
        crop: (height, width) cut from the centre after the resize; None keeps all.
        interpolation: Pillow's filter; it widens its support when it shrinks an image (antialiasing).
        colour: Order of the channels that the model expects.
        mean: Subtracted per channel from values in [0, 1].
        std: Divides per channel, after the mean.
        layout: Order of the axes of one batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    colour: Literal["RGB", "BGR", "L"] = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    version: Literal[1] = Field(default=1, description="of this specification's format")

    @model_validator(mode="after")
    def _consistent(self) -> Preprocessing:
        channels = 1 if self.colour == "L" else 3
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"colour {self.colour} needs {channels} values of mean and std")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        sizes = (self.resize,) if isinstance(self.resize, int) else self.resize
        if min(sizes) < 1 or (self.crop is not None and min(self.crop) < 1):
            raise ValueError("sizes must be at least 1 pixel")
        if isinstance(self.resize, int) and self.crop is None:
            raise ValueError("resizing the shorter side leaves images of different shapes: give a crop")
        if self.crop is not None:
            height, width = (self.resize,) * 2 if isinstance(self.resize, int) else self.resize
            if self.crop[0] > height or self.crop[1] > width:
                raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self

    @classmethod
    def square(cls, size: int) -> Preprocessing:
        """Return the default of this project: shorter side and centre crop to ``size`` pixels, ImageNet statistics."""
        return cls(resize=size, crop=(size, size))

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read what ``to_json`` wrote.

        Raises:
            UsageError: It is not a preprocessing specification, or one of a newer format.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"Not a preprocessing specification ({invalid_fields(error)}).") from error

    @classmethod
    def read(cls, path: Path) -> Preprocessing:
        """Read a file that holds what ``to_json`` wrote.

        Raises:
            UsageError: It holds something else.
            OSError: It cannot be read.
        """
        try:
            return cls.from_json(path.read_text())
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is no preprocessing specification: it is no text.") from error
        except UsageError as error:
            raise UsageError(f"{path}: {error.message}") from error

    def to_json(self) -> str:
        """Return one line of JSON, equal for equal specifications."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this specification."""
        return sha256_bytes(self.to_json().encode())[:16]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one model input without the batch axis."""
        height, width = self._size
        return (self._channels, height, width) if self.layout == "NCHW" else (height, width, self._channels)

    @property
    def _size(self) -> tuple[int, int]:
        if self.crop is not None:
            return self.crop
        assert not isinstance(self.resize, int)  # the validator refuses it
        return self.resize

    @property
    def _channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop one image to ``(height, width, channels)`` bytes.

        Raises:
            DataError: The image is truncated, cannot be decoded, or is so narrow that resizing would make it huge.
        """
        try:
            if image.mode.startswith("I"):  # 16 bits per grey level, which ``convert`` clips instead of scaling
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert(_MODES[self.colour])
            width, height = image.size
            if isinstance(self.resize, int):
                shorter = min(width, height)
                new_size = (round(width * self.resize / shorter), round(height * self.resize / shorter))
            else:
                new_size = (self.resize[1], self.resize[0])
            if new_size[0] * new_size[1] > MAX_PIXELS:
                raise DataError(
                    f"The image of {width}x{height} pixels would be resized to {new_size[0]}x{new_size[1]}; "
                    f"at most {MAX_PIXELS} pixels are handled."
                )
            if new_size != image.size:
                image = image.resize(new_size, _FILTERS[self.interpolation])
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"The image cannot be decoded: {error}.") from error
        array = np.asarray(image, dtype=np.uint8)
        if array.ndim == 2:
            array = array[:, :, np.newaxis]
        if self.colour == "BGR":
            array = array[:, :, ::-1]
        height, width = self._size
        top = (array.shape[0] - height) // 2
        left = (array.shape[1] - width) // 2
        return array[top : top + height, left : left + width]

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn a batch of bytes ``(N, height, width, channels)`` into model input, float32 in ``layout``."""
        scale = np.float32(1) / (np.float32(255) * np.asarray(self.std, np.float32))
        offset = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        batch = pixels.astype(np.float32) * scale - offset
        if self.layout == "NCHW":
            batch = batch.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(batch)

    def __call__(self, images: Sequence[Image.Image | bytes]) -> NDArray[np.float32]:
        """Turn images, or the bytes of image files, into one batch of model input.

        Raises:
            DataError: An image is truncated, of an unknown format or absurdly large.
        """
        if not images:
            raise DataError("An empty list of images makes no batch.")
        decoded = [open_image(image) if isinstance(image, bytes) else image for image in images]
        return self.normalise(np.stack([self.pixels(image) for image in decoded]))


def open_image(content: bytes) -> Image.Image:
    """Decode the bytes of one image file.

    Raises:
        DataError: They are no image of one of ``FORMATS``, a truncated one, or one of more than ``MAX_PIXELS`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"The image claims {image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded.")
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"These {len(content)} bytes are no {', '.join(FORMATS)} image.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"The image cannot be decoded: {error}.") from error
    return image


def describe(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return what reports show of a specification."""
    return {**preprocessing.model_dump(mode="json"), "digest": preprocessing.digest}
