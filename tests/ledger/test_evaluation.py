from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtdeploy.data import Dataset, Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.data.stores import ImageStore
from trtdeploy.errors import DataError, InferenceError, LedgerError
from trtdeploy.ledger.evaluation import collect, evaluate, map_labels, median_latency_ms
from trtdeploy.tensors import Array

PREPROCESSING = Preprocessing(resize=(4, 4), mean=(0, 0, 0), std=(1, 1, 1))
CLASSES = ("black", "grey", "white")
N = 23


class Shades(ImageStore):
    """Images of one grey level each; the level is the name of the file."""

    def __init__(self) -> None:
        levels = np.random.default_rng(0).permutation(250)[:N]
        self.paths = [f"test/{CLASSES[min(level // 84, 2)]}/{level}.png" for level in levels]
        super().__init__("shades", self.paths, set())

    def read(self, path: str) -> bytes:
        raise AssertionError("shades are made, not read")

    def image(self, path: str) -> Image.Image:
        return Image.new("L", (5, 6), int(Path(path).stem))


def shade(path: str) -> float:
    return int(Path(path).stem) / 255


@pytest.fixture
def dataset() -> Dataset:
    store = Shades()
    pairs = [(path, CLASSES.index(path.split("/")[1])) for path in store.paths]
    return Dataset(store, CLASSES, {"test": pairs})


@pytest.fixture
def split(dataset: Dataset) -> Split:
    return dataset.split("test")


def classifier(inputs: Array) -> Array:
    """Score the three classes by how near the mean of the input is to 0.16, 0.5 and 0.84."""
    means = inputs.mean(axis=(1, 2, 3))
    scores: Array = -np.abs(means[:, np.newaxis] - np.array([0.16, 0.5, 0.84]))
    return scores


def test_outputs_come_in_the_order_of_the_split(split: Split) -> None:
    outputs = evaluate(classifier, split, PREPROCESSING, batch_size=5).outputs
    assert outputs.ids == split.ids
    assert outputs.labels.tolist() == split.labels.tolist()
    expected = [[-abs(shade(path) - centre) for centre in (0.16, 0.5, 0.84)] for path in split.ids]
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-6)
    assert outputs.logits.dtype == np.float32
    assert outputs.top1.value > 90


@pytest.mark.parametrize("batch_size", [1, 2, N - 1, N, N + 1, 1000])
def test_the_batch_size_does_not_matter(split: Split, batch_size: int) -> None:
    sizes: list[int] = []

    def counting(inputs: Array) -> Array:
        sizes.append(len(inputs))
        return classifier(inputs)

    outputs = evaluate(counting, split, PREPROCESSING, batch_size=batch_size).outputs
    np.testing.assert_array_equal(outputs.logits, evaluate(classifier, split, PREPROCESSING).outputs.logits)
    assert sum(sizes) == N
    assert max(sizes) == min(batch_size, N)


def test_the_model_sees_what_preprocessing_gives(split: Split) -> None:
    seen: list[Array] = []

    def spy(inputs: Array) -> Array:
        seen.append(inputs)
        return classifier(inputs)

    evaluate(spy, split, PREPROCESSING, batch_size=10)
    expected = PREPROCESSING([split.image(index) for index in range(N)])
    np.testing.assert_array_equal(np.concatenate(seen), expected)


def test_a_label_map_turns_the_datasets_classes_into_the_models(dataset: Dataset, split: Split) -> None:
    model_labels = ["white", "unused", "black", "grey"]
    mapping = map_labels(dataset, model_labels)
    assert mapping == [2, 3, 0]

    def other_order(inputs: Array) -> Array:
        black, grey, white = classifier(inputs).T
        return np.stack([white, np.full_like(white, -9), black, grey], axis=1)

    mapped = evaluate(other_order, split, PREPROCESSING, label_map=mapping).outputs
    plain = evaluate(classifier, split, PREPROCESSING).outputs
    assert mapped.labels.tolist() == [mapping[label] for label in split.labels]
    assert mapped.top1 == plain.top1
    assert mapped.top1.value > evaluate(other_order, split, PREPROCESSING).outputs.top1.value


def test_progress_is_told_after_every_batch(split: Split) -> None:
    told: list[tuple[int, int]] = []
    evaluate(classifier, split, PREPROCESSING, batch_size=10, progress=lambda done, total: told.append((done, total)))
    assert told == [(10, N), (20, N), (N, N)]


def test_seconds_are_wall_time(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 2.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert evaluate(classifier, split, PREPROCESSING).seconds == 2.5


def test_extra_axes_of_size_one_are_dropped(split: Split) -> None:
    outputs = evaluate(lambda inputs: classifier(inputs)[:, :, np.newaxis, np.newaxis], split, PREPROCESSING).outputs
    np.testing.assert_array_equal(outputs.logits, evaluate(classifier, split, PREPROCESSING).outputs.logits)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda inputs: np.repeat(classifier(inputs), 2, axis=0),
        lambda inputs: classifier(inputs)[:-1],
        lambda inputs: np.zeros((32, 3)),
        lambda inputs: classifier(inputs).argmax(axis=1),
        lambda inputs: np.float32(0),
    ],
    ids=["twice the rows", "a row short", "a fixed batch", "class indices", "a scalar"],
)
def test_an_answer_that_has_not_one_row_per_sample_is_refused(split: Split, wrong: object) -> None:
    with pytest.raises(InferenceError, match="one row of class scores per sample"):
        evaluate(wrong, split, PREPROCESSING, batch_size=8)  # type: ignore[arg-type]


def test_an_answer_that_is_not_finite_is_refused(split: Split) -> None:
    def broken(inputs: Array) -> Array:
        scores = classifier(inputs)
        scores[0, 1] = np.nan
        return scores

    with pytest.raises(LedgerError, match=f"5 of {N} samples is not finite"):
        evaluate(broken, split, PREPROCESSING, batch_size=5)


def test_an_error_of_the_model_is_not_disguised(split: Split) -> None:
    def failing(inputs: Array) -> Array:
        raise InferenceError("out of memory")

    with pytest.raises(InferenceError, match="out of memory"):
        evaluate(failing, split, PREPROCESSING)


def test_collect_refuses_scores_of_fewer_samples_than_the_split(split: Split) -> None:
    with pytest.raises(LedgerError, match="do not belong together"):
        collect(split, [np.zeros((N - 1, 3))])
    assert collect(split, [np.zeros((10, 3)), np.ones((N - 10, 3))]).logits[:, 0].tolist() == [0] * 10 + [1] * (N - 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["black", "white"], "does not know: grey"),
        ([], "does not know: black, grey, white"),
        (["Black", "grey", "white"], "does not know: black"),
        (["black", "grey", "white", "grey"], "Several of the model's outputs are named grey"),
    ],
)
def test_classes_without_one_output_of_the_model_are_named(dataset: Dataset, labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        map_labels(dataset, labels)


def test_a_name_that_the_model_has_twice_does_not_matter_where_the_dataset_lacks_it(dataset: Dataset) -> None:
    assert map_labels(dataset, ["crane", "black", "crane", "grey", "white"]) == [1, 3, 4]


def test_median_latency_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([9.0, 9.0, 0.001, 0.005, 0.002])

    def call() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert median_latency_ms(call, warm_up=2, repeats=3) == pytest.approx(2.0)
    assert next(durations, None) is None
