from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trtdeploy.errors import DtypeError, InputNameError, ShapeError, UsageError
from trtdeploy.tensors import (
    BYTES,
    Array,
    ShapeRange,
    TensorSpec,
    ValueRange,
    check_inputs,
    dtype_from_onnx,
    dtype_from_triton,
    dtype_to_triton,
    format_shape,
    parse_shape_option,
    random_inputs,
)

IMAGE = TensorSpec(name="image", dtype="float32", shape=(-1, 3, 8, 8))
SUPPORTED = ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"]


def images(n: int = 2) -> Array:
    return np.random.default_rng(n).standard_normal((n, 3, 8, 8)).astype(np.float32)


def shape_range(low: int, best: int, high: int) -> ShapeRange:
    return ShapeRange(min=(low, 3, 8, 8), opt=(best, 3, 8, 8), max=(high, 3, 8, 8))


# --- data types ---


@pytest.mark.parametrize("name", SUPPORTED)
def test_onnx_codes_are_those_of_the_onnx_package(name: str) -> None:
    assert dtype_from_onnx(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))) == name


@pytest.mark.parametrize("name", SUPPORTED)
def test_triton_names_are_those_of_the_triton_client(name: str) -> None:
    client = pytest.importorskip("tritonclient.utils")
    assert dtype_to_triton(name) == client.np_to_triton_dtype(np.dtype(name))
    assert dtype_from_triton(dtype_to_triton(name)) == name


def test_data_types_that_nothing_here_can_carry_are_refused_by_name() -> None:
    with pytest.raises(DtypeError, match=str(onnx.TensorProto.STRING)):
        dtype_from_onnx(onnx.TensorProto.STRING)
    with pytest.raises(DtypeError, match="complex64"):
        dtype_to_triton("complex64")
    with pytest.raises(DtypeError, match="BF16"):
        dtype_from_triton("BF16")
    assert dtype_from_triton("BYTES") == BYTES
    with pytest.raises(DtypeError, match="bytes cannot be served"):  # not by an engine
        dtype_to_triton(BYTES)


def test_a_spec_refuses_unknown_types_and_keys_and_prints_its_dynamic_sizes() -> None:
    assert str(IMAGE) == "image float32[?, 3, 8, 8]"
    with pytest.raises(ValidationError, match="float33"):
        TensorSpec(name="x", dtype="float33", shape=(1,))
    with pytest.raises(ValidationError, match="layout"):
        TensorSpec.model_validate({"name": "x", "dtype": "int8", "shape": [1], "layout": "NCHW"})


def test_format_shape_of_a_scalar_is_empty_brackets() -> None:
    assert format_shape(()) == "[]"


# --- shape ranges and the --shape option ---


@st.composite
def ranges(draw: st.DrawFn) -> ShapeRange:
    sizes = draw(st.lists(st.lists(st.integers(1, 5000), min_size=3, max_size=3).map(sorted), min_size=1, max_size=5))
    low, best, high = zip(*sizes, strict=True)
    return ShapeRange(min=low, opt=best, max=high)


@given(name=st.text(min_size=1).filter(lambda text: "\n" not in text), range_=ranges())
@settings(deadline=None)
def test_what_a_range_prints_parses_back(name: str, range_: ShapeRange) -> None:
    assert parse_shape_option(f"{name}={range_}") == (name, range_)


@given(range_=ranges())
@settings(deadline=None)
def test_a_range_contains_its_own_corners_and_nothing_beyond(range_: ShapeRange) -> None:
    assert range_.contains(range_.min)
    assert range_.contains(range_.opt)
    assert range_.contains(range_.max)
    assert not range_.contains((range_.max[0] + 1, *range_.max[1:]))
    assert not range_.contains((range_.min[0] - 1, *range_.min[1:]))
    assert not range_.contains((*range_.opt, 1))
    assert not range_.contains(range_.opt[1:])


def test_one_shape_stands_for_all_three() -> None:
    assert parse_shape_option("in=put=1x3x8x8") == (
        "in=put",
        ShapeRange(min=(1, 3, 8, 8), opt=(1, 3, 8, 8), max=(1, 3, 8, 8)),
    )


@pytest.mark.parametrize(
    "text",
    ["", "x", "=1x3", "x=", "x=1x", "x=x3", "x=-1x3", "x=1x3:2x3", "x=1:2:3:4", "x=1,3", "x= 1", "x=1.0", "x=a:b:c"],
)
def test_other_forms_are_usage_errors_that_show_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shape_option(text)
    assert repr(text) in caught.value.message
    assert "Example: --shape" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x=0x3", "1 <= min <= opt <= max, got 0x3:0x3:0x3"),
        ("x=2:1:3", "1 <= min <= opt <= max, got 2:1:3"),
        ("x=1:4:3", "1 <= min <= opt <= max, got 1:4:3"),
        ("x=1x3:1:1", "same rank"),
    ],
)
def test_a_range_out_of_order_is_a_usage_error_that_says_which_rule_it_breaks(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)) as caught:
        parse_shape_option(text)
    assert repr(text) in caught.value.message
    assert "pydantic" not in str(caught.value)


@given(st.text(alphabet="ax=:0123456789٣- ", max_size=30) | st.text())
@settings(deadline=None)
def test_any_text_is_a_range_or_a_usage_error(text: str) -> None:
    try:
        name, range_ = parse_shape_option(text)
    except UsageError:
        return
    assert text.startswith(f"{name}=")
    assert all(1 <= low <= high for low, high in zip(range_.min, range_.max, strict=True))


def test_a_size_of_thousands_of_digits_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        parse_shape_option("x=" + "9" * 5000)


# --- inputs of an inference ---


def test_accepted_arrays_come_back_in_the_engines_order_without_a_copy() -> None:
    mask = TensorSpec(name="mask", dtype="bool", shape=(-1,))
    given_arrays = {"mask": np.ones(2, dtype=bool), "image": images()}
    checked = check_inputs(given_arrays, [IMAGE, mask])
    assert list(checked) == ["image", "mask"]
    assert np.shares_memory(checked["image"], given_arrays["image"])


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[::2],
        lambda array: array[:, :, ::-1],
        lambda array: np.asfortranarray(array),
        lambda array: array.transpose(0, 1, 3, 2),
    ],
    ids=["strided", "reversed", "fortran", "transposed"],
)
def test_non_contiguous_arrays_keep_their_values_and_become_contiguous(view: object) -> None:
    array = view(images(4))  # type: ignore[operator]
    assert not array.flags.c_contiguous
    checked = check_inputs({"image": array}, [IMAGE])["image"]
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, array)


def test_a_scalar_stays_a_scalar() -> None:
    spec = TensorSpec(name="temperature", dtype="float32", shape=())
    checked = check_inputs({"temperature": np.array(0.5, dtype=np.float32)}, [spec])["temperature"]
    assert checked.shape == ()
    assert checked == np.float32(0.5)


@pytest.mark.parametrize("names", [["imag"], [], ["image", "extra"]], ids=["misspelt", "missing", "one too many"])
def test_wrong_names_are_answered_with_both_lists(names: list[str]) -> None:
    with pytest.raises(InputNameError) as caught:
        check_inputs({name: images() for name in names}, [IMAGE])
    assert str(sorted(names)) in caught.value.message
    assert "takes ['image']" in caught.value.message


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32", "uint8", "bool", "complex64", "object"])
def test_another_data_type_is_refused_not_converted(dtype: str) -> None:
    with pytest.raises(DtypeError) as caught:
        check_inputs({"image": images().astype(dtype)}, [IMAGE])
    assert "'image'" in caught.value.message
    assert f"dtype {np.dtype(dtype)};" in caught.value.message
    assert "takes float32" in caught.value.message


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_the_conversion_that_the_hint_tells_works(dtype: str) -> None:
    spec = TensorSpec(name="x", dtype=dtype, shape=(3,))
    array = np.zeros(3, dtype="uint16")
    with pytest.raises(DtypeError) as caught:
        check_inputs({"x": array}, [spec])
    assert caught.value.hint is not None
    expression = caught.value.hint.removeprefix("Convert it: ").removesuffix(".")
    check_inputs({"x": eval(expression, {"array": array})}, [spec])


@pytest.mark.parametrize(
    "shape",
    [(3, 8, 8), (1, 3, 8, 8, 1), (1, 1, 8, 8), (1, 3, 8, 9), (192,), ()],
    ids=str,
)
def test_another_rank_or_size_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        check_inputs({"image": np.zeros(shape, np.float32)}, [IMAGE])
    assert f"'image' has shape {list(shape)}" in caught.value.message
    assert "takes [?, 3, 8, 8]" in caught.value.message


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"'image' has shape \[0, 3, 8, 8\], which is empty"):
        check_inputs({"image": np.zeros((0, 3, 8, 8), np.float32)}, [IMAGE])


@pytest.mark.parametrize(("n", "accepted"), [(1, True), (4, True), (5, False), (7, False), (8, True), (16, True)])
def test_one_of_the_profiles_must_cover_the_shape(n: int, accepted: bool) -> None:
    profiles = [{"image": shape_range(1, 2, 4)}, {"image": shape_range(8, 8, 16)}]
    if accepted:
        assert check_inputs({"image": images(n)}, [IMAGE], profiles)["image"].shape[0] == n
        return
    with pytest.raises(ShapeError) as caught:
        check_inputs({"image": images(n)}, [IMAGE], profiles)
    assert f"image=[{n}, 3, 8, 8]" in caught.value.message
    for range_ in ("1x3x8x8:2x3x8x8:4x3x8x8", "8x3x8x8:8x3x8x8:16x3x8x8"):
        assert f"image={range_}" in caught.value.message
    assert "--shape" in str(caught.value)


def test_all_inputs_must_lie_in_the_same_profile() -> None:
    specs = [TensorSpec(name=name, dtype="float32", shape=(-1,)) for name in "ab"]
    small = ShapeRange(min=(1,), opt=(1,), max=(4,))
    large = ShapeRange(min=(5,), opt=(5,), max=(8,))
    profiles = [{"a": small, "b": small}, {"a": large, "b": large}]

    def vectors(a: int, b: int) -> dict[str, Array]:
        return {"a": np.zeros(a, np.float32), "b": np.zeros(b, np.float32)}

    check_inputs(vectors(2, 3), specs, profiles)
    check_inputs(vectors(6, 7), specs, profiles)
    with pytest.raises(ShapeError, match=re.escape("a=[2], b=[6]")):
        check_inputs(vectors(2, 6), specs, profiles)


def test_a_profile_says_nothing_about_inputs_that_it_does_not_name() -> None:
    specs = [IMAGE, TensorSpec(name="threshold", dtype="float32", shape=(1,))]
    arrays = {"image": images(2), "threshold": np.zeros(1, np.float32)}
    assert set(check_inputs(arrays, specs, [{"image": shape_range(1, 2, 4)}])) == {"image", "threshold"}


class TestShapeTensors:
    SPECS = (IMAGE, TensorSpec(name="shape", dtype="int64", shape=(2,)))
    PROFILES = ({"image": shape_range(1, 2, 4)}, {"image": shape_range(5, 8, 8)})
    VALUES = (
        {"shape": ValueRange(min=(-1, 0), opt=(1, 8), max=(4, 64))},
        {"shape": ValueRange(min=(9, 9), opt=(9, 9), max=(9, 9))},
    )

    @pytest.mark.parametrize(
        ("n", "values", "accepted"),
        [
            (2, (-1, 64), True),
            (2, (4, 65), False),
            (2, (-2, 64), False),
            (2, (9, 9), False),  # of the other profile
            (6, (9, 9), True),
            (6, (1, 8), False),
        ],
    )
    def test_values_and_shapes_must_lie_in_the_same_profile(
        self, n: int, values: tuple[int, int], accepted: bool
    ) -> None:
        arrays = {"image": images(n), "shape": np.array(values, np.int64)}
        if accepted:
            assert set(check_inputs(arrays, self.SPECS, self.PROFILES, self.VALUES)) == {"image", "shape"}
            return
        with pytest.raises(ShapeError, match="lie in no profile") as caught:
            check_inputs(arrays, self.SPECS, self.PROFILES, self.VALUES)
        assert f"Shapes image=[{n}, 3, 8, 8] and values shape={list(values)} lie" in caught.value.message
        assert "shape=-1x0:1x8:4x64" in caught.value.message

    def test_a_single_value_may_have_no_dimension(self) -> None:
        spec = TensorSpec(name="size", dtype="int32", shape=())
        values = ({"size": ValueRange(min=(1,), opt=(2,), max=(4,))},)
        check_inputs({"size": np.array(4, np.int32)}, [spec], (), values)
        with pytest.raises(ShapeError, match=re.escape("Values size=[5] lie in no profile")):
            check_inputs({"size": np.array(5, np.int32)}, [spec], (), values)

    def test_random_inputs_take_the_values_that_they_are_given(self) -> None:
        inputs = random_inputs(self.SPECS, {"image": (1, 3, 8, 8)}, values={"shape": (4, 48)})
        np.testing.assert_array_equal(inputs["shape"], np.array([4, 48], np.int64))

    def test_values_out_of_order_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="needs min <= opt <= max"):
            ValueRange(min=(1,), opt=(0,), max=(4,))
