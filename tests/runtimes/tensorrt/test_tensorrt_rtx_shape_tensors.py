"""Inputs that hold a shape, in manifests as the real TensorRT-RTX builder makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.fake_gpu import FakeGpu, Ranges, batch, reshaping
from tests.onnx_graphs import save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.engine.run_once import run_once
from trtdeploy.errors import ShapeError, UsageError
from trtdeploy.plan import Manifest, read_plan
from trtdeploy.tensors import ShapeRange

pytest.importorskip("tensorrt_rtx")

SHAPES = ShapeRange(min=(1, 64), opt=(8, 64), max=(32, 64))
TALL = ShapeRange(min=(64, 1), opt=(128, 4), max=(2048, 64))
WIDE = ShapeRange(min=(1, 64), opt=(4, 128), max=(32, 2048))
PROFILES: Ranges = ({"x": SHAPES, "shape": TALL}, {"x": SHAPES, "shape": WIDE})


def config(*profiles: dict[str, ShapeRange]) -> BuildConfig:
    return BuildConfig(runtime="tensorrt-rtx", profiles=profiles)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reshaping(), tmp_path_factory.mktemp("rtx") / "reshaping.onnx")


@pytest.fixture(scope="module")
def built(model: Path) -> Manifest:
    plan = build(model, model.with_name("reshaping.rtx"), config(*PROFILES))
    return read_plan(plan.path)[1]  # as it is read again


def test_the_manifest_tells_shapes_from_values(built: Manifest) -> None:
    assert built.profiles == ({"x": SHAPES}, {"x": SHAPES})
    assert [str(values["shape"]) for values in built.profile_values] == ["64x1:128x4:2048x64", "1x64:4x128:32x2048"]


def test_build_shows_both(built: Manifest) -> None:
    shown = [{name: str(covered) for name, covered in ranges.items()} for ranges in built.ranges]
    assert shown == [{name: str(covered) for name, covered in ranges.items()} for ranges in PROFILES]


@contextmanager
def engine_with(built: Manifest) -> Iterator[Engine]:
    gpu = FakeGpu(1)
    loaded = gpu.load(reshaping(), profiles=PROFILES)
    engine = Engine(loaded, built, contexts=1, timeout_s=30, queue_size=8)
    with engine:
        yield engine
    del engine, loaded
    gpu.assert_clean()


def test_an_engine_with_this_manifest_runs(built: Manifest) -> None:
    x = batch(2, 1)["x"]
    with engine_with(built) as engine:
        for shape in ((128, 1), (1, 128), (2, 64)):
            out = engine.infer({"x": x, "shape": np.array(shape, np.int64)})
            np.testing.assert_array_equal(out["y"], x.reshape(shape))
        with pytest.raises(ShapeError, match=r"values shape=\[33, 65\] lie in no profile"):
            engine.infer({"x": x, "shape": np.array((33, 65), np.int64)})


def test_random_inputs_hold_the_shape_that_is_served_best(built: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_with(built) as engine:
        monkeypatch.setattr(Engine, "load", lambda *_, **__: engine)
        outputs, _ = run_once("reshaping.rtx", ["x=random", "shape=random"])
        assert outputs["y"].shape == (128, 4)


@pytest.mark.parametrize("values", [(8,), (8, 64, 1)])
def test_another_number_of_values_is_refused_before_the_build(
    model: Path, tmp_path: Path, values: tuple[int, ...]
) -> None:
    wrong = ShapeRange(min=values, opt=values, max=values)
    with pytest.raises(
        UsageError, match=rf"gives {len(values)} values; the model's input shape holds the 2 of a shape"
    ):
        build(model, tmp_path / "m.rtx", config({"x": SHAPES, "shape": wrong}))


def test_without_ranges_the_message_says_what_the_numbers_mean(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"shape \[2\] holds a shape(?s:.)*--shape shape=a0xa1:b0xb1:c0xc1"):
        build(model, tmp_path / "m.rtx", config())
