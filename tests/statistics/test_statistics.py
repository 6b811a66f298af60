from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trtdeploy.statistics import Interval, percentile, wilson_percent

# Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, 1998, table I,
# method 3 (score interval without continuity correction), 95%.
PUBLISHED = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), PUBLISHED)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_percent(successes, n)
    assert interval.value == pytest.approx(100 * successes / n)
    assert interval.low == pytest.approx(100 * low, abs=0.005)
    assert interval.high == pytest.approx(100 * high, abs=0.005)


@given(data=st.data(), n=st.integers(1, 60_000), confidence=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(deadline=None)
def test_wilson_agrees_with_scipy(data: st.DataObject, n: int, confidence: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    successes = data.draw(st.integers(0, n))
    expected = scipy_stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    interval = wilson_percent(successes, n, confidence=confidence)
    assert interval.low == pytest.approx(100 * expected.low, abs=1e-9)
    assert interval.high == pytest.approx(100 * expected.high, abs=1e-9)
    assert 0 <= interval.low <= interval.value <= interval.high <= 100


def test_wilson_at_the_ends_is_exactly_0_or_100() -> None:
    assert wilson_percent(0, 7).low == 0
    assert wilson_percent(7, 7).high == 100
    assert wilson_percent(7, 7).low < 100


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson_percent(successes, n)


@pytest.mark.parametrize(("q", "n"), [(50, 60), (50, 1000), (90, 300), (95, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_a_percentile_covers_it_as_often_as_it_says(q: float, n: int, confidence: float) -> None:
    repeats = 1500
    true_value = -math.log(1 - q / 100)  # of the exponential distribution
    samples = np.random.default_rng([n, int(q)]).exponential(size=(repeats, n))
    intervals = [percentile(row, q, confidence=confidence) for row in samples]
    coverage = np.mean([interval.low <= true_value <= interval.high for interval in intervals])
    noise = 3 * math.sqrt(confidence * (1 - confidence) / repeats)
    # Ranks are whole numbers and are rounded outward, so the interval may cover more; for these n by at most 8 points.
    assert confidence - noise <= coverage <= confidence + 0.08
    assert np.mean([interval.value for interval in intervals]) == pytest.approx(true_value, rel=0.05)


@given(
    samples=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200),
    q=st.floats(0, 100),
)
@settings(deadline=None)
def test_a_percentile_lies_in_its_interval_and_the_interval_in_the_samples(samples: list[float], q: float) -> None:
    interval = percentile(samples, q)
    assert min(samples) <= interval.low <= interval.value <= interval.high <= max(samples)
    assert {interval.low, interval.high} <= set(samples)
    assert interval.value == np.percentile(samples, q)


def test_a_percentile_does_not_depend_on_the_order_and_leaves_the_samples_alone() -> None:
    samples = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert percentile(samples, 50) == percentile(sorted(samples), 50)
    assert samples == [3, 1, 2, 5, 4]


def test_too_few_samples_end_the_interval_at_the_extremes() -> None:
    assert percentile([7.0], 99) == Interval(value=7, low=7, high=7)
    assert percentile([1.0, 2.0, 3.0, 4.0], 50).low == 1
    assert percentile(list(range(1, 31)), 99).high == 30


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_samples_that_have_no_percentile_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one sample, all of them finite"):
        percentile(samples, 50)


@pytest.mark.parametrize("q", [-1, 100.5, math.nan])
def test_percentiles_beyond_0_and_100_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0, 2.0], q)


def test_an_interval_prints_with_its_bounds_and_refuses_nan() -> None:
    assert Interval(value=83.6, low=82.864, high=84.306).format() == "83.60 [82.86, 84.31]"
    assert Interval(value=1.26, low=1, high=2).format(1) == "1.3 [1.0, 2.0]"
    with pytest.raises(ValidationError):
        Interval(value=math.nan, low=0, high=1)
