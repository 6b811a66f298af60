"""Answers that depend on a sample's place, its neighbours, the caller or the first call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.validation.scored import SIZE, Scored
from trtdeploy.cli.main import app
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.errors import ServerError
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.validation import ServerTotals, ValidationOptions, validate
from trtdeploy.validation.invariance import measure_variation


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with open_dataset("digits") as dataset:
        yield dataset


def first_row_wins(scores: Array) -> Array:
    return np.repeat(scores[:1], len(scores), axis=0)


def last_place_is_off(scores: Array) -> Array:
    spoiled = scores.copy()
    if len(scores) > 1:
        spoiled[-1] *= 1.2
    return spoiled


def first_call_is_off() -> Callable[[Array], Array]:
    calls = []

    def spoil(scores: Array) -> Array:
        calls.append(1)
        return scores * 1.2 if len(calls) == 1 else scores

    return spoil


def one_instance_of_two_is_off() -> Callable[[Array], Array]:
    lock, calls = threading.Lock(), []

    def spoil(scores: Array) -> Array:
        with lock:
            calls.append(1)
            return scores * (1.2 if len(calls) % 7 == 0 else 1)

    return spoil


def test_answers_that_depend_on_nothing_else_do_not_vary(digits: Dataset) -> None:
    variation = measure_variation(Scored(), digits.split("test"), SIZE)
    assert variation == {"first answer": 0, "other callers": 0, "place in a batch": 0}


@pytest.mark.parametrize(
    "spoil",
    [first_row_wins, last_place_is_off, first_call_is_off(), one_instance_of_two_is_off()],
    ids=["first-row", "last-place", "cold", "instance"],
)
def test_answers_that_depend_on_something_else_fail_the_gate(spoil: Callable[[Array], Array], digits: Dataset) -> None:
    report = validate(Scored(spoil), digits, ValidationOptions(max_variation=1, batch_size=8))
    assert [gate.name for gate in report.gates] == ["variation"]
    assert not report.passed
    assert report.variation is not None
    assert report.variation > 5


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (first_call_is_off(), "first answer"),
        (first_row_wins, "place in a batch"),
        (last_place_is_off, "place in a batch"),
    ],
    ids=["cold", "first-row", "last-place"],
)
def test_the_cause_is_named(spoil: Callable[[Array], Array], cause: str, digits: Dataset) -> None:
    variation = measure_variation(Scored(spoil), digits.split("test"), SIZE)
    assert variation.pop(cause) > 5
    assert set(variation.values()) == {0}


def test_half_a_batch_is_a_server_error(digits: Dataset) -> None:
    with pytest.raises(ServerError, match="answered 4 of 8 samples"):
        measure_variation(Scored(lambda scores: scores[: max(1, len(scores) // 2)]), digits.split("test"), SIZE)


def test_a_real_plan_passes_and_the_command_says_so(qdq_plan: Plan) -> None:
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--batch-size", "32", "--json"]
    done = CliRunner().invoke(app, [*common, "--max-variation", "5"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["gates"][0]["name"] == "variation"
    assert 0 <= facts["variation"] <= 5
    assert json.loads(CliRunner().invoke(app, common).stdout)["variation"] is None


def test_server_times_are_means_between_two_looks() -> None:
    before = ServerTotals(requests=10, queue_ns=0, input_ns=5_000_000, infer_ns=10_000_000, output_ns=0)
    after = ServerTotals(requests=14, queue_ns=8_000_000, input_ns=9_000_000, infer_ns=50_000_000, output_ns=2_000_000)
    times = after.since(before)
    assert times is not None
    assert (times.requests, times.queue_ms, times.input_ms, times.infer_ms, times.output_ms) == (4, 2, 1, 10, 0.5)
    assert before.since(after) is None
