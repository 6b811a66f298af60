from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from training.auto.spending import declare_shares
from training.loop.schedule import Schedule
from training.qat.fine_tuning import networks_compared
from trtdeploy.statistics import non_inferiority, samples_needed

IMAGES, MAX_DROP, GAINED = 1500, 1.0, 0.02
RUNS = 20_000
TRAINED = networks_compared(Schedule(epochs=3, batch_size=32, learning_rate=1e-4))
STEPS = ("PTQ", "PTQ + bias correction", "partial quantization", "QAT", "QAT + distillation")
LOOKS = {step: TRAINED if "QAT" in step else 1 for step in STEPS}
DECLARED = declare_shares(LOOKS)


def wrong_stops(
    draw: Callable[[int, float], tuple[np.ndarray, np.ndarray]], drops: dict[str, float], confidences: dict[str, float]
) -> float:
    """How often the search stops at a step whose true drop is not inside the budget.

    ``draw`` returns the samples gained and lost, ``(RUNS, networks)`` each, of as many networks with one true drop.
    """
    running = np.ones(RUNS, dtype=bool)
    wrong = 0
    for step, looks in LOOKS.items():
        gained, lost = draw(looks, drops[step])
        best = kept_by_training(gained - lost) if looks > 1 else np.zeros(RUNS, dtype=int)
        pairs = np.stack([gained[np.arange(RUNS), best], lost[np.arange(RUNS), best]], axis=1)
        shown = is_shown(pairs, confidences[step])
        if drops[step] >= MAX_DROP:
            wrong += int((running & shown).sum())
        running &= ~shown
    return wrong / RUNS


def kept_by_training(score: np.ndarray) -> np.ndarray:
    """Which network QAT keeps, of ``(RUNS, networks)``: first those after one start, then those after the other.

    The better start decides which epochs there are, and the best of those, the start included, is kept.
    """
    after = score.reshape(RUNS, 2, -1)
    start = after[:, :, 0].argmax(axis=1)
    epoch = after[np.arange(RUNS), start].argmax(axis=1)
    return start * after.shape[2] + epoch


def is_shown(pairs: np.ndarray, confidence: float) -> np.ndarray:
    different, which = np.unique(pairs, axis=0, return_inverse=True)
    shown = [
        non_inferiority(int(gained), int(lost), IMAGES, max_drop=MAX_DROP, confidence=confidence).shown
        for gained, lost in different
    ]
    return np.array(shown)[which.ravel()]


def independent(seed: int):
    generator = np.random.default_rng(seed)

    def draw(networks: int, drop: float):
        counts = generator.multinomial(
            IMAGES, [GAINED, GAINED + drop / 100, 1 - 2 * GAINED - drop / 100], (RUNS, networks)
        )
        return counts[..., 0], counts[..., 1]

    return draw


def alike(seed: int):
    """Networks that differ by a few images only, as those of neighbouring steps do."""
    generator = np.random.default_rng(seed)
    common = {}

    def draw(networks: int, drop: float):
        if drop not in common:
            common[drop] = generator.multinomial(
                IMAGES, [0.9 * GAINED, 0.9 * (GAINED + drop / 100), 1 - 0.9 * (2 * GAINED + drop / 100)], RUNS
            )
        own = generator.multinomial(
            IMAGES, [0.1 * GAINED, 0.1 * (GAINED + drop / 100), 1 - 0.1 * (2 * GAINED + drop / 100)], (RUNS, networks)
        )
        return common[drop][:, None, 0] + own[..., 0], common[drop][:, None, 1] + own[..., 1]

    return draw


def declared_confidences() -> dict[str, float]:
    return {share.step: share.confidence for share in DECLARED}


@pytest.mark.parametrize("networks", [independent, alike])
@pytest.mark.parametrize("good", [(), ("QAT", "QAT + distillation"), ("PTQ",), ("partial quantization",)])
def test_an_inferior_network_is_chosen_in_less_than_the_declared_share_of_all_runs(networks, good) -> None:
    drops = {step: 0.2 if step in good else MAX_DROP for step in LOOKS}
    # two-sided intervals of 95% err on the side that matters in 2.5% of all cases
    assert wrong_stops(networks(0), drops, declared_confidences()) <= 0.025


def test_without_a_correction_it_would_be_chosen_far_more_often() -> None:
    drops = dict.fromkeys(LOOKS, MAX_DROP)
    assert wrong_stops(independent(0), drops, dict.fromkeys(LOOKS, 0.95)) > 0.15
    each_step = {share.step: 1 - 0.05 * share.share for share in DECLARED}  # the epochs forgotten
    assert wrong_stops(independent(0), drops, each_step) > wrong_stops(independent(0), drops, declared_confidences())


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_start_that_training_chooses_on_dev_counts(epochs) -> None:
    looks = networks_compared(Schedule(epochs=epochs, batch_size=32, learning_rate=1e-4))
    gained, lost = independent(0)(looks, MAX_DROP)
    best = kept_by_training(gained - lost)
    pairs = np.stack([gained[np.arange(RUNS), best], lost[np.arange(RUNS), best]], axis=1)

    def wrong(counted: int) -> float:
        return float(is_shown(pairs, declare_shares({"QAT": counted})[0].confidence).mean())

    assert wrong(looks) <= 0.025
    if epochs == 1:
        assert wrong(epochs + 1) > 0.03  # only the epochs counted, and the one start that they came from


def test_the_shares_fall_and_add_up_to_the_error() -> None:
    assert [share.step for share in DECLARED] == list(LOOKS)
    assert [share.share for share in DECLARED] == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    spent = sum(share.looks * (1 - share.confidence) for share in DECLARED)
    assert spent == pytest.approx(0.05)
    assert declare_shares({"only": 1})[0].confidence == pytest.approx(0.95)


def test_the_cheap_first_step_needs_fewer_images_than_with_equal_shares() -> None:
    equal = 1 - 0.05 / sum(LOOKS.values())
    counts = {"gained": 20, "lost": 22, "n": IMAGES, "max_drop": MAX_DROP}
    assert samples_needed(**counts, confidence=DECLARED[0].confidence) < 0.7 * samples_needed(
        **counts, confidence=equal
    )
