from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq.dynamic_ranges import (
    DynamicRanges,
    parse_calibration_cache,
    parse_json,
    read_ranges,
    write_ranges,
)

HEADER = "TRT-8601-EntropyCalibration2"
POSITIVE_FLOAT32 = st.floats(0, exclude_min=True, width=32, allow_infinity=False)
LINE_NAMES = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name == name.strip()
)


def read(tmp_path: Path, text: str) -> DynamicRanges:
    path = tmp_path / "ranges"
    path.write_bytes(text.encode())
    return read_ranges(path)


@given(st.dictionaries(LINE_NAMES, POSITIVE_FLOAT32, min_size=1, max_size=5))
def test_scales_survive_both_formats_bit_for_bit(scales: dict[str, float]) -> None:
    ranges = DynamicRanges({name: np.float32(scale) for name, scale in scales.items()})
    assert parse_json(ranges.to_json()) == ranges
    assert parse_calibration_cache(ranges.to_calibration_cache()) == ranges
    assert DynamicRanges.from_amax(ranges.amax) == ranges


@given(POSITIVE_FLOAT32)
def test_amax_is_the_exact_product(scale: float) -> None:
    from fractions import Fraction

    assert Fraction(DynamicRanges({"x": np.float32(scale)}).amax["x"]) == Fraction(scale) * 127


def test_known_hex_of_tensorrt(tmp_path: Path) -> None:
    """Two entries of published caches, with the ranges that they are known to mean."""
    ranges = read(tmp_path, f"{HEADER}\nimages: 3c008912\noutput: 4000889d\n")
    assert ranges.amax["images"] == pytest.approx(0.99634, rel=1e-5)
    assert ranges.amax["output"] == pytest.approx(255.059, rel=1e-5)
    assert DynamicRanges(ranges.scales).to_calibration_cache(header=HEADER) == (
        f"{HEADER}\nimages: 3c008912\noutput: 4000889d\n"
    )


def test_odd_lines_of_real_caches(tmp_path: Path) -> None:
    text = f"{HEADER}\r\n(Unnamed Layer* 7) [Convolution]_output: 3c010a14\r\nweird: name: 3c008912\nshort: 89d"
    ranges = read(tmp_path, text)
    assert list(ranges.scales) == ["(Unnamed Layer* 7) [Convolution]_output", "weird: name", "short"]
    assert ranges.scales["short"] == struct.unpack(">f", bytes.fromhex("0000089d"))[0]


def test_scales_that_are_none_are_kept_apart(tmp_path: Path) -> None:
    lines = ["x: 3c008912", "(Unnamed Layer* 64) [Shuffle]_output: 0", "366: 00000000", "mask: 7f800000", "n: 7fc00000"]
    ranges = read(tmp_path, "\n".join([HEADER, *lines, "minus: bc008912"]))
    assert list(ranges.scales) == ["x"]
    assert list(ranges.unusable) == ["(Unnamed Layer* 64) [Shuffle]_output", "366", "mask", "n", "minus"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_other_ends_of_lines(tmp_path: Path, mark: str, end: str) -> None:
    assert set(read(tmp_path, f"{mark}{HEADER}{end}x: 3c008912{end}").scales) == {"x"}
    assert set(read(tmp_path, mark + '{"format": 1, "ranges": {"y": 1.0}}' + end).scales) == {"y"}


@pytest.mark.parametrize(
    "header",
    [
        "TRT-8601-MinMaxCalibration",
        "TRT-101600-EntropyCalibration2",
        "TRT-7-LegacyCalibration",
        "TRT-8XXX-EntropyCalibration2 ",
        "TRT-8.6.1-EntropyCalibration2",
    ],
)
def test_headers_of_other_calibrators(tmp_path: Path, header: str) -> None:
    assert set(read(tmp_path, f"{header}\nx: 3c008912\n").scales) == {"x"}


def test_json_takes_amax_and_min_max(tmp_path: Path) -> None:
    ranges = read(tmp_path, '{"format": 1, "ranges": {"a": 254, "b": [-3.0, 127], "c": [-12.7, 1], "d": [1, 2.54]}}')
    assert ranges.amax == pytest.approx({"a": 254, "b": 127, "c": 12.7, "d": 2.54})
    assert ranges.scales["a"] == 2


@given(st.lists(POSITIVE_FLOAT32, min_size=1, max_size=5))
def test_scales_of_weights_survive_json(scales: list[float]) -> None:
    ranges = DynamicRanges({"x": np.float32(1)}, {"w": np.float32(scales), "v": np.float32(scales[0])})
    assert parse_json(ranges.to_json()) == ranges
    assert parse_json(ranges.to_json()) != DynamicRanges(ranges.scales)


def test_a_cache_says_that_it_drops_scales_of_weights(caplog: pytest.LogCaptureFixture) -> None:
    ranges = DynamicRanges({"x": np.float32(1)}, {"w": np.float32([1, 2])})
    assert parse_calibration_cache(ranges.to_calibration_cache()) == DynamicRanges(ranges.scales)
    assert "cannot hold the scales of 1 weights" in caplog.text


def test_write_goes_by_the_name(tmp_path: Path) -> None:
    ranges = DynamicRanges.from_amax({"x": 1.5, "y": 0.1})
    for name, first in (("r.json", "{"), ("r.cache", "TRT-100300-EntropyCalibration2")):
        write_ranges(ranges, tmp_path / name)
        assert (tmp_path / name).read_text().startswith(first)
        assert read_ranges(tmp_path / name) == ranges
    assert json.loads((tmp_path / "r.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\nx: 3c008912\n", "begins with 'hello'"),
        ("1\nx: 3c008912\n", "begins with '1'"),
        (HEADER, "no dynamic ranges"),
        (f"{HEADER}\nx 3c008912\n", "Line 2 is not"),
        (f"{HEADER}\nx: 3c008912\ny: 3c00891200\n", "Line 3 is not"),
        (f"{HEADER}\nx: -c008912\n", "Line 2 is not"),
        (f"{HEADER}\nx: 0x3c0089\n", "Line 2 is not"),
        (f"{HEADER}\nx: 3c_08912\n", "Line 2 is not"),
        (f"{HEADER}\n: 3c008912\n", "Line 2 is not"),
        (f"{HEADER}\nx: \n", "Line 2 is not"),
        (f"{HEADER}\nx: 3c008912\nx: 3c008912\n", "Line 3: tensor 'x' has a range already"),
        (f"{HEADER}\nx: 7fc00000\n", "Line 2: the scale of tensor 'x' is nan"),
        (f"{HEADER}\nx: 7f800000\n", "Line 2: the scale of tensor 'x' is inf"),
        (f"{HEADER}\nx: 0\n", "Line 2: the scale of tensor 'x' is 0.0"),
        (f"{HEADER}\nx: bc008912\n", "Line 2: the scale of tensor 'x' is -0.0078"),
        ("{", "Not valid JSON"),
        ('{"x": 1.0}', r"keys are \['x'\]"),
        ('{"format": 1, "ranges": [1]}', "Unexpected JSON"),
        ('{"format": 2, "ranges": {"x": 1}}', "Format 2 is not known"),
        ('{"format": true, "ranges": {"x": 1}}', "Format True is not known"),
        ('{"format": 1, "ranges": {}}', "no dynamic ranges"),
        ('{"format": 1, "ranges": {"": 1}}', "no tensor name"),
        ('{"format": 1, "ranges": {"x": 1, "x": 2}}', "'x' comes twice"),
        ('{"format": 1, "ranges": {"x": 1}, "weights": [1]}', "Unexpected JSON"),
        ('{"format": 1, "ranges": {"x": 1}, "weights": {"w": [1, 0]}}', "scales of weight 'w'"),
        ('{"format": 1, "ranges": {"x": 1}, "weights": {"w": []}}', "scales of weight 'w'"),
        ('{"format": 1, "ranges": {"x": 1}, "weights": {"w": [[1]]}}', "not a list of numbers"),
        ('{"format": 1, "ranges": {"x": 1}, "weights": {"w": ["1"]}}', "expected a number"),
        ('{"format": 1, "ranges": {"x": 0}}', "'x' is 0.0"),
        ('{"format": 1, "ranges": {"x": -1}}', "'x' is -0.0078"),
        ('{"format": 1, "ranges": {"x": NaN}}', "'x' is nan"),
        ('{"format": 1, "ranges": {"x": Infinity}}', "'x' is inf"),
        ('{"format": 1, "ranges": {"x": 1e60}}', "'x' is inf"),
        ('{"format": 1, "ranges": {"x": 1e-60}}', "'x' is 0.0"),
        ('{"format": 1, "ranges": {"x": [-1, NaN]}}', "min must not be above its max"),
        ('{"format": 1, "ranges": {"x": [2, 1]}}', "min must not be above its max"),
        ('{"format": 1, "ranges": {"x": [1]}}', r"expected a number or \[min, max\]"),
        ('{"format": 1, "ranges": {"x": "1"}}', "expected a number"),
        ('{"format": 1, "ranges": {"x": true}}', "expected a number"),
        ('{"format": 1, "ranges": {"x": null}}', "expected a number"),
        ('{"format": 1, "ranges": {"x": 1' + "0" * 400 + "}}", "too large"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "ranges") in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="cannot be read"):
        read_ranges(tmp_path / "missing")
    with pytest.raises(QuantizationError, match="cannot be read"):
        read_ranges(tmp_path)
    (tmp_path / "plan").write_bytes(b"\xff\xfe\x00ftrt")
    with pytest.raises(QuantizationError, match="not UTF-8 text"):
        read_ranges(tmp_path / "plan")


def test_what_a_cache_cannot_hold() -> None:
    with pytest.raises(QuantizationError, match="cannot hold the name"):
        DynamicRanges.from_amax({"two\nlines": 1.0}).to_calibration_cache()
    with pytest.raises(QuantizationError, match="no header"):
        DynamicRanges.from_amax({"x": 1.0}).to_calibration_cache(header="8.6")


def test_ranges_do_not_change() -> None:
    given = {"x": np.float32(1)}
    ranges = DynamicRanges(given)
    given["y"] = np.float32(2)
    assert set(ranges.scales) == {"x"}
    with pytest.raises(TypeError):
        ranges.scales["x"] = np.float32(3)  # type: ignore[index]
