"""Instances and versions that do not answer alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.validation.scored import SIZE, Scored
from trtdeploy.cli.main import app
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.errors import ServerError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.validation import ValidationOptions, validate
from trtdeploy.validation.consistency import measure_instances


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with open_dataset("digits") as dataset:
        yield dataset


def one_of_four(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    calls = itertools.count(1)
    return lambda scores: change(scores) if next(calls) % 4 == 0 else scores


class Instances(Scored):
    """Four instances, each of which answers every fourth call."""

    instances = 4

    def scores(self, batch: Array) -> Array:
        self.sizes = {*getattr(self, "sizes", ()), len(batch)}
        return super().scores(batch)


def one_bit(scores: Array) -> Array:
    return np.nextafter(scores, np.float32(np.inf))


def test_instances_that_answer_alike(digits: Dataset) -> None:
    target = Instances()
    found = measure_instances(target, digits.split("test"), SIZE)
    assert (found.instances, found.requests, found.differing, found.largest) == (4, 17, 0, 0)
    assert target.sizes == {8}  # whole batches: nobody joins two of them


@pytest.mark.parametrize(
    ("change", "limit", "passed"),
    [
        (lambda scores: scores, 0, True),
        (one_bit, 0, False),
        (one_bit, 0.01, True),
        (lambda scores: 1.1 * scores, 0.01, False),
    ],
    ids=["same", "one-bit", "one-bit-allowed", "wrong"],
)
def test_an_instance_that_answers_otherwise_fails_the_gate(
    change: Callable[[Array], Array], limit: float, passed: bool, digits: Dataset
) -> None:
    options = ValidationOptions(max_instance_difference=limit, batch_size=8)
    report = validate(Instances(one_of_four(change)), digits, options)
    assert [(gate.name, gate.passed) for gate in report.gates] == [("instances", passed)]
    assert report.passed is passed
    assert report.instances is not None
    assert (report.instances.differing > 0) is (change(np.ones(1, np.float32)) != 1).item()


def test_an_instance_that_answers_half_a_batch_or_nan_is_a_server_error(digits: Dataset) -> None:
    for change, words in ((lambda s: s[:4], "answered 4 of 8"), (lambda s: s * np.nan, "not finite")):
        with pytest.raises(ServerError, match=words):
            measure_instances(Instances(one_of_four(change)), digits.split("test"), SIZE)


class Other(Scored):
    version = "2"


def three_samples_change() -> Callable[[Array], Array]:
    calls = itertools.count(1)

    def spoil(scores: Array) -> Array:
        return -scores if next(calls) in (30, 31, 32) else scores  # the answers of one request are in one batch of one

    return spoil


def test_versions_are_asked_the_same_samples(digits: Dataset) -> None:
    split = digits.split("test")
    n = len(split)
    scores = Scored().scores(SIZE.normalise(split.pixels(SIZE, range(n))))
    others = scores.argmax(axis=1)
    others[29:32] = scores[29:32].argmin(axis=1)
    accuracy, other_accuracy = (100 * (answers == split.labels).mean() for answers in (scores.argmax(axis=1), others))
    for least, passed in ((100.0, False), (100 * (n - 3) / n, True)):
        options = ValidationOptions(min_version_agreement=least, concurrency=1, batch_size=1)
        report = validate(Scored(), digits, options, others=[Other(three_samples_change())])
        (found,) = report.versions
        assert (found.version, found.n) == ("2", n)
        assert found.agreement == pytest.approx(100 * (n - 3) / n)
        assert found.difference.difference.value == pytest.approx(accuracy - other_accuracy)
        assert found.largest is not None
        assert found.largest > 50
        assert found.largest_at in split.ids[29:32]
        assert [(gate.name, gate.passed) for gate in report.gates] == [("agreement with version 2", passed)]
        assert report.passed is passed


def test_a_comparison_with_nothing_or_with_itself_is_refused_before_asking(digits: Dataset) -> None:
    def never(scores: Array) -> Array:
        raise AssertionError("asked")

    with pytest.raises(UsageError, match="--compare-version V"):
        validate(Scored(never), digits, ValidationOptions(min_version_agreement=99))
    with pytest.raises(UsageError, match="compared with itself"):
        validate(Scored(never), digits, ValidationOptions(), others=[Scored(never)])


def test_the_contexts_of_a_plan_answer_alike_and_the_command_says_so(qdq_plan: Plan) -> None:
    common = ["validate", "--data", "digits", "--plan", str(qdq_plan.path), "--batch-size", "32"]
    done = CliRunner().invoke(app, [*common, "--max-instance-difference", "0", "--concurrency", "3"])
    assert done.exit_code == 0, done.output
    assert "instances   0 of 13 answers of 3 instances to one request of 8 differ" in done.stdout
    refused = CliRunner().invoke(app, [*common, "--compare-version", "1"])
    assert refused.exit_code == 2
    assert "needs --url and --model" in refused.stderr
