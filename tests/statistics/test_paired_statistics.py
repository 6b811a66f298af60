from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtdeploy.statistics import (
    compare_paired,
    mcnemar_exact_p,
    non_inferiority,
    samples_needed,
    softmax_kl,
    sqnr_db,
    tango_percent,
)


def test_the_published_interval_and_p_value_of_the_airway_data() -> None:
    # Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for paired binomial proportions",
    # Statistics in Medicine 33, 2014: Bentur et al., 21 pairs, 1 and 7 discordant: Tango -0.517 to -0.026, exact
    # conditional McNemar P = 0.070.
    interval = tango_percent(1, 7, 21)
    assert interval.value == pytest.approx(100 * -6 / 21)
    assert interval.low == pytest.approx(-51.7, abs=0.05)
    assert interval.high == pytest.approx(-2.6, abs=0.05)
    assert mcnemar_exact_p(1, 7) == pytest.approx(0.0703, abs=5e-5)


def by_grid(gained: int, lost: int, n: int, *, z: float) -> tuple[float, float]:
    """The differences that the score test keeps, its constrained maximum likelihood searched instead of solved."""
    kept = []
    for difference in np.linspace(-0.999, 0.999, 1999):
        q = np.linspace(max(0.0, -difference), (1 - difference) / 2, 20001)[
            1:-1
        ]  # share lost; gained is q + difference
        likelihood = (n - gained - lost) * np.log(1 - 2 * q - difference)
        with np.errstate(divide="ignore"):
            likelihood = likelihood + (gained * np.log(q + difference) if gained else 0)
            likelihood = likelihood + (lost * np.log(q) if lost else 0)
        best = q[np.argmax(likelihood)]
        variance = n * (2 * best + difference - difference**2)
        if abs(gained - lost - n * difference) <= z * math.sqrt(variance):
            kept.append(difference)
    return 100 * min(kept), 100 * max(kept)


@pytest.mark.parametrize(("gained", "lost", "n"), [(1, 7, 21), (12, 2, 50), (0, 3, 60), (0, 0, 40), (5, 5, 30)])
def test_the_interval_is_what_the_score_test_keeps(gained: int, lost: int, n: int) -> None:
    low, high = by_grid(gained, lost, n, z=1.959963984540054)
    interval = tango_percent(gained, lost, n)
    assert interval.low == pytest.approx(low, abs=0.11)  # the grid's step is 0.1
    assert interval.high == pytest.approx(high, abs=0.11)


@given(data=st.data(), n=st.integers(1, 20_000))
@settings(deadline=None)
def test_the_interval_holds_its_value_and_turns_round_with_the_comparison(data: st.DataObject, n: int) -> None:
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    interval, reverse = tango_percent(gained, lost, n), tango_percent(lost, gained, n)
    assert -100 <= interval.low <= interval.value <= interval.high <= 100
    assert interval.low == pytest.approx(-reverse.high, abs=1e-9)
    assert interval.low < interval.high


def test_without_discordant_pairs_the_interval_still_has_the_width_of_what_may_be() -> None:
    z2 = 1.959963984540054**2
    assert tango_percent(0, 0, 50).high == pytest.approx(100 * z2 / (50 + z2))


@pytest.mark.parametrize("shares", [(0.01, 0.01), (0.02, 0.05), (0.0, 0.004)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(shares: tuple[float, float]) -> None:
    repeats, n = 1500, 500
    gained, lost = shares
    counts = np.random.default_rng(7).multinomial(n, [gained, lost, 1 - gained - lost], size=repeats)
    intervals = [tango_percent(int(row[0]), int(row[1]), n) for row in counts]
    true = 100 * (gained - lost)
    coverage = np.mean([interval.low <= true <= interval.high for interval in intervals])
    assert 0.93 <= coverage <= 0.99


@pytest.mark.parametrize("discordant", [0, 1, 2, 7, 10])
def test_mcnemar_is_the_share_of_all_signs_at_least_as_uneven(discordant: int) -> None:
    for gained in range(discordant + 1):
        uneven = abs(2 * gained - discordant)
        signs = [abs(2 * sum(row) - discordant) >= uneven for row in product((0, 1), repeat=discordant)]
        assert mcnemar_exact_p(gained, discordant - gained) == pytest.approx(np.mean(signs))


def test_mcnemar_agrees_with_scipy_for_many_pairs() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for gained, lost in ((500, 560), (2400, 2500), (3, 90)):
        assert mcnemar_exact_p(gained, lost) == pytest.approx(scipy_stats.binomtest(gained, gained + lost).pvalue)


def test_correct_answers_are_paired_by_sample() -> None:
    reference = np.array([1, 1, 1, 0, 0, 1], bool)
    candidate = np.array([1, 0, 0, 1, 0, 1], bool)
    found = compare_paired(reference, candidate)
    assert (found.n, found.gained, found.lost) == (6, 1, 2)
    assert found.difference == tango_percent(1, 2, 6)
    assert found.mcnemar_p == 1
    with pytest.raises(ValueError, match="one length"):
        compare_paired(reference, candidate[:5])


def test_non_inferiority_follows_the_lower_end_and_not_the_estimate() -> None:
    few = non_inferiority(2, 3, 300, max_drop=0.5)  # -0.33 points, but on 300 samples only
    many = non_inferiority(200, 300, 30_000, max_drop=0.5)  # the same shares
    assert not few.shown
    assert many.shown
    assert many.lower == tango_percent(200, 300, 30_000).low > -0.5
    assert not non_inferiority(0, 60, 10_000, max_drop=0.5).shown


def test_a_candidate_at_the_edge_of_the_budget_passes_as_rarely_as_promised() -> None:
    repeats, n, budget = 20_000, 2000, 0.5
    lost, gained = 0.0225, 0.0175
    counts = np.random.default_rng(3).multinomial(n, [gained, lost, 1 - gained - lost], size=repeats)
    values, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    shown = [non_inferiority(int(row[0]), int(row[1]), n, max_drop=budget).shown for row in values]
    assert float((np.array(shown) * times).sum() / repeats) == pytest.approx(0.025, abs=0.006)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 180), (3, 4, 1000), (5, 2, 300)])
def test_the_number_of_samples_that_would_show_it_does_and_one_fewer_does_not(gained: int, lost: int, n: int) -> None:
    needed = samples_needed(gained, lost, n, max_drop=0.5)
    assert needed is not None
    for samples, expected in ((needed, True), (needed - 1, False)):
        low = tango_percent(gained * samples / n, lost * samples / n, samples).low
        assert (low > -0.5) is expected


def test_no_number_of_samples_shows_what_is_not_so() -> None:
    assert samples_needed(0, 5, 1000, max_drop=0.5) is None


def test_impossible_counts_and_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3, 3 of 5"):
        tango_percent(3, 3, 5)
    with pytest.raises(ValueError, match="not negative"):
        mcnemar_exact_p(-1, 3)
    with pytest.raises(ValueError, match="budget"):
        non_inferiority(0, 0, 5, max_drop=0)


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    # 0.5 ln 2 + 0 - 0.25 ln 2
    assert softmax_kl(np.log(p) + 3, np.log(q) - 7) == pytest.approx([0.25 * math.log(2)])
    assert softmax_kl(np.log(p), np.log(p)).tolist() == [0]


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4]))
def test_divergence_is_finite_and_never_negative(seed: int, scale: float) -> None:
    logits = scale * np.random.default_rng(seed).normal(size=(2, 5, 10)).astype(np.float32)
    divergence = softmax_kl(logits[0], logits[1])
    assert np.isfinite(divergence).all()
    assert (divergence >= 0).all()


def test_divergence_agrees_with_scipy() -> None:
    special, stats = pytest.importorskip("scipy.special"), pytest.importorskip("scipy.stats")
    first, second = np.random.default_rng(1).normal(size=(2, 8, 10))
    expected = stats.entropy(special.softmax(first, axis=1), special.softmax(second, axis=1), axis=1)
    assert softmax_kl(first, second) == pytest.approx(expected)


def test_a_uniform_quantizer_of_8_bits_has_the_textbook_ratio() -> None:
    # A full-scale uniform signal through b bits: 6.02 b dB (Oppenheim and Schafer, "Discrete-Time Signal Processing").
    signal = np.random.default_rng(0).uniform(-1, 1, 200_000)
    step = 2 / 256
    quantized = (np.floor(signal / step) + 0.5) * step
    assert sqnr_db(signal, quantized) == pytest.approx(6.02 * 8, abs=0.1)
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db(np.ones(4), np.full(4, 0.9)) == pytest.approx(20)
