"""Validation of plans in this process, and of targets that misbehave; the served one is in the end-to-end tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from tests.validation.nan_on_images import nan_on_images
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.engine import Engine
from trtdeploy.errors import DataError, LedgerError, ModelError, ServerError, ShapeError, UsageError
from trtdeploy.ledger import Ledger, StageOutputs
from trtdeploy.ledger.evaluation import evaluate
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array, TensorSpec
from trtdeploy.validation import PlanTarget, Target, ValidationOptions, ask, validate
from trtdeploy.validation.classifiers import onnx_classifier

IMAGE_SIZE = 32
LABELS = [str(digit) for digit in range(10)]
SIZE = Preprocessing.square(IMAGE_SIZE)
PERMUTED = ["3", "1", "4", "0", "5", "9", "2", "6", "8", "7"]


class Function(Target):
    """A classifier that is a Python function."""

    stage = "served"
    name = "function"
    version = "1"
    input = TensorSpec(name="input", dtype="float32", shape=(-1, 3, IMAGE_SIZE, IMAGE_SIZE))
    max_batch_size = 8
    preprocessing = SIZE

    def __init__(self, scores: Any, labels: tuple[str, ...] | None = tuple(LABELS)) -> None:
        self._scores = scores
        self.source = {"server": "none"}
        self.labels = labels

    def scores(self, batch: Array) -> Array:
        answer: Array = self._scores(batch)
        return answer


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with open_dataset("digits") as dataset:
        yield dataset


@pytest.fixture(scope="module")
def target(qdq_plan: Plan) -> Iterator[PlanTarget]:
    with Engine.load(qdq_plan.path, contexts=4) as engine:
        yield PlanTarget(engine, qdq_plan.path)


@pytest.fixture(scope="module")
def permuted_onnx(qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classifier with its classes in another order."""
    model = onnx.load(qdq_onnx)
    order = [LABELS.index(label) for label in PERMUTED]
    indices = helper.make_tensor("order", TensorProto.INT64, [len(order)], order)
    model.graph.initializer.append(indices)
    model.graph.node[-1].output[0] = "unordered"
    model.graph.node.append(helper.make_node("Gather", ["unordered", "order"], ["logits"], axis=1))
    helper.set_model_props(model, {"trtdeploy.preprocessing": SIZE.to_json(), "trtdeploy.labels": json.dumps(PERMUTED)})
    path = tmp_path_factory.mktemp("permuted") / "permuted.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def float_top1(qdq_onnx: Path, digits: Dataset) -> float:
    return evaluate(onnx_classifier(qdq_onnx), digits.split("test"), SIZE).outputs.top1.value


def with_float_stage(path: Path, dataset: Dataset, top1_percent: float) -> Ledger:
    """A ledger whose float stage is right on about this share of the samples."""
    split = dataset.split("test")
    right = round(len(split) * top1_percent / 100)
    logits = np.zeros((len(split), 10), np.float32)
    answers = np.where(np.arange(len(split)) < right, split.labels, (split.labels + 1) % 10)
    logits[np.arange(len(split)), answers] = 1
    ledger = Ledger(path)
    ledger.record(
        "float",
        StageOutputs(split.ids, split.labels, logits),
        seconds=1,
        source={},
        dataset={"name": "digits", "fingerprint": dataset.fingerprint},
    )
    return ledger


def test_a_plan_agrees_with_its_own_onnx(target: PlanTarget, digits: Dataset, qdq_onnx: Path) -> None:
    report = validate(target, digits, ValidationOptions(reference=qdq_onnx, min_agreement=99, max_drop=1.0))
    assert report.n == len(digits.split("test"))
    assert report.agreement is not None
    assert report.agreement > 99
    assert report.reference == qdq_onnx.name
    assert [gate.name for gate in report.gates] == ["top-1 drop", "agreement"]
    assert report.passed
    assert set(report.latency_ms) == {"p50", "p90", "p95", "p99"}
    assert report.throughput_per_s > 0


def test_batch_size_and_concurrency_do_not_change_the_answers(
    target: PlanTarget, digits: Dataset, qdq_plan: Plan
) -> None:
    split = digits.split("test")
    first = ask(target, split, SIZE, batch_size=1, concurrency=1).outputs
    for batch_size, concurrency in ((1, 8), (7, 3), (32, 4), (32, 1)):
        outputs = ask(target, split, SIZE, batch_size=batch_size, concurrency=concurrency).outputs
        assert outputs.ids == first.ids == split.ids
        np.testing.assert_allclose(outputs.logits, first.logits, rtol=1e-4, atol=1e-4)
        assert (outputs.predictions == first.predictions).mean() > 0.99


def test_every_answer_is_kept_under_its_own_request(digits: Dataset) -> None:
    """Requests that end in another order than they began."""
    split = digits.split("test")
    expected = {split.pixels(SIZE, [index]).tobytes(): index for index in range(40)}
    pause = threading.Event()

    class Uneven(Function):
        def scores(self, batch: Array) -> Array:
            pause.wait(0.002 * (int(abs(batch.sum())) % 5))
            return np.stack([np.full(10, float(sample.sum())) for sample in batch])

    answers = ask(Uneven(None), split, SIZE, batch_size=2, concurrency=8)
    inputs = SIZE.normalise(split.pixels(SIZE, range(len(split))))
    np.testing.assert_allclose(answers.outputs.logits[:, 0], inputs.sum(axis=(1, 2, 3)), rtol=1e-3, atol=0.1)
    assert len(expected) > 30  # the samples do differ
    assert np.isfinite(answers.latencies_ms).all()


def test_labels_in_another_order_are_matched_by_name(
    permuted_onnx: Path, qdq_onnx: Path, digits: Dataset, float_top1: float, tmp_path: Path
) -> None:
    plan = build(permuted_onnx, tmp_path / "permuted.plan", BuildConfig(timing_rounds=1))
    with Engine.load(plan.path) as engine:
        own = validate(PlanTarget(engine, plan.path), digits, ValidationOptions(reference=permuted_onnx))
        other = validate(PlanTarget(engine, plan.path), digits, ValidationOptions(reference=qdq_onnx))
    for report in (own, other):
        assert report.top1.value == pytest.approx(float_top1, abs=1)
        assert report.baseline is not None
        assert report.baseline["top1"] == pytest.approx(float_top1, abs=1)
        assert report.agreement is not None
        assert report.agreement > 99


def test_a_reference_with_other_labels_cannot_be_compared(
    target: PlanTarget, digits: Dataset, qdq_onnx: Path, tmp_path: Path
) -> None:
    model = onnx.load(qdq_onnx)
    helper.set_model_props(model, {"trtdeploy.labels": json.dumps([*LABELS[:-1], "ten"])})
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"labels of other\.onnx are not those of the model"):
        validate(target, digits, ValidationOptions(reference=tmp_path / "other.onnx"))


def test_a_reference_of_a_fixed_batch_is_asked_in_that_batch(
    target: PlanTarget, digits: Dataset, qdq_onnx: Path, tmp_path: Path
) -> None:
    model = onnx.load(qdq_onnx)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    report = validate(target, digits, ValidationOptions(reference=tmp_path / "one.onnx"))
    assert report.agreement is not None
    assert report.agreement > 99


def test_a_drop_of_exactly_the_limit_passes(digits: Dataset, tmp_path: Path) -> None:
    split = digits.split("test")
    ledger = with_float_stage(tmp_path / "ledger.json", digits, 100)
    lookup = {SIZE.normalise(split.pixels(SIZE, [index])).tobytes(): index for index in range(len(split))}

    for wrong in range(1, 12):

        def scores(batch: Array, wrong: int = wrong) -> Array:
            rows = [lookup[sample[None].tobytes()] for sample in batch]
            answers = [(split.labels[row] + (row < wrong)) % 10 for row in rows]
            return np.eye(10, dtype=np.float32)[answers]

        limit = 100 * wrong / len(split)
        report = validate(Function(scores), digits, ValidationOptions(max_drop=limit, batch_size=8), ledger=ledger)
        assert report.drop == pytest.approx(limit)
        assert report.passed, f"{wrong} of {len(split)} wrong"
        tighter = validate(
            Function(scores), digits, ValidationOptions(max_drop=limit * 0.99, batch_size=8), ledger=ledger
        )
        assert not tighter.passed
        if wrong == 2:
            break


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": 1.0}, "--max-drop needs something to drop from"),
        ({"min_agreement": 99.0}, "--min-agreement needs something to agree with"),
    ],
)
def test_a_gate_without_anything_to_compare_with_is_refused_before_asking(
    options: dict[str, Any], words: str, digits: Dataset
) -> None:
    def never(batch: Array) -> Array:
        raise AssertionError("asked")

    with pytest.raises(UsageError, match=words):
        validate(Function(never), digits, ValidationOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_drop": float("nan")},
        {"max_drop": float("inf")},
        {"min_agreement": -1},
        {"min_agreement": 101},
        {"min_agreement": float("nan")},
        {"batch_size": 0},
        {"concurrency": 0},
        {"unknown": 1},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ValidationOptions(**options)


@pytest.mark.parametrize(
    ("shape", "most", "batch_size", "words"),
    [
        ((-1, 3, 16, 16), None, 1, r"takes input float32\[\?, 3, 16, 16\].*\[1, 3, 32, 32\]"),
        ((-1, 3072), None, 1, r"\[\?, 3072\]"),
        ((-1, 3, 32, 32), 8, 9, "at most 8 samples per request, not 9"),
        ((4, 3, 32, 32), None, 4, "exactly 4 samples"),
    ],
    ids=["size", "rank", "batch", "fixed-batch"],
)
def test_a_target_that_does_not_take_these_images_is_refused_before_asking(
    shape: tuple[int, ...], most: int | None, batch_size: int, words: str, digits: Dataset
) -> None:
    class Odd(Function):
        input = TensorSpec(name="input", dtype="float32", shape=shape)
        max_batch_size = most

    with pytest.raises(ShapeError, match=words):
        validate(Odd(None), digits, ValidationOptions(batch_size=batch_size))


def test_classes_that_the_model_does_not_know_are_named(target: PlanTarget, tmp_path: Path) -> None:
    for name in ("1", "otter"):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
    with open_dataset(tmp_path / "data") as dataset, pytest.raises(DataError, match="otter"):
        validate(target, dataset, ValidationOptions())


def test_a_reference_that_is_no_model_is_refused_before_the_samples_are_sent(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    asked = []

    def scores(batch: Array) -> Array:
        asked.append(len(batch))
        return np.zeros((len(batch), 10), np.float32)

    with pytest.raises(ModelError, match=r"bad\.onnx"):
        validate(Function(scores), digits, ValidationOptions(reference=tmp_path / "bad.onnx"))
    assert len(asked) < len(digits.split("test")) / 2  # the latency of one, no more


def test_answers_that_are_not_finite_are_never_recorded(digits: Dataset, tmp_path: Path) -> None:
    ledger = with_float_stage(tmp_path / "ledger.json", digits, 90)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def scores(batch: Array) -> Array:
        answer = np.zeros((len(batch), 10), np.float32)
        answer[0, 3] = np.nan
        return answer

    with pytest.raises(LedgerError, match="not finite"):
        validate(Function(scores), digits, ValidationOptions(), ledger=ledger)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_first_failure_ends_the_run_and_says_how_far_it_came(digits: Dataset, tmp_path: Path) -> None:
    ledger = with_float_stage(tmp_path / "ledger.json", digits, 90)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    count = threading.Semaphore(60)

    def scores(batch: Array) -> Array:
        if not count.acquire(blocking=False):
            raise ServerError("gone")
        return np.zeros((len(batch), 10), np.float32)

    with pytest.raises(ServerError, match=r"\d+ of 359 requests were answered, then: gone"):
        validate(Function(scores), digits, ValidationOptions(), ledger=ledger)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert threading.active_count() < 10


def test_a_short_answer_is_a_server_error(digits: Dataset) -> None:
    def scores(batch: Array) -> Array:
        return np.zeros((max(1, len(batch) - 1), 10), np.float32)

    with pytest.raises(ServerError, match="answered 3 of 4 samples"):
        validate(Function(scores), digits, ValidationOptions(batch_size=4))


class Scoring(Function):
    """Says how many classes it scores, as served models and plans do."""

    def __init__(self, count: int, labels: tuple[str, ...] | None, *, says_so: bool = True) -> None:
        super().__init__(lambda batch: np.zeros((len(batch), count), np.float32), labels)
        self.score_count = count if says_so else None
        self.asked = 0

    def scores(self, batch: Array) -> Array:
        self.asked += 1
        return super().scores(batch)


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize(
    ("count", "labels", "kind", "words"),
    [
        (12, tuple(LABELS), ModelError, "10 labels and scores 12 classes"),
        (10, (*LABELS, "more"), ModelError, "11 labels and scores 10 classes"),
        (5, None, DataError, "digits has 10 classes; function scores 5"),
    ],
)
def test_scores_that_the_classes_do_not_fit_are_refused_before_the_split_is_sent(
    count: int,
    labels: tuple[str, ...] | None,
    kind: type[Exception],
    words: str,
    says_so: bool,
    digits: Dataset,
    tmp_path: Path,
) -> None:
    target = Scoring(count, labels, says_so=says_so)
    options = ValidationOptions(max_variation=50 if says_so else None)  # measured before anything else is asked
    with pytest.raises(kind, match=words):
        validate(target, digits, options, ledger=Ledger(tmp_path / "ledger.json"))
    assert target.asked == (0 if says_so else 1)
    assert not list(tmp_path.iterdir())
    fits = Scoring(10, tuple(LABELS))
    fits.version = "2"
    with pytest.raises(kind, match=words):
        validate(fits, digits, ValidationOptions(), others=[target])
    assert fits.asked <= 1


def test_a_reference_that_scores_other_classes_is_refused(digits: Dataset, qdq_onnx: Path) -> None:
    target = Scoring(12, None)
    with pytest.raises(UsageError, match=r"function scores 12 classes, classifier.onnx 10"):
        validate(target, digits, ValidationOptions(reference=qdq_onnx))


def test_a_target_without_preprocessing_needs_to_be_given_one(digits: Dataset) -> None:
    class Bare(Function):
        preprocessing = None

    with pytest.raises(UsageError, match="--preprocessing"):
        validate(Bare(None), digits, ValidationOptions())

    def scores(batch: Array) -> Array:
        return np.zeros((len(batch), 10), np.float32)

    assert validate(Bare(scores), digits, ValidationOptions(preprocessing=SIZE, batch_size=8)).n == 359


def test_a_drop_that_is_small_but_not_shown_fails_where_it_must_be_shown(digits: Dataset, tmp_path: Path) -> None:
    split = digits.split("test")
    ledger = with_float_stage(tmp_path / "ledger.json", digits, 100)
    lookup = {SIZE.normalise(split.pixels(SIZE, [index])).tobytes(): index for index in range(len(split))}

    def scores(batch: Array) -> Array:
        rows = [lookup[sample[None].tobytes()] for sample in batch]
        return np.eye(10, dtype=np.float32)[[(split.labels[row] + (row < 2)) % 10 for row in rows]]

    for limit, passed in ((1.0, [True, False]), (3.0, [True, True])):
        options = ValidationOptions(max_drop=limit, prove_drop=True, batch_size=8)
        report = validate(Function(scores), digits, options, ledger=ledger)
        assert [gate.name for gate in report.gates] == ["top-1 drop", "top-1 drop, shown"]
        assert [gate.passed for gate in report.gates] == passed
        assert report.gates[1].value > report.gates[0].value
    with pytest.raises(UsageError, match="--prove-drop needs a --max-drop"):
        validate(Function(scores), digits, ValidationOptions(prove_drop=True), ledger=ledger)


# the command, with --plan


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["validate", "--data", "digits", *map(str, arguments)])


def test_the_command_records_the_plan_stage_and_prints_json(qdq_plan: Plan, qdq_onnx: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    done = run("--plan", qdq_plan.path, "--reference", qdq_onnx, "--ledger", ledger, "--batch-size", 32, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["passed"] is True
    assert facts["agreement"] > 99
    recorded = Ledger(ledger).stages
    assert list(recorded) == ["plan"]
    assert recorded["plan"].top1.value == facts["top1"]["value"]
    assert recorded["plan"].source["file"] == qdq_plan.path.name
    assert recorded["plan"].latency_ms is not None


def test_a_gate_decides_the_exit_code(qdq_plan: Plan, digits: Dataset, float_top1: float, tmp_path: Path) -> None:
    ledger = with_float_stage(tmp_path / "ledger.json", digits, float_top1 + 5).path
    common = ("--plan", qdq_plan.path, "--ledger", ledger, "--batch-size", 32)
    assert run(*common, "--max-drop", 10).exit_code == 0
    failed = run(*common, "--max-drop", 1)
    assert failed.exit_code == 1
    assert "FAILED" in failed.stdout
    assert "limit 1" in failed.stdout
    assert "plan" in Ledger(ledger).stages  # what was measured is recorded, whatever the gate says


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-drop", "nan"], "max_drop: Input should be a finite number"),
        (["--max-drop", "1"], "--max-drop needs something to drop from"),
        (["--min-agreement", "101"], "min_agreement"),
        (["--min-agreement", "90"], "--min-agreement needs something to agree with"),
        (["--batch-size", "33"], "33"),
        (["--url", "grpc://127.0.0.1:1", "--model", "m"], "Give --url and --model"),
        (["--version", "7"], "--version 7 is a version on a server"),
        (["--retries", "3"], "leave out the options of one"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "0"], "--timeout"),
        (["--reference", "absent.onnx"], "absent.onnx"),
        (["--preprocessing", "absent.json"], "absent.json"),
        (["--data", "absent"], "There is no dataset at absent"),
    ],
)
def test_wrong_usage_ends_with_exit_code_2(arguments: list[str], words: str, qdq_plan: Plan) -> None:
    done = run("--plan", qdq_plan.path, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{}", b"nonsense"])
def test_a_damaged_preprocessing_file_is_named(content: bytes, qdq_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_bytes(content)
    done = run("--plan", qdq_plan.path, "--preprocessing", tmp_path / "spec.json")
    assert done.exit_code == 2
    assert "spec.json is no preprocessing specification" in done.stderr


def test_images_of_another_size_end_with_exit_code_2(qdq_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(Preprocessing.square(16).to_json())
    done = run("--plan", qdq_plan.path, "--preprocessing", tmp_path / "spec.json")
    assert done.exit_code == 2
    assert "takes input float32[?, 3, 32, 32]" in done.stderr
    assert "[1, 3, 16, 16]" in done.stderr


def test_a_model_that_answers_nan_ends_with_exit_code_2_and_records_nothing(qdq_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq_onnx)
    model.graph.node[-1].output[0] = "finite"
    nodes, constants = nan_on_images("finite", "logits")
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    onnx.save(model, tmp_path / "nan.onnx")
    plan = build(tmp_path / "nan.onnx", tmp_path / "nan.plan", BuildConfig(timing_rounds=1))
    done = run("--plan", plan.path, "--ledger", tmp_path / "ledger.json", "--batch-size", 32)
    assert done.exit_code == 2
    assert "not finite" in done.stderr
    assert not list(tmp_path.glob("ledger*"))
