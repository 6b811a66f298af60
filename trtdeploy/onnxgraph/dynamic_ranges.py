"""Dynamic ranges per tensor, as JSON or as the text of TensorRT's calibration caches.

A calibration cache begins with ``TRT-<version>-EntropyCalibration2`` (or another calibrator) and has a line
``name: 3c010a14`` per tensor: the scale, amax / 127, as a big-endian IEEE 754 float32 in hexadecimal digits. The format
is read by ONNX Runtime (tensorrt_execution_provider_utils.h, ReadDynamicRange) and Model Optimizer
(calib_utils.import_scales_from_calib_cache).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtdeploy.errors import QuantizationError
from trtdeploy.tensors import Array

INT8_MAX = 127
_HEADER = "TRT-"
_CALIBRATOR = "EntropyCalibration2"


@dataclass(frozen=True)
class DynamicRanges:
    """What INT8 covers of each tensor, symmetric around zero.

    Attributes:
        scales: Scale by tensor name, float32: the code 127 stands for 127 times the scale.
        weight_scales: Scales of weights by name, one per output channel, where they are not those of the largest
            absolute value: after quantization-aware training for example. A calibration cache has no room for them.
    """

    scales: Mapping[str, np.float32]
    weight_scales: Mapping[str, Array] = field(default_factory=dict)

    @property
    def amax(self) -> dict[str, float]:
        """Largest absolute value that each tensor's codes can stand for."""
        return {name: float(scale) * INT8_MAX for name, scale in self.scales.items()}

    @classmethod
    def from_amax(cls, amax: Mapping[str, float], *, source: str = "the ranges") -> DynamicRanges:
        """Make ranges from largest absolute values.

        Raises:
            QuantizationError: One is not a finite positive number.
        """
        scales = {}
        for name, value in amax.items():
            scales[name] = _checked(np.float32(value / INT8_MAX), name, source)
        return cls(scales)

    def to_json(self) -> str:
        """Return the ranges as JSON."""
        content: dict[str, Any] = {"format": 1, "ranges": self.amax}
        if self.weight_scales:
            # a float32 times 127 is exact in the float64 of JSON: dividing again gives the same bits
            weights = {name: [float(value) * INT8_MAX for value in scale] for name, scale in self.weight_scales.items()}
            content["weights"] = weights
        return json.dumps(content, indent=1) + "\n"

    def to_calibration_cache(self, *, tensorrt_version: str = "101600") -> str:
        """Return the ranges as TensorRT's calibration cache; scales survive bit by bit."""
        lines = [f"{_HEADER}{tensorrt_version}-{_CALIBRATOR}"]
        lines += [f"{name}: {struct.pack('>f', float(scale)).hex()}" for name, scale in self.scales.items()]
        return "\n".join(lines) + "\n"


def read_ranges(path: str | Path) -> DynamicRanges:
    """Read JSON or a calibration cache, told apart by their content.

    JSON is ``{"format": 1, "ranges": {"tensor": amax}}`` or has ``[min, max]`` in place of amax, of which the larger
    absolute value counts; ``"weights"``, if it is there, has a list per weight tensor, one amax per output channel.

    Raises:
        QuantizationError: The file cannot be read, has neither format, or has a range that is not finite and positive.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizationError(f"The dynamic ranges {path} cannot be read: {error}.") from error
    if text.startswith(_HEADER):
        return _from_cache(text, str(path))
    if text.lstrip().startswith("{"):
        return _from_json(text, str(path))
    raise QuantizationError(
        f"{path} has no dynamic ranges: it is neither JSON nor begins with {_HEADER!r}, as calibration caches do.",
        hint='JSON looks like {"format": 1, "ranges": {"input": 2.64}}.',
    )


def _from_cache(text: str, path: str) -> DynamicRanges:
    scales: dict[str, np.float32] = {}
    for number, line in enumerate(text.splitlines()[1:], start=2):
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        try:
            # some writers drop leading zeros
            scale = struct.unpack(">f", bytes.fromhex(digits.strip().rjust(8, "0")))[0]
        except (ValueError, struct.error):
            separator = ""
            scale = 0.0
        if not separator or not name:
            raise QuantizationError(f"{path}, line {number}: {line!r} is not 'name: 8 hexadecimal digits'.")
        if name in scales:
            raise QuantizationError(f"{path}, line {number}: tensor {name!r} has two ranges.")
        scales[name] = _checked(np.float32(scale), name, f"{path}, line {number}")
    return _not_empty(DynamicRanges(scales), path)


def _from_json(text: str, path: str) -> DynamicRanges:
    try:
        content = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise QuantizationError(f"The dynamic ranges {path} are not JSON: {error}.") from error
    weights = content.get("weights", {})
    known = {"format", "ranges", "weights"}
    if (
        content.get("format") != 1
        or not isinstance(content.get("ranges"), dict)
        or not isinstance(weights, dict)
        or not set(content) <= known
    ):
        raise QuantizationError(f'{path} is not {{"format": 1, "ranges": {{...}}, "weights": {{...}}}}.')
    amax = {}
    for name, value in content["ranges"].items():
        ends = value if isinstance(value, list) else [value]
        if not 1 <= len(ends) <= 2 or not all(
            isinstance(end, int | float) and not isinstance(end, bool) for end in ends
        ):
            raise QuantizationError(f"{path}: the range of {name!r} is {value!r}, not a number or [min, max].")
        amax[name] = max(abs(end) for end in ends)
    ranges = DynamicRanges.from_amax(amax, source=path)
    return _not_empty(DynamicRanges(ranges.scales, _weight_scales(weights, path)), path)


def _weight_scales(weights: dict[str, Any], path: str) -> dict[str, Array]:
    scales = {}
    for name, values in weights.items():
        if not isinstance(values, list) or not values or not all(isinstance(value, int | float) for value in values):
            raise QuantizationError(f"{path}: the ranges of weights {name!r} are not a list of numbers.")
        scales[name] = np.array([_checked(np.float32(value / INT8_MAX), name, path) for value in values], np.float32)
    return scales


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} occurs twice")
        content[name] = value
    return content


def _checked(scale: np.float32, name: str, where: str) -> np.float32:
    if not math.isfinite(scale) or scale <= 0:
        raise QuantizationError(
            f"{where}: the range of {name!r} is {scale * INT8_MAX:g}; it must be finite and positive."
        )
    return scale


def _not_empty(ranges: DynamicRanges, path: str) -> DynamicRanges:
    if not ranges.scales:
        raise QuantizationError(f"{path} has no range in it.")
    return ranges
