"""The Python-backend model with requests made by hand: what no client can time. The engine and plan are real."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtdeploy.engine import Engine
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.tensors import Array
from trtdeploy.triton import backend

LIMIT_S = 300.0
CANCELLED = 5


class Tensor:
    """``pb_utils.Tensor``."""

    def __init__(self, name: str, array: Array) -> None:
        self.name, self._array = name, array

    def as_numpy(self) -> Array:
        return self._array


class TritonError:
    """``pb_utils.TritonError``."""

    CANCELLED = CANCELLED

    def __init__(self, message: str, code: int = 0) -> None:
        self.message, self.code = message, code


class Response:
    """``pb_utils.InferenceResponse``."""

    def __init__(self, tensors: list[Tensor] = (), error: TritonError | None = None) -> None:  # type: ignore[assignment]
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in tensors}
        self.error = error


class Request:
    """A request that its client has cancelled or not; its response, whichever way it comes."""

    def __init__(self, array: Array, *, cancelled: bool = False) -> None:
        self.array, self.cancelled = array, cancelled
        self.answered = threading.Event()
        self.response: Response | None = None

    def is_cancelled(self) -> bool:
        return self.cancelled

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Response, flags: int) -> None:
        assert self.response is None, "answered twice"
        self.response = response
        self.answered.set()


@pytest.fixture
def load(qdq_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Make the model beside a copy of the plan, as ``package`` lays it out."""
    pb_utils = types.ModuleType("triton_python_backend_utils")
    vars(pb_utils).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: Tensor(name, request.array),
    )
    monkeypatch.setitem(sys.modules, pb_utils.__name__, pb_utils)
    shutil.copy(backend.FOLDER / "model.py", tmp_path / "model.py")
    shutil.copy(qdq_plan.path, tmp_path / "engine.plan")
    shutil.copy(manifest_path(qdq_plan.path), manifest_path(tmp_path / "engine.plan"))
    spec = importlib.util.spec_from_file_location("served_model", tmp_path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: list[Any] = []

    def make(contexts: int = 1, instances: int = 1, fastest: int = 64) -> Any:
        vars(module)["fastest_batch"] = lambda engine, largest: min(fastest, largest)  # not what this machine finds
        model = module.TritonPythonModel()
        config = {
            "max_batch_size": 64,
            "instance_group": [{"count": instances, "kind": "KIND_CPU"}],
            "parameters": {"trtdeploy.contexts": {"string_value": str(contexts)}},
        }
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
        made.append(model)
        return model

    yield make
    for model in made:
        model.finalize()


@pytest.fixture
def engine(qdq_plan: Plan) -> Iterator[Engine]:
    with Engine.load(qdq_plan.path) as loaded:
        yield loaded


def images(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def responses(model: Any, requests: list[Request]) -> list[Response]:
    returned = model.execute(requests)
    if returned is not None:
        return list(returned)
    assert all(request.answered.wait(LIMIT_S) for request in requests)
    return [request.response for request in requests if request.response is not None]


def runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each run of the engine had."""
    sizes: list[int] = []
    for name in ("infer", "submit"):
        real = getattr(model.engine, name)

        def counted(inputs: Any, real: Any = real, **options: Any) -> Any:
            sizes.append(len(inputs["input"]))
            return real(inputs, **options)

        monkeypatch.setattr(model.engine, name, counted)
    return sizes


@pytest.mark.parametrize(("contexts", "small"), [(1, [6]), (3, [1, 3, 2])])
def test_a_batch_is_one_run_on_each_context_and_one_that_no_profile_covers_several(
    contexts: int, small: list[int], load: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(contexts)
    sizes = runs(model, monkeypatch)
    for counts, expected in (((1, 3, 2), small), ((20, 20, 4, 32), [20, 24, 32]), ((5,), [5])):
        sizes.clear()
        batches = [images(count, seed) for seed, count in enumerate(counts)]
        answers = responses(model, [Request(batch) for batch in batches])
        assert sizes == expected
        for batch, answer in zip(batches, answers, strict=True):
            assert answer.error is None
            np.testing.assert_allclose(
                answer.outputs["logits"], engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(("fastest", "expected"), [(1, [1, 3, 2, 1, 1]), (2, [1, 3, 2, 2]), (4, [4, 4]), (64, [8])])
def test_a_processor_joins_as_many_samples_as_it_is_fastest_with(
    fastest: int, expected: list[int], load: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(fastest=fastest)
    sizes = runs(model, monkeypatch)
    batches = [images(count, seed) for seed, count in enumerate((1, 3, 2, 1, 1))]
    answers = responses(model, [Request(batch) for batch in batches])
    assert sizes == expected
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_allclose(
            answer.outputs["logits"], engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("contexts", "instances", "expected"), [(1, 1, 8), (1, 2, 4), (2, 2, 2), (3, 9, 1)])
def test_instances_and_contexts_share_the_threads(
    contexts: int,
    instances: int,
    expected: int,
    load: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = manifest_path(tmp_path / "engine.plan")
    manifest = json.loads(file.read_text())
    manifest["tactic"]["threads"] = 8
    file.write_text(json.dumps(manifest))
    given: list[Any] = []
    original = Engine.load

    def watched(*arguments: Any, **options: Any) -> Engine:
        given.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(Engine, "load", watched)
    load(contexts, instances)
    assert given[0]["options"].threads == expected


@pytest.mark.parametrize("contexts", [1, 3])
def test_what_was_cancelled_is_not_run(
    contexts: int, load: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(contexts)
    monkeypatch.setitem(model.wanted.__func__.__globals__, "LONG_RUN_S", 0)
    sizes = runs(model, monkeypatch)
    batch = images(2, 1)
    requests = [Request(images(1, 0), cancelled=True), Request(batch), Request(images(4, 2), cancelled=True)]
    first, second, third = responses(model, requests)
    assert sizes == [2]
    for answer in (first, third):
        assert answer.error is not None
        assert answer.error.code == CANCELLED
    np.testing.assert_allclose(second.outputs["logits"], engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4)
    (lonely,) = responses(model, [Request(batch, cancelled=True)])
    assert lonely.error is not None
    assert sizes == [2]


@pytest.mark.parametrize("contexts", [1, 3])
def test_clients_of_short_runs_are_not_asked_whether_they_have_cancelled(
    contexts: int, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(contexts)
    asked: list[int] = []
    monkeypatch.setattr(Request, "is_cancelled", lambda request: asked.append(len(request.array)))
    scope = model.wanted.__func__.__globals__
    for long_run_s, expected in ((0, [1]), (LIMIT_S, [])):
        monkeypatch.setitem(scope, "LONG_RUN_S", long_run_s)
        asked.clear()
        (answer,) = responses(model, [Request(images(1, 0))])
        assert answer.error is None
        assert asked == expected


@pytest.mark.parametrize("contexts", [1, 3])
def test_one_bad_request_gets_the_error_and_no_context_is_lost(contexts: int, load: Callable[..., Any]) -> None:
    model = load(contexts)
    for _ in range(2 * contexts):  # more rounds than contexts: a lost one would block here
        good, bad = Request(images(2, 1)), Request(images(1, 2)[:, :, :16])
        answers = responses(model, [good, bad, Request(images(40, 3))])
        assert answers[0].error is None
        assert answers[0].outputs["logits"].shape == (2, 10)
        for answer in answers[1:]:
            assert answer.error is not None
            assert "input" in answer.error.message
