from __future__ import annotations

import io
import json
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from trtdeploy.data.preprocessing import MAX_PIXELS, Preprocessing, describe, open_image
from trtdeploy.errors import DataError, UsageError

GREY: dict[str, Any] = {"colour": "L", "mean": (0.0,), "std": (1.0,)}
RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
"""Mean and std that give the byte values back."""


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth gradients with noise on top, so that both JPEG and resizing have something to do."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    channels = [(x * 7 + y * 3) % 196, (x * 2 + y * 11) % 196, (x * y) % 196]
    return Image.fromarray((np.stack(channels, axis=-1) + noise).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG of a few dozen bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def reference(image: Image.Image, spec: Preprocessing) -> NDArray[np.float64]:
    """The specification once more, one sentence per line, in float64."""
    image = image.convert("L" if spec.colour == "L" else "RGB")
    if isinstance(spec.resize, int):
        factor = spec.resize / min(image.size)
        size = (round(image.width * factor), round(image.height * factor))
    else:
        size = (spec.resize[1], spec.resize[0])
    image = image.resize(size, getattr(Image.Resampling, spec.interpolation.upper()))
    if spec.crop is not None:
        left, top = (image.width - spec.crop[1]) // 2, (image.height - spec.crop[0]) // 2
        image = image.crop((left, top, left + spec.crop[1], top + spec.crop[0]))
    values = np.asarray(image).astype(np.float64) / 255
    values = values.reshape(image.height, image.width, -1)
    if spec.colour == "BGR":
        values = np.stack([values[..., 2], values[..., 1], values[..., 0]], axis=-1)
    for channel in range(values.shape[-1]):
        values[..., channel] = (values[..., channel] - spec.mean[channel]) / spec.std[channel]
    return np.moveaxis(values, -1, 0) if spec.layout == "NCHW" else values


@st.composite
def specifications(draw: st.DrawFn) -> Preprocessing:
    size = st.integers(1, 24)
    resize = draw(size | st.tuples(size, size))
    height, width = (resize, resize) if isinstance(resize, int) else resize
    crop = st.tuples(st.integers(1, height), st.integers(1, width))
    colour = draw(st.sampled_from(["RGB", "BGR", "L"]))
    channels = 1 if colour == "L" else 3
    return Preprocessing(
        resize=resize,
        crop=draw(crop if isinstance(resize, int) else crop | st.none()),
        interpolation=draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])),
        colour=colour,  # type: ignore[arg-type]
        mean=tuple(draw(st.lists(st.floats(0, 1), min_size=channels, max_size=channels))),
        std=tuple(draw(st.lists(st.floats(0.05, 2), min_size=channels, max_size=channels))),
        layout=draw(st.sampled_from(["NCHW", "NHWC"])),
    )


# --- the arithmetic ---


@given(spec=specifications(), width=st.integers(1, 60), height=st.integers(1, 60), mode=st.sampled_from(["RGB", "L"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_specification_gives_what_an_independent_implementation_gives(
    spec: Preprocessing, width: int, height: int, mode: str
) -> None:
    image = photo(width, height, mode)
    batch = spec([image])
    assert batch.shape == (1, *spec.sample_shape)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    expected = reference(image, spec)
    np.testing.assert_allclose(batch[0], expected, rtol=1e-6, atol=1e-6 / min(spec.std))


@given(spec=specifications(), width=st.integers(1, 60), height=st.integers(1, 60))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bytes_after_resize_and_crop_are_exactly_pillows(spec: Preprocessing, width: int, height: int) -> None:
    image = photo(width, height)
    exact = spec.model_copy(
        update={"mean": (0.0,) * len(spec.mean), "std": (1 / 255,) * len(spec.std), "layout": "NHWC"}
    )
    expected = np.rint(reference(image, exact)).astype(np.uint8)
    np.testing.assert_array_equal(spec.pixels(image), expected)


def test_the_default_is_imagenets() -> None:
    image = photo(300, 200)
    batch = Preprocessing.square(64)([image])
    assert batch.shape == (1, 3, 64, 64)
    values = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR).crop((16, 0, 80, 64))) / 255.0
    expected = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch[0], expected.transpose(2, 0, 1), atol=2e-6)


@pytest.mark.parametrize(
    ("size", "crop", "kept"),
    [
        ((10, 10), (4, 4), (slice(3, 7), slice(3, 7))),
        ((10, 11), (4, 4), (slice(3, 7), slice(3, 7))),
        ((7, 10), (4, 5), (slice(1, 5), slice(2, 7))),
        ((5, 5), (5, 5), (slice(0, 5), slice(0, 5))),
    ],
)
def test_the_crop_is_cut_from_the_centre(
    size: tuple[int, int], crop: tuple[int, int], kept: tuple[slice, slice]
) -> None:
    content = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    cropped = Preprocessing(resize=size, crop=crop, **GREY).pixels(Image.fromarray(content))
    np.testing.assert_array_equal(cropped[:, :, 0], content[kept])


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (100, 100), (33, 100), (1, 9)])
def test_the_shorter_side_is_resized_and_the_aspect_ratio_kept(width: int, height: int) -> None:
    image = photo(width, height)
    shorter = Preprocessing(resize=30, crop=(30, 30), **RAW)
    whole = Preprocessing(resize=(round(height * 30 / min(width, height)), round(width * 30 / min(width, height))))
    top, left = (whole.sample_shape[1] - 30) // 2, (whole.sample_shape[2] - 30) // 2
    np.testing.assert_array_equal(shorter.pixels(image), whole.pixels(image)[top : top + 30, left : left + 30])


def test_colours_come_in_the_order_that_was_asked_for() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    for colour, expected in (("RGB", [10, 20, 30]), ("BGR", [30, 20, 10])):
        spec = Preprocessing(resize=(4, 4), colour=colour, layout="NHWC", **RAW)  # type: ignore[arg-type]
        np.testing.assert_allclose(spec([image])[0, 0, 0], expected, atol=1e-4)


def test_images_of_different_sizes_files_and_objects_make_one_batch_in_order() -> None:
    images = [photo(40, 30, seed=1), photo(31, 64, seed=2), photo(32, 32, seed=3)]
    spec = Preprocessing.square(16)
    batch = spec([images[0], encoded(images[1], "PNG"), images[2]])
    for row, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(row, spec([image])[0])


def test_no_images_make_no_batch() -> None:
    with pytest.raises(DataError, match="empty"):
        Preprocessing.square(8)([])


# --- kinds of images ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("colour", ["RGB", "BGR", "L"])
def test_every_png_mode_gives_pillows_colours(mode: str, colour: str) -> None:
    image = photo(20, 20).convert(mode)
    values = {"colour": "L", "mean": (0.5,), "std": (0.5,)} if colour == "L" else {"colour": colour}
    spec = Preprocessing.model_validate({"resize": (12, 12), **values})
    np.testing.assert_allclose(spec([encoded(image, "PNG")])[0], reference(image, spec), atol=1e-5)


def test_a_transparent_palette_is_decoded() -> None:
    content = encoded(photo(20, 20).convert("P"), "PNG", transparency=0)
    assert Preprocessing.square(8)([content]).shape == (1, 3, 8, 8)


def test_cmyk_jpeg_is_converted() -> None:
    content = encoded(photo(32, 32).convert("CMYK"), "JPEG", quality=95)
    spec = Preprocessing(resize=(32, 32))
    assert open_image(content).mode == "CMYK"
    np.testing.assert_array_equal(
        spec.pixels(open_image(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    )


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_sixteen_bits_per_level_are_scaled_not_clipped(kind: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    content = encoded(Image.fromarray(levels * 257), kind)
    pixels = Preprocessing(resize=(16, 16), **GREY).pixels(open_image(content))
    np.testing.assert_array_equal(pixels[:, :, 0], levels)
    colour = Preprocessing(resize=(16, 16)).pixels(open_image(content))
    np.testing.assert_array_equal(colour, np.repeat(levels[:, :, np.newaxis], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM"])
def test_every_format_of_a_dataset_is_decoded(kind: str) -> None:
    content = encoded(photo(24, 24), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(Preprocessing(resize=(24, 24)).pixels(open_image(content)), expected)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\xff\xd8\xff", b"not an image", b"GIF89a" + b"\0" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"],
)
def test_what_is_no_image_is_named_so(content: bytes) -> None:
    with pytest.raises(DataError, match="image") as caught:
        open_image(content)
    assert "0x" not in caught.value.message


def test_postscript_is_never_interpreted() -> None:
    content = encoded(photo(8, 8), "EPS")
    with pytest.raises(DataError, match=f"{len(content)} bytes are no JPEG, PNG"):
        open_image(content)


# --- damage ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
    ],
    ids=["jpeg", "progressive", "jpeg444", "png", "bmp", "webp", "ppm"],
)
def test_an_image_cut_anywhere_is_refused_or_whole(kind: str, options: dict[str, Any]) -> None:
    content = encoded(photo(24, 20), kind, **options)
    spec = Preprocessing(resize=(20, 24))
    whole = spec.pixels(open_image(content))
    refused = 0
    for end in range(len(content)):
        try:
            image = open_image(content[:end])
        except DataError:
            refused += 1
        else:
            np.testing.assert_array_equal(spec.pixels(image), whole)
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM"])
def test_changed_bytes_are_decoded_or_refused_and_nothing_else(kind: str) -> None:
    content = encoded(photo(24, 20), kind)
    spec = Preprocessing(resize=8, crop=(8, 8))
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in random.integers(len(content), size=random.integers(1, 4)):
            damaged[position] = random.integers(256)
        try:
            batch = spec([bytes(damaged)])
        except DataError:
            continue
        assert batch.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("width", "height"),
    [(60_000, 60_000), (12_000, 10_000), (9_000, 9_000), (1, MAX_PIXELS + 1), (2**31 - 1, 1)],
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_header_that_claims_gigabytes_is_refused_whatever_warnings_do(width: int, height: int, action: Any) -> None:
    content = png_claiming(width, height)
    assert len(content) < 200
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(DataError, match=r"pixels"):
            open_image(content)


def test_a_thread_of_an_image_is_not_resized_to_gigabytes() -> None:
    image = Image.new("L", (1, 100_000))
    with pytest.raises(DataError, match="1x100000 pixels would be resized to 224x22400000"):
        Preprocessing.square(224).pixels(image)


def test_an_image_opened_lazily_and_truncated_is_refused() -> None:
    content = encoded(photo(64, 64), "JPEG")
    with pytest.raises(DataError, match="cannot be decoded"):
        Preprocessing.square(8)([Image.open(io.BytesIO(content[: len(content) // 2]))])


def test_decoding_in_threads_leaves_the_warning_filters_alone() -> None:
    content = encoded(photo(8, 8), "PNG")
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(lambda _: open_image(content), range(600)))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


# --- the specification itself ---


@given(spec=specifications())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_gives_the_same_specification_and_digest_back(spec: Preprocessing) -> None:
    again = Preprocessing.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.digest == spec.digest
    assert "\n" not in spec.to_json()


def test_the_digest_of_the_default_never_changes() -> None:
    # Written into artifacts: another digest would tell every user that preprocessing has changed.
    assert Preprocessing.square(224).to_json() == (
        '{"colour": "RGB", "crop": [224, 224], "interpolation": "bilinear", "layout": "NCHW", '
        '"mean": [0.485, 0.456, 0.406], "resize": 224, "std": [0.229, 0.224, 0.225], "version": 1}'
    )
    assert Preprocessing.square(224).digest == "54ed22e2b2f52c45"


def test_equal_specifications_have_equal_digests_however_they_are_spelt() -> None:
    spelt = '{"std": [1, 1, 1], "crop": [8, 8], "mean": [0, 0.0, 0], "resize": 8}'
    made = Preprocessing(resize=8, crop=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    assert Preprocessing.from_json(spelt).digest == made.digest


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 9},
        {"crop": (7, 8)},
        {"interpolation": "bicubic"},
        {"colour": "BGR"},
        {"mean": (0.485, 0.456, 0.4061)},
        {"std": (0.229, 0.224, 0.2251)},
        {"layout": "NHWC"},
    ],
)
def test_any_change_changes_the_digest(change: dict[str, Any]) -> None:
    base = Preprocessing.square(8)
    assert Preprocessing.model_validate({**base.model_dump(), **change}).digest != base.digest


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 2.2},
        {"version": 2},
        {"colour": "CMYK"},
        {"interpolation": "area"},
        {"layout": "CHW"},
        {"mean": [0.5]},
        {"std": [0.5, 0.5]},
        {"std": [0.1, 0, 0.1]},
        {"std": [0.1, -1, 0.1]},
        {"mean": [0, "NaN", 0]},
        {"resize": 0},
        {"resize": [0, 8], "crop": None},
        {"crop": [0, 8]},
        {"crop": [9, 8]},
        {"crop": None},
        {"resize": None},
    ],
    ids=str,
)
def test_a_specification_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    content = {**json.loads(Preprocessing.square(8).to_json()), **change}
    with pytest.raises(UsageError, match="Not a preprocessing specification"):
        Preprocessing.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"resize": 8, "crop": [8, 8], "std": [NaN, 1, 1]}'])
def test_text_that_is_no_specification_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="Not a preprocessing specification"):
        Preprocessing.from_json(text)


def test_a_specification_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Preprocessing.square(8).resize = 9


def test_reports_show_the_fields_and_the_digest() -> None:
    spec = Preprocessing.square(8)
    assert describe(spec) == {**json.loads(spec.to_json()), "digest": spec.digest}
