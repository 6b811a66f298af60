"""Which of the measured points are worth having, and which one is taken."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from trtdeploy.errors import GateError
from trtdeploy.load.measurement import LoadPoint
from trtdeploy.load.sweep.space import Candidate


class SweepPoint(BaseModel):
    """One candidate under one load."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: Candidate
    point: LoadPoint

    @property
    def concurrency(self) -> int:
        """The closed loop that it was measured in."""
        return self.point.concurrency or 1

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.point.samples_per_s

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the latency."""
        return self.point.latency_ms["p99"].value


def pareto(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the usable points that no other usable one beats in throughput and p99, slowest first.

    Of two that are alike in both, the first one counts.
    """
    front: list[SweepPoint] = []
    usable = [point for point in points if keeps(point, None)]
    for point in sorted(usable, key=lambda entry: (-entry.samples_per_s, entry.p99_ms)):
        if not front or point.p99_ms < front[-1].p99_ms:
            front.append(point)
    return front[::-1]


def ranked(points: Sequence[SweepPoint], slo_p99_ms: float | None) -> list[SweepPoint]:
    """Return the usable points that keep the promise, highest throughput first.

    Raises:
        GateError: There is none.
    """
    usable = [entry for entry in points if keeps(entry, None)]
    if not usable:
        refused = sum(entry.point.refused > 0 for entry in points)
        raise GateError(
            f"Not one of {len(points)} measured loads was stable"
            + (f" and had all its requests taken ({refused} filled the queue)" if refused else "")
            + ": nothing can be chosen.",
            hint="See what else the machine does, or give longer windows (--window), more of them (--max-windows) or a "
            "larger --stability-percent.",
        )
    keeping = [entry for entry in usable if keeps(entry, slo_p99_ms)]
    if not keeping:
        closest = min(usable, key=lambda entry: entry.p99_ms)
        raise GateError(
            f"No candidate keeps p99 <= {slo_p99_ms:g} ms; the closest is {closest.p99_ms:.2f} ms: "
            f"{closest.candidate}, concurrency {closest.concurrency}.",
            hint="Allow more time, or sweep smaller batches, shorter delays and less concurrency.",
        )
    return sorted(keeping, key=lambda entry: (-entry.samples_per_s, entry.p99_ms))


def keeps(entry: SweepPoint, slo_p99_ms: float | None) -> bool:
    """Say whether a point is usable (stable, and no request was refused) and keeps the promise, where there is one."""
    usable = entry.point.stable and entry.point.refused == 0
    return usable and (slo_p99_ms is None or entry.p99_ms <= slo_p99_ms)
