"""How many samples are run together: what the choice is, and which sizes are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trtdeploy.engine import Engine, batching
from trtdeploy.errors import ShapeError
from trtdeploy.plan import Manifest
from trtdeploy.tensors import Array, ShapeRange, TensorSpec


class Clock:
    """Stands still but where an engine runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(batching, "time", made)
    return made


def engine(clock: Clock, seconds: Callable[[int], float], sizes: list[int], *profiles: tuple[int, int]) -> Engine:
    """An engine of one input that takes so many seconds for so many samples, and writes down their numbers."""

    def infer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        (array,) = inputs.values()
        assert array.shape[1:] == (3, 4)
        sizes.append(len(array))
        clock.now += seconds(len(array))
        return {"y": array}

    spec = TensorSpec(name="x", dtype="float32", shape=(-1, 3, 4))
    ranges = tuple({"x": ShapeRange(min=(low, 3, 4), opt=(low, 3, 4), max=(high, 3, 4))} for low, high in profiles)
    manifest = Manifest.model_construct(inputs=(spec,), profiles=ranges)
    return cast(Engine, SimpleNamespace(inputs=(spec,), infer=infer, manifest=manifest))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0}, 1),  # no gain at all
        ({1: 10.0, 2: 19.2, 4: 38.4, 8: 80.0}, 1),  # 4%: less than waiting and copying are worth
        ({1: 10.0, 2: 18.0, 4: 36.0, 8: 80.0}, 2),  # 10%, from two on
        ({1: 10.0, 2: 11.0, 4: 13.0, 8: 17.0}, 8),  # a run costs more than its samples
        ({1: 10.0, 2: 11.0, 4: 13.0, 6: 60.0}, 4),  # the largest leaves the caches
        ({8: 3.0}, 8),
    ],
)
def test_the_smallest_size_that_is_worth_it(seconds: dict[int, float], expected: int) -> None:
    assert batching.smallest_worthwhile(seconds) == expected


def test_sizes_end_where_nothing_is_saved_any_more(clock: Clock) -> None:
    sizes: list[int] = []
    assert batching.fastest_batch(engine(clock, lambda count: 0.1 * count, sizes), 64) == 1
    assert max(sizes) == 4
    sizes.clear()
    assert batching.fastest_batch(engine(clock, lambda count: 0.1 + 0.001 * count, sizes), 48) == 48
    assert set(sizes) == {1, 2, 4, 8, 16, 32, 48}


def test_a_slow_run_by_chance_does_not_decide(clock: Clock) -> None:
    sizes: list[int] = []

    def seconds(count: int) -> float:
        first_look = sizes.count(count) <= 2
        return 0.001 * count * (5 if count == 2 and first_look else 1) + 0.002

    assert batching.fastest_batch(engine(clock, seconds, sizes), 2) == 2


def test_only_sizes_that_a_profile_covers_are_run(clock: Clock) -> None:
    sizes: list[int] = []
    made = engine(clock, lambda count: 0.1 * count, sizes, (2, 3), (8, 8))
    assert batching.fastest_batch(made, 8) == 2
    assert set(sizes) == {2, 8}


def test_nothing_is_measured_where_there_is_no_choice(clock: Clock) -> None:
    sizes: list[int] = []
    made = engine(clock, lambda count: 0.1, sizes)
    assert [batching.fastest_batch(made, largest) for largest in (0, 1)] == [0, 1]
    assert not sizes


def test_a_network_that_random_values_cannot_be_run_through_takes_what_its_profile_does(clock: Clock) -> None:
    def infer(_: Mapping[str, Array]) -> dict[str, Array]:
        raise ShapeError("the indices are out of range")

    made: Any = engine(clock, lambda count: 0.1, [])
    made.infer = infer
    assert batching.fastest_batch(made, 8) == 8


def test_samples_of_different_requests_differ(clock: Clock) -> None:
    seen: list[Array] = []
    made: Any = engine(clock, lambda count: 0.1 * count, [])
    real = made.infer
    made.infer = lambda inputs: (seen.append(inputs["x"]), real(inputs))[1]
    batching.fastest_batch(made, 2)
    joined = next(array for array in seen if len(array) == 2)
    assert not np.array_equal(joined[0], joined[1])
