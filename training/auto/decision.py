"""What ``training auto`` decided, and why: the facts, and the page that a person reads."""

from __future__ import annotations

from training.auto.spending import CONFIDENCE, ErrorShare
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.statistics import Interval, NonInferiority, PairedDifference


class Choice(FrozenModel):
    """One of several variants of a step, compared on the calibration images without their labels.

    Attributes:
        kl: Mean KL divergence of the softmax from the float network's, in nats.
        seconds: Wall time of making it.
    """

    name: str
    kl: float
    seconds: float


class Trial(FrozenModel):
    """One candidate that was put to the proof on the dev images.

    Attributes:
        step: What was done, for example ``PTQ``.
        detail: With which settings.
        checkpoint: Name of its file.
        top1: On dev, in percent.
        difference: Paired difference to float on dev, in percentage points, with its plain 95% interval.
        proof: Whether the drop is shown to be inside the budget, at the confidence that was declared for the step.
        samples_needed: How many dev images would show it, if the shares of gained and lost ones stay; None if the
            drop as measured is not inside the budget.
        seconds: Wall time of making and scoring it, its variants included.
        variants: What it was chosen from.
    """

    step: str
    detail: str
    checkpoint: str
    top1: Interval
    difference: PairedDifference
    proof: NonInferiority
    samples_needed: int | None
    seconds: float
    variants: tuple[Choice, ...] = ()


class Decision(FrozenModel):
    """The whole answer.

    Attributes:
        met: A trial's drop is shown to be inside the budget.
        chosen: The file of that trial's checkpoint; of the most accurate one on dev if there is none.
        declared: What each step might spend of the 5% error, fixed before the first was tried.
        not_tried: Steps that were not needed.
        test: Paired difference of the chosen network to float on the test images, looked at once, after the choice.
    """

    max_drop: float
    met: bool
    chosen: str
    model: str
    declared: tuple[ErrorShare, ...]
    float_top1: Interval
    trials: tuple[Trial, ...]
    not_tried: tuple[str, ...]
    test: PairedDifference
    onnx: str

    @property
    def winner(self) -> Trial:
        """The trial whose checkpoint was chosen."""
        return next(trial for trial in self.trials if trial.checkpoint == self.chosen)

    @property
    def verdict(self) -> str:
        """The answer in a sentence or two."""
        best = self.winner
        change = best.difference.difference.format()
        if self.met:
            return (
                f"{best.step} is enough: its drop is shown to be less than {self.max_drop:g} points "
                f"({change} on {best.difference.n} dev images)."
            )
        text = (
            f"No candidate's drop is shown to be less than {self.max_drop:g} points. The best is {best.step} "
            f"({change} on {best.difference.n} dev images). "
        )
        if best.samples_needed is None:
            return text + "Its drop as measured is not inside the budget."
        return text + (
            f"Its drop as measured is inside the budget, but {best.difference.n} images are too few to show it: "
            f"with these shares of gained and lost images, about {best.samples_needed} would be needed."
        )

    def page(self) -> str:
        """Return the decision as Markdown, the verdict first."""
        lines = [
            f"# {self.model}: {'budget met' if self.met else 'budget not shown'}",
            "",
            self.verdict,
            "",
            f"Float: {self.float_top1.format()}% on dev. Chosen: `{self.chosen}`, exported as `{self.onnx}`. On the "
            f"{self.test.n} test images, looked at once after the choice, it differs from float by "
            f"{self.test.difference.format()} points.",
            "",
            "| step | settings | dev top-1 % | against float | low end of the proof | shown | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {trial.step} | {trial.detail} | {trial.top1.value:.2f} | {trial.difference.difference.format()} | "
            f"{trial.proof.lower:.2f} | {'yes' if trial.proof.shown else 'no'} | {trial.seconds:.0f} |"
            for trial in self.trials
        ]
        lines += ["", f"Not tried, because not needed: {', '.join(self.not_tried) or 'nothing'}.", ""]
        for trial in self.trials:
            if trial.variants:
                chosen_from = ", ".join(f"{item.name} {item.kl:.2e} ({item.seconds:.0f} s)" for item in trial.variants)
                lines += [f"{trial.step} was chosen by divergence from float (nats): {chosen_from}.", ""]
        shares = "; ".join(
            f"{item.step} {100 * item.share:.4g}% of the error"
            f"{f', for the best of {item.looks} networks' if item.looks > 1 else ''}, {100 * item.confidence:.5g}%"
            for item in self.declared
        )
        lines += [
            "How it is shown: on the same dev images, the lower end of Tango's two-sided interval of the difference "
            f"must lie above -{self.max_drop:g}. The steps are tried in a fixed order, and the first that is shown "
            f"ends the search. All together they are proved at {100 * CONFIDENCE:g}%. What each may spend of the error "
            "was declared beforehand: half of what is left for each step, all of it for the last (Wiens' fallback "
            "procedure, in which nothing passes on because the first success ends it). Share and confidence: "
            f"{shares}. Training keeps the best of its epochs by their score on dev, from those starting ranges of two "
            "that score better on dev; any epoch from either start might be kept, so its share is divided among all of "
            "them. Variants of one step are chosen on the calibration images without their labels, which costs "
            "nothing of this.",
            "",
        ]
        return "\n".join(lines)
