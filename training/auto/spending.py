"""How the error of 5% is divided among the candidates, before any of them is looked at.

The rule of ``training auto`` is: go through the steps in a fixed order, cheapest first, and stop at the first that is
shown to be inside the budget. It errs when the network that it stops at is not. Which procedure keeps the chance of
that below alpha?

- The fixed-sequence test (Bauer, "Multiple testing in clinical trials", Statistics in Medicine 10, 1991, 871-890)
  spends all of alpha on every step, but must end at the first that is *not* shown. Here that is the very moment to go
  on with the next step, so it does not apply.
- The fallback procedure (Wiens, "A fixed sequence Bonferroni procedure for testing multiple endpoints", Pharmaceutical
  Statistics 2, 2003, 211-215) gives each step a share that is declared beforehand, and may go on after a failure. What
  a step that *was* shown had to spend passes on to the next one; here nothing comes after it, so nothing passes on,
  and what remains is its first half: declared shares (also Moye, "Alpha calculus in clinical trials", Statistics in
  Medicine 19, 2000, 767-779).
- Nothing better holds without assumptions on how the candidates depend on each other: as there is one rejection at the
  most, the chances of stopping wrongly at one step and at another add up. They stay below the sum of the shares, in
  whatever way each candidate was made from the ones before, as long as its share does not depend on what dev said.

Equal shares would let the cheap first step pay for the expensive last ones. The shares fall geometrically instead: each
step has half of what is left, the last all of it. What the first steps win, the last ones pay for with a wider
interval; training, which often gains accuracy, has the most room for it.

The step of QAT keeps the best of its epochs by their score on dev, what it started from included, and it starts from
the better of two sets of ranges, by their score on dev too. Every epoch follows from the start, so that the epochs from
either start might become the candidate, though only those from one of them are ever seen. The share is divided equally
among all of these (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95
"""Of all candidates together: two-sided intervals, so that an inferior one is chosen in 2.5% of all cases at most."""


class ErrorShare(BaseModel):
    """What one step may spend.

    Attributes:
        step: Its name.
        share: Its part of the error, of 1 in all.
        looks: How many networks might become the step's candidate, depending on their scores on dev.
        confidence: Of the two-sided interval that the proof of each of them uses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    share: float
    looks: int
    confidence: float


def declare_shares(looks: Mapping[str, int], *, confidence: float = CONFIDENCE) -> tuple[ErrorShare, ...]:
    """Divide the error ``1 - confidence`` among steps: half of what is left for each, all of it for the last.

    Args:
        looks: The steps in the order in which they will be tried, and how many networks might become the candidate of
            each, depending on what dev says.
        confidence: Of all together.
    """
    declared = []
    left = 1.0
    for number, (step, count) in enumerate(looks.items(), 1):
        share = left if number == len(looks) else left / 2
        left -= share
        each = 1 - (1 - confidence) * share / count
        declared.append(ErrorShare(step=step, share=share, looks=count, confidence=each))
    return tuple(declared)
