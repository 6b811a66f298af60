"""run_once(): .npy files, random numbers and images as inputs, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.onnx_graphs import GraphMaker, doubling, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.engine.run_once import run_once, summarize
from trtdeploy.errors import DataError, DtypeError, InputNameError, PlanCorruptError, ShapeError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.tensors import random_inputs

QUICK = BuildConfig(timing_rounds=1, threads=1)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_an_npy_file_goes_in_as_it_is(qdq_plan: Plan, tmp_path: Path) -> None:
    batch = np.random.default_rng(1).standard_normal((4, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x=1.npy", batch)
    outputs, manifest = run_once(qdq_plan.path, [f"input={tmp_path / 'x=1.npy'}"], threads=1)
    with Engine.load(qdq_plan.path, threads=1) as engine:
        np.testing.assert_array_equal(outputs["logits"], engine.infer({"input": batch})["logits"])
    assert manifest == qdq_plan.manifest


def test_random_is_reproducible_and_of_the_shape_that_the_plan_serves_best(qdq_plan: Plan) -> None:
    first = run_once(qdq_plan.path, ["input=random"])[0]["logits"]
    np.testing.assert_array_equal(first, run_once(qdq_plan.path, ["input=random"])[0]["logits"])
    assert first.shape == (1, 10)
    with Engine.load(qdq_plan.path) as engine:
        expected = engine.infer(random_inputs(engine.inputs))
    np.testing.assert_array_equal(first, expected["logits"])


def test_an_input_whose_name_has_a_sign_of_equality(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Add", "a=b", "a", output="y")
    build(save(g.model({"a=b": [2], "a": [2]}, {"y": [2]}), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    np.save(tmp_path / "x.npy", np.array([1, 2], np.float32))
    outputs, _ = run_once(tmp_path / "m.plan", [f"a=b={tmp_path / 'x.npy'}", f"a={tmp_path / 'x.npy'}"])
    np.testing.assert_array_equal(outputs["y"], [2, 4])
    with pytest.raises(UsageError, match="replace"):
        run_once(tmp_path / "m.plan", [f"a=b={tmp_path / 'x.npy'}"], output=tmp_path / "x.npy")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".jpg", ".webp"])
def test_an_image_goes_through_the_plans_preprocessing(qdq_plan: Plan, png: Path, suffix: str) -> None:
    path = png.with_name(f"copy{suffix}")
    Image.open(png).save(path)
    outputs = run_once(qdq_plan.path, [f"input={path}"], threads=1)[0]
    preprocessing = qdq_plan.manifest.preprocessing
    assert preprocessing is not None
    with Engine.load(qdq_plan.path, threads=1) as engine:
        expected = engine.infer({"input": preprocessing([path.read_bytes()])})
    np.testing.assert_array_equal(outputs["logits"], expected["logits"])


@pytest.mark.parametrize("text", ["", "input", "input=", "=", "random"])
def test_another_form_is_a_usage_error_that_lists_the_inputs(qdq_plan: Plan, text: str) -> None:
    with pytest.raises(UsageError, match=r"NAME=FILE\.npy") as caught:
        run_once(qdq_plan.path, [text])
    assert "input float32[?, 3, 32, 32]" in str(caught.value)


@pytest.mark.parametrize("texts", [["imput=random"], ["=random"], ["input=random", "more=random"], []])
def test_a_wrong_or_missing_name_is_an_error_that_lists_the_right_ones(qdq_plan: Plan, texts: list[str]) -> None:
    with pytest.raises(InputNameError, match="'input'"):
        run_once(qdq_plan.path, texts)


def test_an_input_that_is_given_twice_is_a_usage_error(qdq_plan: Plan) -> None:
    with pytest.raises(UsageError, match="'input' twice"):
        run_once(qdq_plan.path, ["input=random", "input=random"])


def test_an_image_for_a_plan_without_preprocessing_is_a_usage_error(tmp_path: Path, png: Path) -> None:
    plan = build(save(doubling(), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    with pytest.raises(UsageError, match=r"no preprocessing.*\.npy"):
        run_once(plan.path, [f"x={png}"])


@pytest.mark.parametrize("name", ["none.npy", "none.png", "folder.npy", "folder.png"])
def test_a_file_that_cannot_be_read_is_a_data_error(qdq_plan: Plan, tmp_path: Path, name: str) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=name):
        run_once(qdq_plan.path, [f"input={tmp_path / name}"])


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


GOOD_NPY = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n", bytes(16))


@given(
    st.binary(max_size=100)
    | st.tuples(st.integers(0, len(GOOD_NPY)), st.binary(max_size=4)).map(
        lambda cut: GOOD_NPY[: cut[0]] + cut[1] + GOOD_NPY[cut[0] + len(cut[1]) :]
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"")
@example(b"PK\x03\x04 a broken zip")
@example(b"PK\x05\x06" + bytes(18))
@example(b"\x93NUMPY")
@example(b"\x80\x04\x95 a pickle")
@example(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }\n"))
@example(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }\n", bytes(16)))
@example(npy("{'descr': '|O', 'fortran_order': False, 'shape': (4,), }\n", bytes(16)))
@example(npy("{'descr': 'zz', 'fortran_order': False, 'shape': (4,), }\n", bytes(16)))
@example(npy("{'descr': '<f4', 'fortran_order': False, 'shape': 'abc', }\n", bytes(16)))
@example(npy("(" * 500))
def test_any_bytes_are_a_data_error_or_an_array(qdq_plan: Plan, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises((DataError, DtypeError, ShapeError)):
        run_once(qdq_plan.path, [f"input={tmp_path / 'x.npy'}"])


def test_an_npz_is_refused_with_a_word_about_npy(qdq_plan: Plan, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(DataError, match=r"several arrays; give a \.npy"):
        run_once(qdq_plan.path, [f"input={tmp_path / 'x.npz'}"])


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_damaged_image_is_a_data_error(qdq_plan: Plan, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError):
        run_once(qdq_plan.path, [f"input={tmp_path / 'x.png'}"])


def test_a_wrong_dtype_or_shape_in_a_file_is_an_input_error(qdq_plan: Plan, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 32, 32)))
    with pytest.raises(DtypeError, match="float64"):
        run_once(qdq_plan.path, [f"input={tmp_path / 'x.npy'}"])
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 31, 32), np.float32))
    with pytest.raises(ShapeError, match="31"):
        run_once(qdq_plan.path, [f"input={tmp_path / 'x.npy'}"])


def test_a_missing_plan_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanCorruptError):
        run_once(tmp_path / "none.plan", ["x=random"])


def test_outputs_are_written_under_their_names(tmp_path: Path) -> None:
    g = GraphMaker()
    for name in ("file", "a/b", "Größe"):
        g.node("Add", "x", "x", output=name)
    model = g.model({"x": ["batch", 4]}, {name: ["batch", 4] for name in ("file", "a/b", "Größe")})
    plan = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
    outputs, _ = run_once(plan.path, ["x=random"], output=tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as written:
        assert set(written.files) == {"file", "a/b", "Größe"}
        for name, array in outputs.items():
            np.testing.assert_array_equal(written[name], array)


def test_nothing_is_written_where_the_input_is_wrong(qdq_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputNameError):
        run_once(qdq_plan.path, ["imput=random"], output=tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_summary_shows_the_likeliest_labels(qdq_plan: Plan) -> None:
    scores = np.array([[0, 5, 1, 3, 0, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0, 8, 7]], np.float32)
    facts = json.loads(json.dumps(summarize({"logits": scores}, qdq_plan.manifest)))["logits"]
    assert (facts["dtype"], facts["shape"], facts["min"], facts["max"]) == ("float32", [2, 10], 0.0, 9.0)
    assert [[entry["label"] for entry in row] for row in facts["top"]] == [["1", "3", "2"], ["0", "8", "9"]]
    softmax = np.exp(scores[0] - 5) / np.exp(scores[0] - 5).sum()
    assert facts["top"][0][0]["probability"] == pytest.approx(softmax[1], rel=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "float16", "bool"])
def test_labels_of_scores_of_any_type_are_in_order(qdq_plan: Plan, dtype: str) -> None:
    scores = np.zeros((1, 10), dtype)
    scores[0, 7] = 1
    top = summarize({"logits": scores}, qdq_plan.manifest)["logits"]["top"][0]
    assert [entry["label"] for entry in top] == ["7", "0", "1"]


@pytest.mark.parametrize("shape", [(2, 9), (10,), (1, 10, 1), ()])
def test_outputs_that_are_no_class_scores_have_no_labels(qdq_plan: Plan, shape: tuple[int, ...]) -> None:
    facts: dict[str, Any] = summarize({"other": np.ones(shape, np.float32)}, qdq_plan.manifest)
    assert set(facts["other"]) == {"dtype", "shape", "min", "max"}
