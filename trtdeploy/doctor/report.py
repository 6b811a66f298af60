"""The whole examination as one document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtdeploy.doctor.judgement import Ability, Command, Problem, abilities, commands, problems
from trtdeploy.doctor.machine import Machine
from trtdeploy.doctor.plan_needs import PlanNeeds, needs_of
from trtdeploy.frozen_model import FrozenModel


class Report(FrozenModel):
    """What was seen and what follows from it."""

    machine: Machine
    runtimes: dict[str, Ability]
    commands: dict[str, Command]
    problems: tuple[Problem, ...]
    plans: tuple[PlanNeeds, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong and every plan that was named runs here."""
        return not self.problems and all(plan.runs_here for plan in self.plans)


def diagnose(machine: Machine, plans: Sequence[Path] = ()) -> Report:
    """Judge a machine, and plans on it.

    Raises:
        PlanCorruptError: A plan has no readable manifest.
    """
    able = abilities(machine)
    return Report(
        machine=machine,
        runtimes=able,
        commands=commands(machine, able),
        problems=tuple(problems(machine, able)),
        plans=tuple(needs_of(plan, machine, able) for plan in plans),
    )
