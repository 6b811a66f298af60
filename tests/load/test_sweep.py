"""What a sweep tries, keeps and chooses; the servers themselves are in the end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trtdeploy.errors import GateError, ModelError, ServerError, UsageError
from trtdeploy.load import LoadPoint, WindowOptions
from trtdeploy.load.sweep.choice import SweepPoint, pareto, ranked
from trtdeploy.load.sweep.results import Refused, SweepResults
from trtdeploy.load.sweep.retune import deployed_model
from trtdeploy.load.sweep.space import Candidate, SweepSpace, default_space, read_space
from trtdeploy.load.sweep.sweep import MeasureAt, Sweep
from trtdeploy.plan import Plan
from trtdeploy.statistics import Interval
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import Installation

pytest.importorskip("tritonclient.grpc")

ONE = Candidate(instances=1, max_batch_size=8, preferred_batch_sizes=(), max_queue_delay_us=0)
SPACE = SweepSpace(instances=(1, 2), max_batch_size=(1, 8), max_queue_delay_us=(0, 500), concurrency=(1, 4))


def load_point(rate: float, p99_ms: float, *, stable: bool = True, concurrency: int = 1, refused: int = 0) -> LoadPoint:
    level = Interval(value=p99_ms, low=p99_ms, high=p99_ms)
    return LoadPoint(
        concurrency=concurrency,
        rate_per_s=None,
        requests=100,
        requests_per_s=rate,
        samples_per_s=rate,
        latency_ms={"p50": level, "p99": level},
        mean_ms=p99_ms,
        server_ms=None,
        stable=stable,
        refused=refused,
    )


def swept(rate: float, p99_ms: float, **options: Any) -> SweepPoint:
    return SweepPoint(candidate=ONE, point=load_point(rate, p99_ms, **options))


def test_combinations_that_are_served_alike_are_measured_once() -> None:
    assert [str(candidate) for candidate in SPACE.candidates()] == [
        "1 instance, batch 1",
        "1 instance, batch 8",
        "1 instance, batch 8, delay 500 us",
        "2 instances, batch 1",
        "2 instances, batch 8",
        "2 instances, batch 8, delay 500 us",
    ]
    preferred = SPACE.model_copy(update={"preferred_batch_sizes": ((), (8,), (4, 8)), "max_queue_delay_us": (0,)})
    assert len(preferred.candidates()) == 2 * 3  # to prefer the largest batch changes nothing
    alone = SweepSpace(instances=(1, 2), max_queue_delay_us=(0, 9), concurrency=(1,))
    assert [candidate.max_batch_size for candidate in alone.candidates()] == [None, None]


def test_the_default_follows_the_plan_and_the_machine(qdq_plan: Plan) -> None:
    options = PackageOptions(max_batch_size=32)
    assert qdq_plan.manifest.tactic is not None
    threads = qdq_plan.manifest.tactic.threads
    space = default_space(qdq_plan.manifest, options, cores=4 * threads)
    assert space.instances == (1, 2, 4)
    assert (space.max_batch_size[0], space.max_batch_size[-1]) == (1, 32)
    assert len(space.max_batch_size) == 3
    assert space.max_queue_delay_us[0] == 0 < space.max_queue_delay_us[1]
    assert space.concurrency == (1, 8, 32)
    assert default_space(qdq_plan.manifest, options, cores=1).instances == (1,)
    unbatched = default_space(qdq_plan.manifest, PackageOptions(), cores=1)
    assert (unbatched.max_batch_size, unbatched.max_queue_delay_us) == ((), (0,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instances: [1]\nbatching: [2]", "batching"),
        ("instances: 3", "instances"),
        ("instances: []", "instances"),
        ("instances: [0]", "instances.0"),
        ("max_queue_delay_us: [-1]", "max_queue_delay_us.0"),
        ("concurrency: [true, x]", "concurrency"),
        ("- 1", "no lists"),
        ("a: [", "YAML"),
        ("instances: [" + "1, " * 200 + "1]\nconcurrency: [" + ", ".join(map(str, range(1, 400))) + "]", "at most 500"),
    ],
)
def test_a_space_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_space(tmp_path / "space.yaml", SPACE)


def test_what_the_file_leaves_out_is_derived(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("instances: [4]\npreferred_batch_sizes: [[], [2, 4]]\n")
    space = read_space(tmp_path / "space.yaml", SPACE)
    assert (space.instances, space.preferred_batch_sizes, space.concurrency) == ((4,), ((), (2, 4)), (1, 4))


def test_the_front_holds_what_nothing_beats() -> None:
    slow, middle, fast = swept(10, 1), swept(50, 5), swept(90, 20)
    beaten, tied, unstable = swept(40, 6), swept(50, 7), swept(1000, 0.1, stable=False)
    assert pareto([fast, beaten, slow, unstable, tied, middle]) == [slow, middle, fast]
    assert pareto([unstable]) == []


def test_the_rule_of_the_choice() -> None:
    points = [swept(10, 1), swept(90, 20), swept(50, 5), swept(1000, 2, stable=False)]
    assert ranked(points, None)[0].samples_per_s == 90
    assert [entry.samples_per_s for entry in ranked(points, 10)] == [50, 10]
    with pytest.raises(GateError, match=r"the closest is 1\.00 ms"):
        ranked(points, 0.5)
    with pytest.raises(GateError, match="Not one of 1"):
        ranked(points[3:], None)


def test_a_load_that_fills_the_queue_is_not_chosen() -> None:
    full, fits = swept(90, 2, refused=3), swept(50, 5)
    assert pareto([full, fits]) == [fits]
    assert ranked([full, fits], None) == [fits]
    with pytest.raises(GateError, match=r"\(1 filled the queue\)"):
        ranked([full], None)


def test_results_survive_and_belong_to_one_sweep(tmp_path: Path) -> None:
    path, head = tmp_path / "r.jsonl", {"model": "m", "space": [1, 2]}
    first = SweepResults(path, head)
    first.add(swept(10, 1))
    first.add(Refused(candidate=ONE.model_copy(update={"instances": 9}), reason="no"))
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(UsageError, match="--resume"):
        SweepResults(path, head)
    again = SweepResults(path, head, resume=True)
    assert (again.points, again.refused) == (first.points, first.refused)
    assert again.missing(ONE, (1, 4)) == [4]
    assert again.missing(ONE.model_copy(update={"instances": 9}), (1, 4)) == []
    with pytest.raises(UsageError, match="model was 'm', is 'n'"):
        SweepResults(path, {**head, "model": "n"}, resume=True)
    path.write_text("garbage")
    with pytest.raises(UsageError, match="not the file of a sweep"):
        SweepResults(path, head, resume=True)


def test_a_head_without_results_is_no_obstacle(tmp_path: Path) -> None:
    SweepResults(tmp_path / "r.jsonl", {"model": "m"})
    assert SweepResults(tmp_path / "r.jsonl", {"model": "n"}).points == []


@pytest.mark.parametrize("content", ["one line\n", "{}", '{"precious": 1}', "[1, 2]", "7", "a\nb\n"])
def test_a_file_that_is_none_of_a_sweep_stays(content: str, tmp_path: Path) -> None:
    path = tmp_path / "precious.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"is not the file of a sweep.\nName another"):
        SweepResults(path, {"model": "m"})
    assert path.read_text() == content


def test_an_empty_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").touch()
    assert SweepResults(tmp_path / "r.jsonl", {"model": "m"}).points == []


class Rehearsal(Sweep):
    """A sweep whose servers are a table."""

    def figures(self, candidate: Candidate, concurrency: int, windows: WindowOptions) -> LoadPoint:
        rate = 10.0 * concurrency * candidate.instances
        return load_point(rate, 100 if windows.window_s > 2 and candidate.instances > 1 else 5, concurrency=concurrency)

    @contextmanager
    def serving(self, candidate: Candidate) -> Iterator[MeasureAt]:
        self.deployed.derive(candidate.applied_to(self.deployed.options))
        if candidate.max_queue_delay_us:
            raise ServerError("it does not load")
        yield lambda concurrency, windows: self.figures(candidate, concurrency, windows)


@pytest.fixture
def rehearsal(qdq_plan: Plan, tmp_path: Path) -> Iterator[Rehearsal]:
    package(qdq_plan.path, tmp_path / "models", "m", options=PackageOptions(max_batch_size=8))
    with deployed_model(tmp_path / "models", "m") as deployed:
        yield Rehearsal(deployed, Installation(Path("tritonserver"), "nowhere"), WindowOptions(window_s=2))


def test_what_cannot_be_served_is_a_result_and_no_end(rehearsal: Rehearsal, tmp_path: Path) -> None:
    space = SPACE.model_copy(update={"max_batch_size": (8, 64)})
    results = SweepResults(tmp_path / "r.jsonl", rehearsal.head(space))
    assert rehearsal.load_seconds(rehearsal.missing(space, results)) == (8 * 2 * 7, 8 * 2 * 21)
    rehearsal.run(space, results)
    assert len(results.points) == 4
    reasons = [entry.reason for entry in results.refused]
    assert sum("larger than what the plan's profiles cover" in reason for reason in reasons) == 4
    assert reasons.count("it does not load") == 2


def test_a_sweep_that_was_interrupted_measures_only_what_is_missing(rehearsal: Rehearsal, tmp_path: Path) -> None:
    measured: list[tuple[int, int]] = []

    class Interrupted(Rehearsal):
        def figures(self, candidate: Candidate, concurrency: int, windows: WindowOptions) -> LoadPoint:
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append((candidate.instances, concurrency))
            return super().figures(candidate, concurrency, windows)

    space = SweepSpace(instances=(1, 2), max_batch_size=(8,), concurrency=(1, 4))
    head = rehearsal.head(space)
    path = tmp_path / "r.jsonl"
    first = Interrupted(rehearsal.deployed, rehearsal.installation, rehearsal.windows)
    with pytest.raises(KeyboardInterrupt):
        first.run(space, SweepResults(path, head))
    assert len(path.read_text().splitlines()) == 1 + 3
    resumed = SweepResults(path, json.loads(json.dumps(head)), resume=True)
    assert list(first.missing(space, resumed).values()) == [[4]]
    rehearsal.run(space, resumed)
    assert len(resumed.points) == 4
    assert rehearsal.missing(space, resumed) == {}


def test_a_model_that_cannot_be_served_as_it_is_deployed_ends_the_sweep(rehearsal: Rehearsal, tmp_path: Path) -> None:
    class Broken(Rehearsal):
        @contextmanager
        def serving(self, candidate: Candidate) -> Iterator[MeasureAt]:
            raise ModelError("broken")
            yield

    broken = Broken(rehearsal.deployed, rehearsal.installation)
    with pytest.raises(ModelError, match="broken"):
        broken.run(SPACE, SweepResults(tmp_path / "r.jsonl", broken.head(SPACE)))


def test_the_best_point_has_to_repeat_itself(rehearsal: Rehearsal, tmp_path: Path) -> None:
    space = SweepSpace(instances=(1, 2), max_batch_size=(8,), concurrency=(1, 4))
    results = SweepResults(tmp_path / "r.jsonl", rehearsal.head(space))
    rehearsal.run(space, results)
    choice = rehearsal.choose(results.points, None)
    assert (choice.point.candidate.instances, choice.point.concurrency) == (2, 4)
    assert choice.deployed is not None
    assert (choice.deployed.candidate, choice.deployed.samples_per_s) == (rehearsal.as_deployed, 40)
    # two instances keep the promise in the short look only
    choice = rehearsal.choose(results.points, 50)
    assert (choice.point.candidate, choice.point.concurrency) == (rehearsal.as_deployed, 4)
    assert (choice.confirmed.p99_ms, choice.deployed) == (5, None)


def test_what_is_deployed_stays_if_it_is_as_fast_beside_the_best(rehearsal: Rehearsal, tmp_path: Path) -> None:
    class Slowed(Rehearsal):
        def figures(self, candidate: Candidate, concurrency: int, windows: WindowOptions) -> LoadPoint:
            return load_point(40 if windows.window_s > 2 else 40 + candidate.instances, 5, concurrency=concurrency)

    slowed = Slowed(rehearsal.deployed, rehearsal.installation, rehearsal.windows)
    space = SweepSpace(instances=(1, 2), max_batch_size=(8,), concurrency=(4,))
    results = SweepResults(tmp_path / "r.jsonl", slowed.head(space))
    slowed.run(space, results)
    choice = slowed.choose(results.points, None)
    assert (choice.point.candidate, choice.confirmed.samples_per_s) == (slowed.as_deployed, 40)
    with pytest.raises(GateError, match="confirms none of the best 2 points"):
        rehearsal.choose([entry for entry in results.points if entry.candidate != slowed.as_deployed] * 2, 50)
