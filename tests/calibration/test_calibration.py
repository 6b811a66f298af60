from __future__ import annotations

import numpy as np
import pytest

from trtdeploy.calibration import METHODS, AbsHistogram, AbsMaximum, amax_of
from trtdeploy.calibration.entropy import entropy_bin
from trtdeploy.calibration.squared_error import candidates_of, squared_errors
from trtdeploy.errors import QuantizationError

RNG = np.random.default_rng(0)


def collected(*parts: np.ndarray) -> AbsHistogram:
    histogram = AbsHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 3e37])
def test_counts_are_those_of_float64(scale: float) -> None:
    parts = [np.zeros(5, np.float32)]
    parts += [(RNG.normal(size=(50, 41)) * scale * grow).astype(np.float32) for grow in (1e-3, 1, 0.5)]
    histogram = collected(*parts)
    values = np.abs(np.concatenate([part.ravel() for part in parts]).astype(np.float64))
    expected = np.bincount((values / histogram.width).astype(np.int64), minlength=histogram.counts.size)
    assert np.array_equal(histogram.counts, expected)
    assert (histogram.n, histogram.largest) == (values.size, values.max())


def test_counts_go_beyond_what_float32_can_count() -> None:
    histogram = collected(np.ones(1, np.float32))
    histogram.counts *= 1 << 25
    histogram.add(np.ones(3, np.float32))
    assert histogram.counts.max() == (1 << 25) + 3


@pytest.mark.parametrize("kind", [AbsHistogram, AbsMaximum])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_counted(bad: float, kind: type[AbsMaximum]) -> None:
    values = kind()
    values.add(np.ones(2, np.float32))
    with pytest.raises(QuantizationError, match="1 of 2 values"):
        values.add(np.array([1, bad], np.float32))
    assert (values.n, values.largest) == (2, 1)


def test_the_largest_value_alone_gives_the_same_range_and_nothing_else() -> None:
    parts = [RNG.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(3)]
    maximum = AbsMaximum()
    for part in parts:
        maximum.add(part)
    assert amax_of(maximum, "max") == amax_of(collected(*parts), "max") == max(np.abs(part).max() for part in parts)
    with pytest.raises(QuantizationError, match="'entropy' needs a histogram"):
        amax_of(maximum, "entropy")


def test_an_empty_histogram_has_no_range() -> None:
    with pytest.raises(QuantizationError, match="no values"):
        amax_of(AbsHistogram(), "mse")


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 100])
def test_a_percentile_is_the_bin_of_the_value_of_that_rank(percentile: float) -> None:
    values = RNG.laplace(size=10_000).astype(np.float32)
    histogram = collected(values)
    exact = np.sort(np.abs(values))[round(percentile * 100) - 1]
    assert exact <= amax_of(histogram, "percentile", percentile=percentile) <= exact + histogram.width


def test_squared_errors_are_those_of_quantizing_every_centre() -> None:
    counts = np.bincount((np.abs(RNG.normal(size=9999)) * 300).astype(int))
    candidates = candidates_of(counts.size)
    centres = np.arange(counts.size) + 0.5
    for edge, error in zip(candidates, squared_errors(counts, candidates), strict=True):
        scale = edge / 127
        rounded = scale * np.clip(np.rint(centres / scale), -128, 127)
        assert error == pytest.approx((counts * (centres - rounded) ** 2).sum() / counts.sum(), rel=1e-6)


def test_no_range_is_larger_than_the_largest_value() -> None:
    histogram = collected(np.full(3, 5.1, np.float32))
    for method in METHODS:
        assert 0 < amax_of(histogram, method) <= np.float32(5.1)


def test_the_range_of_zeros_is_zero() -> None:
    assert {amax_of(collected(np.zeros(3, np.float32)), method) for method in METHODS} == {0.0}


def test_entropy_never_clips_a_gate_to_its_smallest_value() -> None:
    """The least divergence of values between 0.04 and 1 is where all are clipped to 0.04: pytorch-quantization's."""
    gate = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0, 0.6, 100_000).clip(-3.1, 3.1)))
    histogram = AbsHistogram()
    histogram.add(gate.astype(np.float32))
    assert entropy_bin(histogram.coarse(4096)[0]) * histogram.coarse(4096)[1] < np.percentile(gate, 1)
    assert amax_of(histogram, "entropy") == histogram.largest


def relative_errors(samples, amax):
    """Mean over samples of |x - q(x)|^2 / |x|^2, straight from the definition."""
    scale = amax / 127
    quantized = np.clip(np.rint(samples / scale), -128, 127) * scale
    return float(np.mean(((samples - quantized) ** 2).sum(axis=1) / (samples**2).sum(axis=1)))


def test_relative_mse_lets_every_sample_count_the_same():
    rng = np.random.default_rng(3)
    samples = np.abs(rng.standard_normal((40, 3000))).astype(np.float32)
    samples[0] *= 50  # one image out of forty has values fifty times larger
    histogram = AbsHistogram()
    histogram.add(samples[:13])
    histogram.add(samples[13:])
    found, plain = amax_of(histogram, "relative-mse"), amax_of(histogram, "mse")
    tried = {amax: relative_errors(samples.astype(np.float64), amax) for amax in np.geomspace(1, 250, 400)}
    assert relative_errors(samples.astype(np.float64), found) < 1.02 * min(tried.values())
    assert relative_errors(samples.astype(np.float64), plain) > 5 * min(tried.values())


def test_relative_counts_add_up_to_one_over_the_mean_square_of_each_sample():
    samples = np.random.default_rng(4).standard_normal((5, 700)).astype(np.float32) * np.float32(1e-3)
    histogram = AbsHistogram()
    for scale in (1, 100, 10_000):  # the width doubles in between
        histogram.add(samples * np.float32(scale))
    expected = sum(700 / ((samples.astype(np.float64) * scale) ** 2).sum(axis=1) for scale in (1, 100, 10_000)).sum()
    np.testing.assert_allclose(histogram.relative.sum(), expected, rtol=1e-5)


def test_samples_of_zeros_have_no_relative_error():
    histogram = AbsHistogram()
    histogram.add(np.zeros((3, 10), np.float32))
    assert amax_of(histogram, "relative-mse") == 0
    histogram.add(np.ones((1, 10), np.float32))
    assert amax_of(histogram, "relative-mse") == pytest.approx(1, rel=0.02)
