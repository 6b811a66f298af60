"""Leases: a context of one's own, own buffers, and what happens with wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.fake_runtime import batch, make_engine
from tests.onnx_graphs import GraphMaker, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import (
    DtypeError,
    EngineClosedError,
    InferenceError,
    InputError,
    InputNameError,
    ShapeError,
    TrtDeployError,
    UsageError,
)
from trtdeploy.plan import Plan


def image(size: int = 2) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(size).standard_normal((size, 3, 32, 32)).astype(np.float32)}


@pytest.fixture
def engine(qdq_plan: Plan) -> Any:
    with Engine.load(qdq_plan.path, timeout_s=5) as engine:
        yield engine


@pytest.mark.parametrize("size", [1, 7, 32])
def test_execute_and_execute_into_give_the_bits_of_infer(engine: Engine, size: int) -> None:
    expected = engine.infer(image(size))["logits"]
    with engine.lease() as lease:
        assert (lease.inputs, lease.outputs) == (engine.inputs, engine.outputs)
        np.testing.assert_array_equal(lease.execute(image(size))["logits"], expected)
        mine = np.full((size, 10), np.nan, np.float32)
        address = mine.ctypes.data
        lease.execute_into(image(size), {"logits": mine})
        np.testing.assert_array_equal(mine, expected)
        assert mine.ctypes.data == address


def test_own_buffers_serve_again_and_again(engine: Engine) -> None:
    outputs = {"logits": np.empty((2, 10), np.float32)}
    with engine.lease() as lease:
        for seed in range(5):
            inputs = {"input": np.random.default_rng(seed).standard_normal((2, 3, 32, 32)).astype(np.float32)}
            lease.execute_into(inputs, outputs)
            np.testing.assert_array_equal(outputs["logits"], lease.execute(inputs)["logits"])


def test_outputs_may_be_parts_of_one_array(engine: Engine) -> None:
    ring = np.full((4, 2, 10), -7, np.float32)
    with engine.lease() as lease:
        lease.execute_into(image(), {"logits": ring[2]})
        np.testing.assert_array_equal(ring[2], lease.execute(image())["logits"])
    assert (ring[[0, 1, 3]] == -7).all()


def test_inputs_of_execute_into_may_be_dlpack_or_strided(engine: Engine) -> None:
    mine = np.empty((2, 10), np.float32)
    with engine.lease() as lease:
        for value in (torch.from_numpy(image()["input"]), image(4)["input"][::2]):
            lease.execute_into({"input": value}, {"logits": mine})
            plain = np.ascontiguousarray(value)
            np.testing.assert_array_equal(mine, lease.execute({"input": plain})["logits"])


def read_only() -> np.ndarray:
    array = np.empty((2, 10), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("outputs", "kind", "words"),
    [
        ({}, InputNameError, "logits"),
        ({"logit": np.empty((2, 10), np.float32)}, InputNameError, "logit"),
        ({"logits": np.empty((2, 10), np.float32), "more": np.empty(1)}, InputNameError, "more"),
        ({"logits": np.empty((2, 10))}, DtypeError, "float64"),
        ({"logits": np.empty((2, 10), np.int32)}, DtypeError, "int32"),
        ({"logits": np.empty((2, 10), ">f4")}, DtypeError, ">f4"),
        ({"logits": [0.0] * 20}, DtypeError, "list"),
        ({"logits": torch.empty(2, 10)}, DtypeError, "Tensor"),
        ({"logits": np.empty((10, 2), np.float32).T}, ShapeError, "contiguous"),
        ({"logits": np.empty((2, 20), np.float32)[:, ::2]}, ShapeError, "contiguous"),
        ({"logits": read_only()}, ShapeError, "writable"),
    ],
)
def test_an_output_array_that_does_not_fit_is_refused(
    engine: Engine, outputs: Any, kind: type[TrtDeployError], words: str
) -> None:
    with engine.lease() as lease:
        with pytest.raises(kind, match=words):
            lease.execute_into(image(), outputs)
        assert lease.execute(image())["logits"].shape == (2, 10)


@pytest.mark.parametrize("shape", [(1, 10), (3, 10), (2, 9), (2, 11), (20,), (10, 2), (2, 10, 1), (), (0, 10), (2, 5)])
def test_an_output_array_of_another_shape_is_an_error_and_its_surroundings_stay(
    engine: Engine, shape: tuple[int, ...]
) -> None:
    """The array lies in the middle of a larger one: a runtime that trusts the pointer would write beyond it."""
    count = int(np.prod(shape))
    memory = np.full(3 * 64, -7, np.float32)
    array = memory[64 : 64 + count].reshape(shape)
    with engine.lease() as lease:
        with pytest.raises((InferenceError, ShapeError)):
            lease.execute_into(image(), {"logits": array})
        lease.execute(image())
    assert (np.delete(memory, np.arange(64, 64 + count)) == -7).all()


def two_outputs(folder: Path) -> Path:
    g = GraphMaker()
    g.node("Identity", "x", output="same")
    g.node("Reshape", "x", g.constant(np.array([-1])), output="flat")
    g.node("Identity", g.constant(np.arange(3, dtype=np.float32)), output="constant")
    model = g.model({"x": ["batch", 4]}, {"same": ["batch", 4], "flat": ["n"], "constant": [3]})
    return build(save(model, folder / "m.onnx"), folder / "m.plan", BuildConfig(timing_rounds=1)).path


def test_outputs_that_are_only_views_or_constants_are_written_too(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with Engine.load(two_outputs(tmp_path)) as engine:
        free = engine.infer({"x": x})
        assert not any(np.shares_memory(output, x) for output in free.values())
        free["constant"][:] = 9
        mine = {
            "same": np.zeros((2, 4), np.float32),
            "flat": np.zeros(8, np.float32),
            "constant": np.zeros(3, np.float32),
        }
        with engine.lease() as lease:
            lease.execute_into({"x": x}, mine)
            np.testing.assert_array_equal(mine["same"], x)
            np.testing.assert_array_equal(mine["flat"], x.ravel())
            np.testing.assert_array_equal(mine["constant"], [0, 1, 2])
            for name, shape in (("flat", (7,)), ("flat", (9,)), ("flat", (2, 4)), ("constant", (4,)), ("same", (1, 4))):
                with pytest.raises((InferenceError, ShapeError)):
                    lease.execute_into({"x": x}, {**mine, name: np.zeros(shape, np.float32)})


def test_an_output_array_that_overlaps_an_input_or_another_output_is_refused(tmp_path: Path) -> None:
    memory = np.zeros(64, np.float32)
    apart = {"same": memory[:8].reshape(2, 4), "flat": memory[8:16], "constant": memory[16:19]}
    x = memory[32:40].reshape(2, 4)
    with Engine.load(two_outputs(tmp_path)) as engine, engine.lease() as lease:
        lease.execute_into({"x": x}, apart)
        with pytest.raises(InputError, match="overlaps input 'x'"):
            lease.execute_into({"x": x}, {**apart, "flat": memory[39:47]})
        with pytest.raises(InputError, match="overlaps output"):
            lease.execute_into({"x": x}, {**apart, "flat": memory[7:15]})


@pytest.mark.parametrize(
    "use",
    [
        lambda lease: lease.execute(batch(1)),
        lambda lease: lease.execute_into(batch(1), {"y": np.zeros((1, 4), np.float32)}),
    ],
    ids=["execute", "execute_into"],
)
def test_a_lease_is_useless_after_its_block(use: Callable[[Any], object]) -> None:
    engine, _ = make_engine(is_open=True)
    with engine:
        with engine.lease() as lease:
            use(lease)
        with pytest.raises(EngineClosedError, match="lease has ended"):
            use(lease)


def test_a_lease_that_is_ended_early_still_gives_its_context_back_once() -> None:
    engine, _ = make_engine(is_open=True)
    with engine:
        with engine.lease() as lease:
            lease.end()
            with pytest.raises(EngineClosedError):
                lease.execute(batch(1))
        lease.end()
        with engine.lease(timeout_s=0) as again:
            assert again.execute(batch(1))["y"][0, 0] == 2
        assert len(engine._pool._free) == 1


def test_an_error_inside_of_the_block_gives_the_context_back() -> None:
    engine, _ = make_engine(is_open=True)
    with engine:
        for error in (KeyError, KeyboardInterrupt):
            with pytest.raises(error), engine.lease():
                raise error
        with pytest.raises(InferenceError), engine.lease() as lease:
            lease.execute(batch(float("nan")))
        assert engine.infer(batch(1), timeout_s=0)["y"][0, 0] == 2


def test_two_leases_have_different_contexts() -> None:
    engine, loaded = make_engine(contexts=2, is_open=True)
    with engine, engine.lease() as one, engine.lease() as other:
        assert one._context is not other._context
        assert {one._context, other._context} == set(loaded.made)


def test_a_plan_on_the_cpu_has_no_device_to_leave_outputs_on(qdq_plan: Plan) -> None:
    inputs = {"input": np.zeros((1, 3, 32, 32), np.float32)}
    with Engine.load(qdq_plan.path) as engine:
        with pytest.raises(UsageError, match="no device"):
            engine.infer(inputs, outputs="device")
        with engine.lease() as lease, pytest.raises(UsageError, match="no device"):
            lease.execute(inputs, outputs="device")
        assert engine.infer(inputs)["logits"].shape == (1, 10)
