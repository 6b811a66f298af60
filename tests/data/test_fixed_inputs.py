"""``--fixed NAME=FILE|VALUE``: what each form gives, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trtdeploy.data.fixed_inputs import parse_fixed
from trtdeploy.errors import DataError, UsageError
from trtdeploy.tensors import Array, TensorSpec, split_assignment

SPECS = [
    TensorSpec(name="x", dtype="float32", shape=(-1, 16)),
    TensorSpec(name="t", dtype="float32", shape=()),
    TensorSpec(name="one", dtype="float32", shape=(1,)),
    TensorSpec(name="rate", dtype="int64", shape=()),
    TensorSpec(name="state", dtype="float32", shape=(2, -1, 3)),
    TensorSpec(name="size", dtype="int32", shape=(-1, 2)),
    TensorSpec(name="ids", dtype="int64", shape=(-1,)),
    TensorSpec(name="on", dtype="bool", shape=()),
    TensorSpec(name="a=b", dtype="uint8", shape=(2,)),
]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("t=.5", "t", np.array(0.5, np.float32)),
        ("t=-1e-3", "t", np.array(-1e-3, np.float32)),
        ("one=0.25", "one", np.array([0.25], np.float32)),
        ("rate=16000", "rate", np.array(16000, np.int64)),
        ("rate=9007199254740993", "rate", np.array(9007199254740993, np.int64)),  # no float64 is this number
        ("state=0", "state", np.zeros((2, 1, 3), np.float32)),
        ("size=640,480", "size", np.array([[640, 480]], np.int32)),
        ("ids=1,2,3", "ids", np.array([1, 2, 3], np.int64)),
        ("on=true", "on", np.array(True)),
        ("a=b=7", "a=b", np.array([7, 7], np.uint8)),
    ],
)
def test_a_value_fills_the_input(text: str, name: str, expected: Array) -> None:
    fixed = parse_fixed([text], SPECS)
    assert list(fixed) == [name]
    assert fixed[name].dtype == expected.dtype
    assert fixed[name].shape == expected.shape
    np.testing.assert_array_equal(fixed[name], expected)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["t"], "is not NAME="),
        (["t="], "is not NAME="),
        (["=1"], "is not NAME="),
        (["y=1"], "does not have"),
        (["t=1", "t=2"], "twice"),
        (["rate=0.5"], "is no int64"),
        (["a=b=256"], "is no uint8"),
        (["t=nan"], "is no float32"),
        (["t=1e39"], "is no float32"),
        (["rate=1e400"], "is no int64"),
        (["t=1,2"], "gives 2 values"),
        (["size=1,2,3"], "gives 3 values"),
    ],
)
def test_another_form_or_value_is_refused(texts: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_fixed(texts, SPECS)


def test_a_file_holds_the_whole_input(tmp_path: Path) -> None:
    state = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    np.save(tmp_path / "s=1.npy", state)
    np.testing.assert_array_equal(parse_fixed([f"state={tmp_path / 's=1.npy'}"], SPECS)["state"], state)
    with pytest.raises(DataError, match="no file"):
        parse_fixed(["state=nothing.npy"], SPECS)
    with pytest.raises(DataError, match=r"holds float32 \[2, 4, 3\]; the model takes x"):
        parse_fixed([f"x={tmp_path / 's=1.npy'}"], SPECS)
    np.save(tmp_path / "double.npy", state.astype(np.float64))
    with pytest.raises(DataError, match="holds float64"):
        parse_fixed([f"state={tmp_path / 'double.npy'}"], SPECS)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(DataError, match=r"not a \.npy file"):
        parse_fixed([f"state={tmp_path / 'broken.npy'}"], SPECS)
    np.savez(tmp_path / "several.npz", a=state)
    with pytest.raises(DataError, match="several arrays"):
        parse_fixed([f"state={tmp_path / 'several.npz'}"], SPECS)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("a=b=x.npy", ["a=b"], ("a=b", "x.npy")),
        ("a=b=x.npy", ["a"], ("a", "b=x.npy")),
        ("a=b=x.npy", ["a", "a=b"], ("a=b", "x.npy")),
        ("a=b=x.npy", ["c"], ("a=b", "x.npy")),
        ("nothing", ["nothing"], ("", "")),
    ],
)
def test_a_name_with_a_sign_of_equality_is_known_by_the_inputs(
    text: str, names: list[str], expected: tuple[str, str]
) -> None:
    assert split_assignment(text, names) == expected
