"""PTQ or QAT? Try the cheap answers first and stop at the first whose drop is shown to be inside the budget."""

from training.auto.decision import Decision, Trial
from training.auto.search import decide

__all__ = ["Decision", "Trial", "decide"]
