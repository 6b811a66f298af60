"""Measuring one model served in many ways, each on a server of its own, without touching its repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trtdeploy.errors import GateError, ModelError, ServerError, ShapeError
from trtdeploy.load.arrivals import ClosedLoop, Send
from trtdeploy.load.measurement import STABLE_WINDOWS, LoadPoint, WindowOptions, measure
from trtdeploy.load.requests import make_requests
from trtdeploy.load.sending import sending
from trtdeploy.load.sweep.choice import SweepPoint, keeps, ranked
from trtdeploy.load.sweep.results import Refused, SweepResults
from trtdeploy.load.sweep.retune import Deployed
from trtdeploy.load.sweep.space import Candidate, SweepSpace
from trtdeploy.runtimes.onnxruntime.cpu import processor_name, usable_cores
from trtdeploy.triton.client import InferenceClient, connect
from trtdeploy.triton.server.installation import Installation
from trtdeploy.triton.server.process import TritonServer
from trtdeploy.triton.targets.served_classifier import ServedTarget

Show = Callable[[str, int, int], None]
MeasureAt = Callable[[int, WindowOptions], LoadPoint]
_LONGER = 2
_CONFIRMATIONS = 3


def _nothing(*_: object) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Choice:
    """What a sweep comes to.

    Attributes:
        point: The chosen point, as the sweep measured it.
        confirmed: The same, as the longer measurement did.
        deployed: The best of how the model is served now, measured as long beside it; None where that is the choice, or
            keeps no promise.
    """

    point: SweepPoint
    confirmed: SweepPoint
    deployed: SweepPoint | None


@dataclass(frozen=True)
class Sweep:
    """How candidates are measured.

    Attributes:
        deployed: The model.
        installation: The server to run.
        windows: How long each load is looked at.
        data: Dataset of the requests; random input if None.
        batch_size: Samples per request.
        seed: Of random input.
        timeout_s: How long one request may take.
        show: Progress: of what, steps done, steps in all.
        say: Called with a sentence about each candidate that is done.
    """

    deployed: Deployed
    installation: Installation
    windows: WindowOptions = field(default_factory=WindowOptions)
    data: str | None = None
    batch_size: int = 1
    seed: int = 0
    timeout_s: float = 30.0
    show: Show = _nothing
    say: Callable[[str], None] = _nothing

    @property
    def as_deployed(self) -> Candidate:
        """How the model is served now."""
        return Candidate.of(self.deployed.options)

    def candidates(self, space: SweepSpace) -> list[Candidate]:
        """Return what is measured: how the model is served now, then the space."""
        return [self.as_deployed, *(one for one in space.candidates() if one != self.as_deployed)]

    def head(self, space: SweepSpace) -> dict[str, Any]:
        """Return what the figures depend on; only a sweep with the same may be gone on with."""
        return {
            "model": self.deployed.folder.name,
            "version": self.deployed.version,
            "plan_sha256": self.deployed.manifest.plan_sha256,
            "config_sha256": self.deployed.config_sha256,
            "space": space.model_dump(mode="json"),
            "windows": self.windows.model_dump(mode="json"),
            "requests": {"data": self.data, "batch_size": self.batch_size, "seed": self.seed},
            "machine": {"processor": processor_name(), "cores": usable_cores()},
            "server": self.installation.origin,
        }

    def missing(self, space: SweepSpace, results: SweepResults) -> dict[Candidate, list[int]]:
        """Return the concurrencies that are still to be measured, of every candidate that has some."""
        loads = {candidate: results.missing(candidate, space.concurrency) for candidate in self.candidates(space)}
        return {candidate: missing for candidate, missing in loads.items() if missing}

    def load_seconds(self, missing: dict[Candidate, list[int]]) -> tuple[float, float]:
        """Return how long loads take at least and at most, without the starts of servers."""
        loads = sum(map(len, missing.values()))
        least, most = (
            loads * (self.windows.warm_up_s + windows * self.windows.window_s)
            for windows in (STABLE_WINDOWS, self.windows.max_windows)
        )
        return least, most

    def run(self, space: SweepSpace, results: SweepResults) -> None:
        """Measure what is not in the results yet. A candidate that cannot be served becomes a result too.

        Raises:
            ServerError: The model cannot be served even as it is deployed.
        """
        missing = self.missing(space, results)
        for number, (candidate, concurrencies) in enumerate(missing.items(), start=1):
            self.show("candidates", number - 1, len(missing))
            try:
                with self.serving(candidate) as measure_at:
                    for concurrency in concurrencies:
                        results.add(SweepPoint(candidate=candidate, point=measure_at(concurrency, self.windows)))
            except (ModelError, ServerError, ShapeError) as error:
                if candidate == self.as_deployed:
                    raise
                results.add(Refused(candidate=candidate, reason=str(error)))
                self.say(f"[{number}/{len(missing)}] {candidate}: {error.message}")
                continue
            best = results.best_of(candidate)
            self.say(
                f"[{number}/{len(missing)}] {candidate}: up to {best.samples_per_s:.1f} samples/s, "
                f"p99 {best.p99_ms:.2f} ms"
            )

    def choose(self, points: Sequence[SweepPoint], slo_p99_ms: float | None) -> Choice:
        """Choose a point, and measure it once more for longer: the best of many is often the luckiest.

        The rule: of the stable points without a refused request whose p99 is at most ``slo_p99_ms``, where that is
        given, the one with the highest throughput; if it does not keep this in the longer measurement, the next one.
        How the model is served now is measured again beside it, for the machine may have changed since, and stays if it
        is as fast.

        Raises:
            GateError: No point can be chosen, or none of the first ones is confirmed.
        """
        order = ranked(points, slo_p99_ms)
        failed = []
        for entry in order[:_CONFIRMATIONS]:
            again = self._longer(entry)
            if not keeps(again, slo_p99_ms):
                failed.append(
                    f"{entry.candidate}, concurrency {entry.concurrency}: p99 {again.p99_ms:.2f} ms"
                    + ("" if again.point.stable else ", not stable")
                    + (f", {again.point.refused} refused" if again.point.refused else "")
                )
                self.say(f"not confirmed: {failed[-1]}")
                continue
            now = next((point for point in order if point.candidate == self.as_deployed), None)
            if entry.candidate == self.as_deployed or now is None:
                return Choice(entry, again, None)
            deployed = self._longer(now)
            if keeps(deployed, slo_p99_ms) and deployed.samples_per_s >= again.samples_per_s:
                self.say(f"no better than as deployed: {entry.candidate}, {again.samples_per_s:.1f} samples/s")
                return Choice(now, deployed, None)
            return Choice(entry, again, deployed)
        raise GateError(
            f"A longer measurement confirms none of the best {len(failed)} points: {'; '.join(failed)}.",
            hint="See what else the machine does, or give longer windows: --window.",
        )

    def _longer(self, entry: SweepPoint) -> SweepPoint:
        windows = self.windows.model_copy(update={"window_s": min(600.0, _LONGER * self.windows.window_s)})
        with self.serving(entry.candidate) as measure_at:
            return SweepPoint(candidate=entry.candidate, point=measure_at(entry.concurrency, windows))

    @contextmanager
    def serving(self, candidate: Candidate) -> Iterator[MeasureAt]:
        """Serve a copy of the model as a candidate says, and yield what measures it at a concurrency.

        Raises:
            ModelError: It cannot be served so.
            ServerError: The server does not start or does not answer.
            ShapeError: It does not take requests of this batch size.
        """
        with (
            self.deployed.copied(candidate.applied_to(self.deployed.options)) as repository,
            TritonServer(repository, self.installation, http_port=0, grpc_port=0, metrics_port=0) as server,
            connect(server.grpc_url, timeout_s=self.timeout_s) as client,
            self._requests(client) as (target, send),
        ):

            def measure_at(concurrency: int, windows: WindowOptions) -> LoadPoint:
                label = f"{candidate}; concurrency {concurrency}"
                return measure(
                    send,
                    ClosedLoop(concurrency),
                    windows,
                    batch_size=self.batch_size,
                    totals=target.server_totals,
                    progress=lambda done, total: self.show(label, done, total),
                )

            yield measure_at

    @contextmanager
    def _requests(self, client: InferenceClient) -> Iterator[tuple[ServedTarget, Send]]:
        target = ServedTarget(client, self.deployed.folder.name)
        requests = make_requests(target, data=self.data, batch_size=self.batch_size, seed=self.seed)
        with sending(client, target, requests) as send:
            yield target, send
