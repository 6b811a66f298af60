"""What a pipeline's answers become, and which pipelines can be validated; a real one is in the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trtdeploy.data import Dataset, open_dataset
from trtdeploy.data.preprocessing import Preprocessing, open_image
from trtdeploy.errors import LedgerError, ServerError, UsageError
from trtdeploy.ledger import StageOutputs
from trtdeploy.tensors import Array, TensorSpec
from trtdeploy.triton.client import Endpoint, InferenceClient, Reply, ServedModel
from trtdeploy.triton.targets.image_pipeline import EncodedTarget, served_target
from trtdeploy.triton.targets.served_classifier import ServedTarget
from trtdeploy.validation import ValidationOptions, validate
from trtdeploy.validation.top_k import compare_top_k

CLASSES = tuple(str(digit) for digit in range(10))


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


IMAGE = spec("image", "bytes", -1, 1)
NAMES, SHARES = spec("labels", "bytes", -1, 3), spec("probabilities", "float32", -1, 3)
SCORES = spec("scores", "float32", -1, 10)


def model(name: str, inputs: list[TensorSpec], outputs: list[TensorSpec], **facts: Any) -> ServedModel:
    given = {"max_batch_size": 8, "preprocessing": None, "labels": None, **facts}
    return ServedModel(name, "1", tuple(inputs), tuple(outputs), **given)


PREPARE = model("prepare", [IMAGE], [spec("t", "float32", -1, 3, 8, 8)], preprocessing=Preprocessing.square(8))
CHOOSE = model("choose", [SCORES], [NAMES, SHARES], labels=CLASSES)


class Pipeline(InferenceClient):
    """A client whose server is a Python function of the files' bytes."""

    def __init__(self, *models: ServedModel, answer: Any = None) -> None:
        super().__init__(Endpoint("grpc", "nowhere:1"))
        self._models = {each.name: each for each in models}
        self._answer = answer
        self.sent: list[Array] = []

    def describe(self, name: str, version: str = "") -> ServedModel:
        return self._models[name]

    def request(self, model: ServedModel, inputs: Any, *, any_version: bool = False) -> Reply:
        (batch,) = inputs.values()
        self.sent.append(batch)
        return Reply("1", self._answer(batch))

    def statistics(self, model: ServedModel) -> dict[str, Any]:
        return {}

    def _nothing(self, *arguments: Any) -> Any:
        raise NotImplementedError

    _disconnect = _metadata_and_config = _statistics = _exchange = _nothing  # type: ignore[assignment]
    _register = _unregister = _registered = _nothing  # type: ignore[assignment]


def pipeline(outputs: list[TensorSpec], answer: Any, *, image: TensorSpec = IMAGE, **facts: Any) -> Pipeline:
    facts = {"steps": ("prepare", "choose"), **facts}
    return Pipeline(model("pipe", [image], outputs, **facts), PREPARE, CHOOSE, answer=answer)


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with open_dataset("digits") as dataset:
        yield dataset


def brightness(content: bytes) -> float:
    return float(np.asarray(open_image(content)).mean())


def test_named_classes_become_scores_whose_softmax_is_their_probability() -> None:
    shares = np.array([[0.7, 0.2, 0.05], [1.0, 1e-9, 0.0]], np.float32)
    names = np.array([[b"7", b"0", b"3"], [b"1", b"2", b"4"]], object)
    client = pipeline([NAMES, SHARES], lambda batch: {"labels": names, "probabilities": shares})
    target = served_target(client, "pipe")
    assert isinstance(target, EncodedTarget)
    assert (target.labels, target.top_k, target.takes_files) == (CLASSES, 3, True)
    assert target.preprocessing == Preprocessing.square(8)
    scores = target.scores(np.array([[b"a"], [b"b"]], object))
    assert scores.shape == (2, 10)
    softmax = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax[0, [7, 0, 3]], [0.7, 0.2, 0.05], atol=1e-4)
    np.testing.assert_allclose(softmax[0, [1, 2, 4, 5, 6, 8, 9]], 0.05 / 7, atol=1e-4)
    np.testing.assert_allclose(softmax[1, 1], 1, atol=1e-3)
    assert scores.argmax(axis=1).tolist() == [7, 1]
    assert np.isfinite(scores).all()


def test_scores_that_are_no_probabilities_keep_their_order() -> None:
    names, scores = np.array([[b"2", b"1", b"0"]], object), np.array([[9.0, 3.0, -4.0]], np.float32)
    client = pipeline([NAMES, SHARES], lambda batch: {"labels": names, "probabilities": scores})
    (row,) = served_target(client, "pipe").scores(np.array([[b"a"]], object))
    assert row[[2, 1, 0]].tolist() == [9, 3, -4]
    assert set(row[3:]) == {-5}


def test_the_files_of_a_dataset_are_sent_as_they_are(digits: Dataset) -> None:
    """The answer is computed from the bytes that came: a wrong order or other bytes would show."""
    split = digits.split("test")
    expected = {split.file(index): int(label) for index, label in enumerate(split.labels)}

    def answer(batch: Array) -> dict[str, Array]:
        best = [expected[content] for content in batch.ravel()]
        names = [[str((digit + step) % 10).encode() for step in range(3)] for digit in best]
        return {
            "labels": np.array(names, object),
            "probabilities": np.tile(np.float32([0.6, 0.3, 0.1]), (len(best), 1)),
        }

    client = pipeline([NAMES, SHARES], answer)
    report = validate(served_target(client, "pipe"), digits, ValidationOptions(batch_size=4, max_variation=1))
    assert report.top1.value == 100
    assert report.top_k is not None
    assert report.top_k.accuracy.value == 100
    assert {batch.shape for batch in client.sent} >= {(4, 1), (1, 1)}
    pixels = split.pixels(Preprocessing.square(8), range(3))
    decoded = [np.asarray(open_image(split.file(index)).convert("RGB")) for index in range(3)]
    np.testing.assert_array_equal(pixels, decoded)  # PNG loses nothing


def test_uint8_files_are_padded_and_all_scores_are_taken_as_they_are(digits: Dataset) -> None:
    image = spec("image", "uint8", -1, -1)

    def answer(batch: Array) -> dict[str, Array]:
        values = [brightness(row.tobytes()) for row in batch]
        return {"scores": np.array([np.eye(10)[int(value) % 10] for value in values], np.float32)}

    client = pipeline([SCORES], answer, image=image)
    target = served_target(client, "pipe")
    assert (target.takes_files, target.top_k) == (True, None)
    split = digits.split("test")
    batch = target.prepare(split, None, [0, 1, 2])
    files = [split.file(index) for index in range(3)]
    assert batch.shape == (3, max(map(len, files)))
    assert [row.tobytes().rstrip(b"\0") for row in batch] == [content.rstrip(b"\0") for content in files]
    expected = [int(brightness(content)) % 10 for content in files]
    assert target.scores(batch).argmax(axis=1).tolist() == expected
    assert validate(target, digits, ValidationOptions(batch_size=2)).n == len(split)


@pytest.mark.parametrize(
    ("names", "shares", "words"),
    [
        ([[b"1", b"2", b"cat"]], [[0.5, 0.3, 0.1]], "answered the class 'cat', which is none of its 10 labels"),
        ([[b"1", b"2"]], [[0.5, 0.3, 0.1]], r"names of shape \[1, 2\] and probabilities of \[1, 3\]"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_server_error(names: Any, shares: Any, words: str) -> None:
    answers = {"labels": np.array(names, object), "probabilities": np.array(shares, np.float32)}
    target = served_target(pipeline([NAMES, SHARES], lambda batch: answers), "pipe")
    with pytest.raises(ServerError, match=words):
        target.scores(np.array([[b"a"]], object))


def test_probabilities_that_are_not_finite_are_seen(digits: Dataset) -> None:
    def answer(batch: Array) -> dict[str, Array]:
        names = np.tile(np.array([b"1", b"2", b"3"], object), (len(batch), 1))
        return {"labels": names, "probabilities": np.full((len(batch), 3), np.nan, np.float32)}

    with pytest.raises(LedgerError, match="not finite"):
        validate(served_target(pipeline([NAMES, SHARES], answer), "pipe"), digits, ValidationOptions())


@pytest.mark.parametrize(
    ("outputs", "facts", "words"),
    [
        ([NAMES], {}, "takes image files, and answers"),
        ([NAMES, SHARES, SCORES], {}, "takes image files, and answers"),
        ([NAMES, SHARES], {"steps": ("prepare",)}, "says what its classes are"),
    ],
)
def test_what_is_no_pipeline_of_ours_is_refused(outputs: list[TensorSpec], facts: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        served_target(pipeline(outputs, None, **facts), "pipe")


def test_a_classifier_of_tensors_is_a_plain_target() -> None:
    plain = model("m", [spec("x", "float32", -1, 3, 8, 8)], [SCORES])
    target = served_target(Pipeline(plain), "m")
    assert type(target) is ServedTarget
    several = model("m", [spec("x", "float32", -1, 3, 8, 8)], [SCORES, SHARES])
    with pytest.raises(UsageError, match="1 inputs and 2 outputs"):
        served_target(Pipeline(several), "m")
    endless = model("m", [spec("x", "float32", -1, 3, 8, 8)], [SCORES], decoupled=True)
    with pytest.raises(UsageError, match="any number of times"):
        served_target(Pipeline(endless), "m")


def test_top_k_counts_the_true_class_and_what_the_reference_names() -> None:
    labels = np.array([0, 1, 2])
    ids = ("a", "b", "c")
    ours = StageOutputs(ids, labels, np.float32([[3, 2, 1, 0], [0, 3, 2, 1], [3, 2, 0, 1]]))
    theirs = StageOutputs(ids, labels, np.float32([[2, 3, 1, 0], [0, 3, 2, 1], [3, 2, 1, 0]]))
    found = compare_top_k(ours, theirs, 2)
    assert found.accuracy.value == pytest.approx(200 / 3)
    assert found.same_classes == 100
    assert found.largest_difference == pytest.approx(100 * (np.exp(3) - np.exp(2)) / np.exp(range(4)).sum(), rel=1e-4)
    assert compare_top_k(ours, theirs, 3).same_classes == pytest.approx(200 / 3)
    assert compare_top_k(ours, None, 2).same_classes is None
