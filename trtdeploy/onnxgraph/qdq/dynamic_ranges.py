"""Dynamic ranges per tensor: read from and written to JSON and TensorRT's calibration-cache text."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from trtdeploy.errors import QuantizationError
from trtdeploy.files import atomic_write
from trtdeploy.tensors import Array

logger = logging.getLogger(__name__)

INT8_BOUND = 127
"""A range of +-amax has the scale amax / 127: code 127 stands for amax."""

FORMAT = 1
_HEADER = re.compile(r"TRT-\d+-\w+Calibration\w*")
# other exporters write something in place of the version (Paddle2ONNX "8XXX"); the lines mean the same
_READ_HEADER = re.compile(r"TRT-[\w.]+-\w+")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True)
class DynamicRanges:
    """Symmetric INT8 ranges of tensors.

    The float32 scale is what is kept, because it is what Q/DQ and the calibration cache hold; ``amax`` follows from it
    exactly, as a Python float has the bits for the product with 127.

    Attributes:
        scales: Step between two INT8 codes, by tensor name; float32, finite and positive.
        weight_scales: The same of weights, by name, where it is not amax / 127: float32 of shape (output channels,), or
            () per tensor. Fine-tuning with fixed scales (QAT) leaves such; a calibration cache has no room for them.
        unusable: Scales of 0, infinity, NaN or below 0 in a calibration cache, by tensor name. TensorRT writes them
            for tensors without a range, such as shapes; they matter only where a layer needs one.
    """

    scales: Mapping[str, np.float32]
    weight_scales: Mapping[str, Array] = field(default_factory=dict)
    unusable: Mapping[str, np.float32] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scales:
            raise QuantizationError("There are no dynamic ranges; at least one tensor needs one.")
        with np.errstate(over="ignore", under="ignore"):
            scales = {name: np.float32(scale) for name, scale in self.scales.items()}
        for name, value in scales.items():
            if not name:
                raise QuantizationError("A dynamic range has no tensor name.")
            if not np.isfinite(value) or value <= 0:
                raise QuantizationError(
                    f"The INT8 scale of tensor {name!r} is {value} in float32; it must be finite and greater than 0.",
                    hint="A range of 0, or one of infinity or NaN, comes from a dead layer or a broken calibration.",
                )
        with np.errstate(over="ignore", under="ignore"):
            weights = {name: np.array(scale, np.float32) for name, scale in self.weight_scales.items()}
        for name, scale in weights.items():
            if scale.ndim > 1 or not scale.size or not np.isfinite(scale).all() or not (scale > 0).all():
                raise QuantizationError(
                    f"The INT8 scales of weight {name!r} must be one, or one per channel, finite and greater than 0."
                )
            scale.setflags(write=False)
        object.__setattr__(self, "scales", MappingProxyType(scales))
        object.__setattr__(self, "weight_scales", MappingProxyType(weights))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DynamicRanges):
            return NotImplemented
        return self.scales == other.scales and _bits(self.weight_scales) == _bits(other.weight_scales)

    __hash__ = None  # type: ignore[assignment]  # as of any mapping

    @classmethod
    def from_amax(cls, amax: Mapping[str, float]) -> DynamicRanges:
        """Make ranges from the largest absolute value of each tensor.

        Raises:
            QuantizationError: There is none, or one is not finite and positive.
        """
        return cls({name: _scale(value) for name, value in amax.items()})

    @property
    def amax(self) -> dict[str, float]:
        """The largest absolute value that INT8 holds, by tensor name: ``127 * scale``, exactly."""
        return {name: float(scale) * INT8_BOUND for name, scale in self.scales.items()}

    def to_json(self) -> str:
        """Return ``{"format": 1, "ranges": {name: amax}}``, with ``"weights"`` if there are any.

        The scales survive it bit for bit.
        """
        content: dict[str, Any] = {"format": FORMAT, "ranges": self.amax}
        if self.weight_scales:
            content["weights"] = {
                name: (scale.astype(np.float64) * INT8_BOUND).tolist() for name, scale in self.weight_scales.items()
            }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def to_calibration_cache(self, *, header: str = "TRT-100300-EntropyCalibration2") -> str:
        """Return TensorRT's text: a header, then ``name: hex`` with the big-endian float32 scale, always 8 digits.

        TensorRT 10 refuses a cache whose header names another version or algorithm than its own.

        Raises:
            QuantizationError: The header has not TensorRT's form, or a name cannot stand on a line.
        """
        if not _HEADER.fullmatch(header):
            raise QuantizationError(
                f"{header!r} is no header of a calibration cache.", hint="Expected: TRT-100300-EntropyCalibration2"
            )
        unfit = [name for name in self.scales if name != name.strip() or "\n" in name or "\r" in name]
        if unfit:
            raise QuantizationError(f"A calibration cache has one tensor a line and cannot hold the name {unfit[0]!r}.")
        if self.weight_scales:
            logger.warning(
                "a calibration cache cannot hold the scales of %d weights; quantized from it, these get amax / 127",
                len(self.weight_scales),
            )
        lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in self.scales.items()]
        return "\n".join([header, *lines]) + "\n"


def read_ranges(path: str | Path) -> DynamicRanges:
    """Read a file of dynamic ranges, JSON or calibration-cache text; its content says which.

    JSON: ``{"format": 1, "ranges": {name: amax or [min, max]}}``. Of ``[min, max]`` the larger absolute value counts,
    as in TensorRT's symmetric quantization. ``"weights"``, if it is there, has an amax, or a list of one per output
    channel, for weights whose scale is not the one of their largest value.

    Raises:
        QuantizationError: The file cannot be read, is neither format, or holds a range that is none.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise QuantizationError(f"The dynamic ranges {source} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{source} is no file of dynamic ranges: it is not UTF-8 text.", hint=_HINT) from error
    first_line = text.split("\n", 1)[0].strip()
    try:
        if text.lstrip().startswith("{"):
            return parse_json(text)
        if _READ_HEADER.fullmatch(first_line):
            return parse_calibration_cache(text)
    except QuantizationError as error:
        raise QuantizationError(f"{source}: {error.message}", hint=error.hint) from error
    found = f"begins with {first_line[:60]!r}" if text.strip() else "is empty"
    raise QuantizationError(f"{source} is no file of dynamic ranges: it {found}.", hint=_HINT)


def write_ranges(ranges: DynamicRanges, path: str | Path) -> None:
    """Write ranges in one piece: JSON where the name ends in ``.json``, else calibration-cache text."""
    target = Path(path)
    atomic_write(target, ranges.to_json() if target.suffix == ".json" else ranges.to_calibration_cache())


def parse_json(text: str) -> DynamicRanges:
    """Read ranges from JSON text; see ``read_ranges``."""
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise QuantizationError(f"Not valid JSON: {error}.", hint=_HINT) from error
    weights = content.get("weights", {})
    if (
        set(content) - {"weights"} != {"format", "ranges"}
        or not isinstance(content["ranges"], dict)
        or not isinstance(weights, dict)
    ):
        raise QuantizationError(f"Unexpected JSON; its keys are {sorted(content)}.", hint=_HINT)
    if content["format"] != FORMAT or isinstance(content["format"], bool):
        raise QuantizationError(f"Format {content['format']!r} is not known; this version reads format {FORMAT}.")
    return DynamicRanges(
        {name: _scale(_json_amax(name, value)) for name, value in content["ranges"].items()},
        {name: _json_weights(name, value) for name, value in weights.items()},
    )


def parse_calibration_cache(text: str) -> DynamicRanges:
    """Read ranges from TensorRT's calibration-cache text.

    Sources of the format: ``ReadDynamicRange`` in ONNX Runtime's TensorRT provider and ModelOpt's
    ``import_scales_from_calib_cache``. Names may hold ": "; TAO's writer leaves out leading zeros of the digits.

    Raises:
        QuantizationError: A line is not ``name: hex``, a name comes twice, or no scale is finite and positive.
    """
    scales: dict[str, np.float32] = {}
    unusable: dict[str, np.float32] = {}
    refusal = ""
    for number, line in enumerate(text.split("\n")[1:], start=2):
        entry = line.rstrip("\r")
        if not entry.strip():
            continue
        name, separator, digits = entry.rpartition(": ")
        digits = digits.strip()
        if not separator or not name or not _HEX.fullmatch(digits):
            raise QuantizationError(f"Line {number} is not 'tensor name: up to 8 hex digits' but {entry[:80]!r}.")
        if name in scales or name in unusable:
            raise QuantizationError(f"Line {number}: tensor {name!r} has a range already.")
        scale = np.float32(struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0])
        if np.isfinite(scale) and scale > 0:
            scales[name] = scale
        else:
            unusable[name] = scale
            why = f"Line {number}: the scale of tensor {name!r} is {scale}; it must be finite and greater than 0."
            refusal = refusal or why
    if refusal and not scales:
        raise QuantizationError(refusal)
    return DynamicRanges(scales, unusable=unusable)


def _json_amax(name: str, value: Any) -> float:
    bounds = value if isinstance(value, list) else [value]
    numbers = [bound for bound in bounds if isinstance(bound, (int, float)) and not isinstance(bound, bool)]
    if len(numbers) != len(bounds) or (isinstance(value, list) and len(value) != 2):
        raise QuantizationError(f"The range of tensor {name!r} is {value!r}; expected a number or [min, max].")
    try:
        limits = [float(number) for number in numbers]
    except OverflowError as error:
        raise QuantizationError(f"The range of tensor {name!r} is too large for a float: {value}.") from error
    if len(limits) == 1:
        return limits[0]
    if not limits[0] <= limits[1]:  # a NaN is refused too
        raise QuantizationError(f"The range of tensor {name!r} is {value!r}; its min must not be above its max.")
    return max(abs(limit) for limit in limits)


def _json_weights(name: str, value: Any) -> Array:
    values = value if isinstance(value, list) else [value]
    scales = [_scale(_json_amax(name, amax)) for amax in values if not isinstance(amax, list)]
    if len(scales) != len(values):
        raise QuantizationError(f"The ranges of weight {name!r} are not a list of numbers, one per channel.")
    return np.array(scales if isinstance(value, list) else scales[0], np.float32)


def _bits(scales: Mapping[str, Array]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (scale.shape, scale.tobytes()) for name, scale in scales.items()}


def _scale(amax: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(amax / INT8_BOUND)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise QuantizationError(f"The name {name!r} comes twice.")
        content[name] = value
    return content


_HINT = (
    'Expected JSON, {"format": 1, "ranges": {"tensor": amax}}, or a calibration cache of TensorRT, whose first line is '
    "like TRT-100300-EntropyCalibration2."
)
