"""bench(): every point of the sweep, believable numbers, and what it refuses."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.onnx_graphs import doubling, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine, benchmark
from trtdeploy.engine.benchmark import Measurement, bench
from trtdeploy.errors import InferenceError, PlanCorruptError, ShapeError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.tensors import ShapeRange

SHORT: dict[str, Any] = {"warm_up_s": 0, "duration_s": 0.03}


def test_a_sweep_measures_every_pair_and_says_which_one_begins(qdq_plan: Plan) -> None:
    begun: list[str] = []
    points = bench(qdq_plan.path, batches=[1, 4], contexts=[1, 2], threads=1, **SHORT, progress=begun.append)
    assert [(point.contexts, point.batch) for point in points] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert begun == ["batch 1, 1 context", "batch 4, 1 context", "batch 1, 2 contexts", "batch 4, 2 contexts"]
    for point in points:
        assert point.threads == 1
        assert point.inferences >= point.contexts
        assert point.throughput_per_s > 0
        assert list(point.latency_ms) == ["p50", "p90", "p95", "p99"]
        values = [interval.value for interval in point.latency_ms.values()]
        assert values == sorted(values)
        assert all(0 < i.low <= i.value <= i.high for i in point.latency_ms.values())


def test_a_measurement_is_json_with_these_fields_and_back(qdq_plan: Plan) -> None:
    point = bench(qdq_plan.path, **SHORT)[0]
    fields = json.loads(json.dumps(point.model_dump()))
    assert set(fields) == {"batch", "contexts", "threads", "inferences", "latency_ms", "throughput_per_s"}
    assert set(fields["latency_ms"]["p99"]) == {"value", "low", "high"}
    assert fields["threads"] is None
    assert Measurement.model_validate(fields) == point


def test_throughput_counts_samples_of_counted_inferences(qdq_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_closed_loop", lambda *_: ([1.0, 2.0, 3.0], 0.5))
    point = bench(qdq_plan.path, batches=[8])[0]
    assert (point.inferences, point.throughput_per_s, point.latency_ms["p50"].value) == (3, 48.0, 2.0)


def test_the_warm_up_is_not_counted(qdq_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances one second per look, only what starts after the warm-up is in the result."""
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    ran: list[object] = []
    monkeypatch.setattr(Engine, "infer", lambda self, inputs: ran.append(inputs))
    times, _ = benchmark._closed_loop(Engine.__new__(Engine), {}, 1, 10, 20)
    assert set(times) == {1000.0}
    assert 0 < len(times) < len(ran)


def test_even_the_shortest_measurement_has_a_sample_per_context(qdq_plan: Plan) -> None:
    assert bench(qdq_plan.path, contexts=[3], threads=1, warm_up_s=0, duration_s=1e-9)[0].inferences >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"batches": []},
        {"contexts": []},
        {"batches": [0]},
        {"batches": [1, -1]},
        {"contexts": [0]},
        {"duration_s": 0.0},
        {"duration_s": -1.0},
        {"duration_s": math.nan},
        {"duration_s": math.inf},
        {"warm_up_s": -0.1},
        {"warm_up_s": math.nan},
        {"threads": 0},
    ],
)
def test_numbers_out_of_range_are_usage_errors(qdq_plan: Plan, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        bench(qdq_plan.path, **{**SHORT, **options})


def test_a_batch_that_the_plan_does_not_take_is_a_shape_error(qdq_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="no profile"):
        bench(qdq_plan.path, batches=[33], **SHORT)
    fixed = build(save(doubling((2, 4)), tmp_path / "m.onnx"), tmp_path / "m.plan", BuildConfig(timing_rounds=1))
    with pytest.raises(ShapeError, match="fixed first dimension; batch 1 is not possible"):
        bench(fixed.path, **SHORT)
    assert bench(fixed.path, batches=[2], **SHORT)[0].batch == 2


def test_other_dynamic_sizes_are_those_that_the_plan_serves_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(doubling(("batch", "length")), tmp_path / "m.onnx")
    shapes = ShapeRange(min=(1, 16), opt=(2, 24), max=(8, 32))
    plan = build(source, tmp_path / "m.plan", BuildConfig(profiles=({"x": shapes},), timing_rounds=1))
    seen: set[tuple[int, ...]] = set()
    real = Engine.infer
    monkeypatch.setattr(Engine, "infer", lambda self, inputs: seen.add(inputs["x"].shape) or real(self, inputs))
    bench(plan.path, batches=[4], **SHORT)
    assert seen == {(4, 24)}


def test_without_profiles_other_dynamic_sizes_are_one(tmp_path: Path) -> None:
    source = save(doubling(("batch", "length")), tmp_path / "m.onnx")
    plan = build(source, tmp_path / "m.plan", BuildConfig(timing_rounds=1))
    assert bench(plan.path, batches=[3], **SHORT)[0].batch == 3


def test_an_error_in_a_worker_is_raised_in_the_caller(qdq_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.infer
    calls: list[int] = []

    def breaks(self: Engine, inputs: dict[str, np.ndarray]) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise InferenceError("out of tune")
        return real(self, inputs)

    monkeypatch.setattr(Engine, "infer", breaks)
    with pytest.raises(InferenceError, match="out of tune"):
        bench(qdq_plan.path, contexts=[2], **SHORT)


def test_a_missing_plan_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanCorruptError):
        bench(tmp_path / "none.plan", **SHORT)
