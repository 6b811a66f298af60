from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtdeploy
from trtdeploy.errors import LedgerError
from trtdeploy.files import sha256_bytes
from trtdeploy.ledger import STAGES, Ledger, Stage, StageOutputs, StageRecord, top1_of
from trtdeploy.statistics import wilson_percent

REPOSITORY = Path(trtdeploy.__file__).parents[1]
DATASET = {"name": "digits", "fingerprint": "0123456789abcdef"}

RECORD_MANY_TIMES = """
import sys
import numpy as np
from trtdeploy.ledger import Ledger, StageOutputs
stage, path, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
n = 20
logits = np.eye(4, dtype=np.float32)[np.arange(n) % (2 if stage == "ptq" else 4)]
outputs = StageOutputs(tuple(map(str, range(n))), np.arange(n) % 4, logits)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(turns):
    Ledger(path).record(stage, outputs, seconds=turn, source={"turn": turn}, dataset={"name": "d"})
"""


def answers(predictions: list[int], *, labels: list[int] | None = None, ids: str = "abcdefghij") -> StageOutputs:
    """Outputs whose highest score is where ``predictions`` says."""
    logits = np.full((len(predictions), 4), -1, dtype=np.float32)
    logits[np.arange(len(predictions)), predictions] = 2.5
    true = labels if labels is not None else [0] * len(predictions)
    return StageOutputs(tuple(ids[: len(predictions)]), np.asarray(true, dtype=np.int64), logits)


def record(ledger: Ledger, stage: Stage, outputs: StageOutputs, **changes: Any) -> StageRecord:
    facts: dict[str, Any] = {"seconds": 1.25, "source": {"file": f"{stage}.pt"}, "dataset": DATASET, **changes}
    return ledger.record(stage, outputs, **facts)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.json")


# --- outputs of a stage ---


def test_predictions_top1_and_agreement_are_those_of_the_scores() -> None:
    first = answers([0, 1, 2, 0], labels=[0, 1, 3, 3])
    second = answers([0, 1, 3, 3], labels=[0, 1, 3, 3])
    assert first.predictions.tolist() == [0, 1, 2, 0]
    assert first.predictions.dtype == np.int64
    assert first.top1 == wilson_percent(2, 4)
    assert second.top1.value == 100
    assert first.agreement(second) == second.agreement(first) == 50
    assert first.agreement(first) == 100


def test_top1_of_lists_is_that_of_outputs() -> None:
    outputs = answers([0, 1, 2, 0, 1], labels=[0, 1, 3, 3, 1])
    assert top1_of(outputs.labels, outputs.predictions) == top1_of([0, 1, 3, 3, 1], [0, 1, 2, 0, 1]) == outputs.top1


@pytest.mark.parametrize(
    "other",
    [
        answers([0, 1, 2], ids="abx"),
        answers([0, 1, 2], ids="bac"),
        answers([0, 1]),
        answers([0, 1, 2], labels=[0, 0, 1]),
    ],
    ids=["another id", "another order", "fewer", "another label"],
)
def test_outputs_of_different_samples_are_not_compared(other: StageOutputs) -> None:
    with pytest.raises(LedgerError, match="different samples"):
        answers([0, 1, 2]).agreement(other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_and_counted(value: float) -> None:
    logits = np.zeros((5, 3), np.float32)
    logits[1, 2] = logits[4, 0] = logits[4, 1] = value
    with pytest.raises(LedgerError, match="2 of 5 samples is not finite"):
        StageOutputs(tuple("abcde"), np.zeros(5, np.int64), logits)


@pytest.mark.parametrize(
    ("ids", "labels", "logits"),
    [((), (0,), (0, 3)), (("a",), (2,), (1, 3)), (("a",), (1,), (2, 3)), (("a",), (1,), (3,)), (("a",), (1,), (1, 0))],
    ids=["no samples", "labels", "logits", "rank", "no classes"],
)
def test_parts_that_do_not_belong_together_are_refused(
    ids: tuple[str, ...], labels: tuple[int], logits: tuple[int, ...]
) -> None:
    with pytest.raises(LedgerError, match="do not belong together"):
        StageOutputs(ids, np.zeros(labels, np.int64), np.zeros(logits, np.float32))


def test_outputs_survive_serialization_bit_for_bit() -> None:
    ids = ("train/größe/1.png", "a b.png", "c" * 300)
    logits = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    outputs = StageOutputs(ids, np.array([3, 999, 0]), logits)
    again = StageOutputs.from_npz(outputs.to_npz())
    assert again.ids == ids
    np.testing.assert_array_equal(again.labels, outputs.labels)
    np.testing.assert_array_equal(again.logits, logits)
    assert (again.labels.dtype.name, again.logits.dtype.name) == ("int64", "float32")
    assert outputs.to_npz() == again.to_npz()


class Trap:
    """Leaves a mark when it is unpickled."""

    mark: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (Trap.mark,)


@pytest.mark.parametrize("field", ["ids", "labels", "logits"])
def test_pickled_objects_in_outputs_are_refused_and_never_run(tmp_path: Path, field: str) -> None:
    Trap.mark = str(tmp_path / "mark")
    arrays: dict[str, Any] = {"ids": np.array(["a"]), "labels": np.array([0]), "logits": np.zeros((1, 2), np.float32)}
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, field: np.array([Trap()], dtype=object)})
    with pytest.raises(LedgerError, match="not a stage's outputs"):
        StageOutputs.from_npz(buffer.getvalue())
    assert not (tmp_path / "mark").exists()


def test_bytes_that_are_no_outputs_are_refused() -> None:
    content = answers([0, 1, 2]).to_npz()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    other = io.BytesIO()
    np.savez(other, ids=np.array(["a"]), labels=np.array([0]))
    for damaged in (b"", b"PK\x03\x04", b"text", array.getvalue(), other.getvalue()):
        with pytest.raises(LedgerError):
            StageOutputs.from_npz(damaged)
    for end in range(0, len(content), 7):
        with pytest.raises(LedgerError):
            StageOutputs.from_npz(content[:end])
    for position in range(0, len(content), 5):
        damaged = content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]
        try:
            StageOutputs.from_npz(damaged)
        except LedgerError:
            continue


# --- recording and reading ---


def test_a_recorded_stage_reads_back_with_everything_that_was_said(ledger: Ledger, tmp_path: Path) -> None:
    outputs = answers([0, 1, 0, 0])
    source = {"file": "b0.pt", "epochs": 3}
    made = record(ledger, "float", outputs, seconds=2.00049, latency_ms=1.5, source=source)
    assert Ledger(str(tmp_path / "ledger.json")).stages == {"float": made}
    assert (made.n, made.seconds, made.latency_ms, made.source) == (4, 2.0, 1.5, source)
    assert made.top1 == wilson_percent(3, 4)
    assert made.agreement is None
    content = (tmp_path / "ledger.float.npz").read_bytes()
    assert (made.outputs, made.outputs_sha256) == ("ledger.float.npz", sha256_bytes(content))
    assert made.recorded_at.endswith("+00:00")
    read = ledger.outputs("float")
    assert read.ids == outputs.ids
    np.testing.assert_array_equal(read.logits, outputs.logits)


def test_the_file_is_plain_json_with_the_documented_fields(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 1, 0, 0]))
    record(ledger, "ptq", answers([0, 0, 0, 0]))
    content = json.loads(ledger.path.read_text(encoding="utf-8"))
    assert content["dataset"] == DATASET
    stage = content["stages"]["ptq"]
    assert stage["n"] == 4
    assert set(stage["top1"]) == {"value", "low", "high"}
    assert stage["top1"]["value"] == 100
    assert stage["agreement"] == 75
    assert stage["seconds"] == 1.25
    assert stage["source"] == {"file": "ptq.pt"}


def test_stages_come_in_the_order_of_the_road_whatever_the_order_of_recording(ledger: Ledger) -> None:
    shuffled: tuple[Stage, ...] = ("served", "ptq", "plan", "float", "qat", "onnx")
    for stage in shuffled:
        record(ledger, stage, answers([0, 1]))
    assert tuple(ledger.stages) == STAGES
    assert list(json.loads(ledger.path.read_text())["stages"]) == list(STAGES)
    assert list(ledger.summary()) == list(STAGES)


def test_agreement_is_with_the_previous_recorded_stage_and_with_float(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 0, 0, 0]))
    record(ledger, "ptq", answers([0, 0, 0, 1]))
    record(ledger, "plan", answers([0, 0, 1, 1]))
    found = {stage: (item.agreement, item.agreement_with_float) for stage, item in ledger.stages.items()}
    assert found == {"float": (None, 100), "ptq": (75, 75), "plan": (75, 50)}


def test_a_ledger_without_float_has_no_agreement_with_it(ledger: Ledger) -> None:
    record(ledger, "onnx", answers([0, 0]))
    made = record(ledger, "plan", answers([0, 1]))
    assert (made.agreement, made.agreement_with_float) == (50, None)
    record(ledger, "float", answers([1, 1]))
    found = {stage: (item.agreement, item.agreement_with_float) for stage, item in ledger.stages.items()}
    assert found == {"float": (None, 100), "onnx": (0, 0), "plan": (50, 50)}


def test_recording_a_stage_in_the_middle_again_updates_its_neighbours(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 0, 0, 0]))
    record(ledger, "ptq", answers([0, 0, 0, 1]))
    record(ledger, "plan", answers([0, 0, 1, 1]))
    before = ledger.stages
    made = record(ledger, "ptq", answers([1, 1, 1, 1]))
    after = ledger.stages
    assert after["ptq"] == made
    assert (made.agreement, made.agreement_with_float) == (0, 0)
    assert (after["plan"].agreement, after["plan"].agreement_with_float) == (50, 50)
    assert after["float"] == before["float"]
    unchanged = {"agreement", "agreement_with_float", "against_previous", "against_float", "kl_from_float"}
    assert after["plan"].model_dump(exclude=unchanged) == before["plan"].model_dump(exclude=unchanged)
    assert ledger.outputs("ptq").predictions.tolist() == [1, 1, 1, 1]


def test_a_stage_inserted_later_becomes_its_successors_neighbour(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 0, 0, 0]))
    record(ledger, "onnx", answers([0, 0, 0, 1]))
    record(ledger, "qat", answers([1, 1, 0, 1]))
    assert ledger.stages["qat"].agreement == 25
    assert ledger.stages["onnx"].agreement == 50
    assert ledger.stages["onnx"].agreement_with_float == 75


def test_the_summary_is_top1_and_number_of_samples(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 1, 0, 0]))
    assert ledger.summary() == {"float": {"n": 4, "top1": 75.0}}


def test_two_ledgers_in_one_folder_do_not_share_outputs(tmp_path: Path) -> None:
    for name, predictions in (("a.json", [0, 0]), ("b.json", [1, 1])):
        record(Ledger(tmp_path / name), "float", answers(predictions))
    assert Ledger(tmp_path / "a.json").outputs("float").predictions.tolist() == [0, 0]


def test_facts_that_json_spells_differently_still_match_on_the_next_recording(ledger: Ledger, tmp_path: Path) -> None:
    dataset = {"name": "d", "classes": ("a", "b"), 1: tmp_path}
    record(ledger, "float", answers([0, 0]), dataset=dataset, source={"file": tmp_path / "b0.pt"})
    record(ledger, "ptq", answers([0, 1]), dataset=dataset)
    assert ledger.stages["ptq"].agreement == 50
    assert ledger.stages["float"].source == {"file": str(tmp_path / "b0.pt")}


# --- refusals leave everything as it was ---


@pytest.mark.parametrize(
    ("outputs", "changes", "message"),
    [
        (answers([0, 1, 2, 3], ids="abcx"), {}, "different samples"),
        (answers([0, 1, 2]), {}, "different samples"),
        (answers([0, 1, 2, 3], labels=[0, 0, 0, 1]), {}, "different samples"),
        (answers([0, 1, 2, 3]), {"dataset": {**DATASET, "fingerprint": "f" * 16}}, "belongs to dataset"),
        (answers([0, 1, 2, 3]), {"seconds": math.nan}, "cannot be recorded"),
        (answers([0, 1, 2, 3]), {"latency_ms": math.inf}, "cannot be recorded"),
        (answers([0, 1, 2, 3]), {"source": {"loss": math.nan}}, "cannot be kept in a ledger"),
        (answers([0, 1, 2, 3]), {"source": {"model": object()}}, "cannot be kept in a ledger"),
    ],
    ids=["ids", "count", "labels", "dataset", "nan seconds", "inf latency", "nan source", "object source"],
)
@pytest.mark.parametrize("stage", ["ptq", "onnx"])
def test_what_is_refused_changes_no_byte(
    ledger: Ledger, stage: Stage, outputs: StageOutputs, changes: dict[str, Any], message: str
) -> None:
    record(ledger, "float", answers([0, 0, 0, 0]))
    record(ledger, "ptq", answers([0, 0, 0, 1]))
    before = snapshot(ledger.path.parent)
    with pytest.raises(LedgerError, match=message):
        record(ledger, stage, outputs, **changes)
    assert snapshot(ledger.path.parent) == before
    assert ledger.outputs("ptq").predictions.tolist() == [0, 0, 0, 1]


def test_a_name_that_is_no_stage_is_refused_with_the_list(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="'int8' is no stage; the stages are float, ptq, qat, onnx, plan, served"):
        record(ledger, "int8", answers([0]))  # type: ignore[arg-type]
    assert not ledger.path.exists()


def test_outputs_of_a_stage_that_was_not_recorded_are_refused_with_the_list(ledger: Ledger) -> None:
    record(ledger, "float", answers([0]))
    with pytest.raises(LedgerError, match=r"no stage 'plan'; it has \['float'\]"):
        ledger.outputs("plan")


# --- damage ---


def test_a_ledger_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no readable ledger at .*none\.json"):
        Ledger(tmp_path / "none.json").stages  # noqa: B018


def test_changed_outputs_are_noticed(ledger: Ledger) -> None:
    record(ledger, "float", answers([0, 0, 0, 0]))
    better = answers([1, 0, 0, 0]).to_npz()
    (ledger.path.parent / "ledger.float.npz").write_bytes(better)
    with pytest.raises(LedgerError, match="SHA-256 differs") as caught:
        ledger.outputs("float")
    assert caught.value.hint == "Record this stage again."
    with pytest.raises(LedgerError, match="SHA-256 differs"):
        record(ledger, "ptq", answers([0, 0, 0, 0]))
    assert list(ledger.stages) == ["float"]
    record(ledger, "float", answers([0, 0, 0, 0]))
    assert ledger.outputs("float").predictions.tolist() == [0, 0, 0, 0]


def test_missing_outputs_are_named(ledger: Ledger) -> None:
    record(ledger, "float", answers([0]))
    (ledger.path.parent / "ledger.float.npz").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.float\.npz.* cannot be read"):
        ledger.outputs("float")


def test_outputs_are_read_from_beside_the_ledger_only(ledger: Ledger, tmp_path: Path) -> None:
    record(ledger, "float", answers([0]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (ledger.path.parent / "ledger.float.npz").rename(elsewhere / "stolen.npz")
    content = json.loads(ledger.path.read_text())
    content["stages"]["float"]["outputs"] = "elsewhere/stolen.npz"
    ledger.path.write_text(json.dumps(content))
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.outputs("float")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"float": {', '"fp32": {'),
        lambda text: text.replace('"seconds": 1.25', '"seconds": NaN'),
        lambda text: text.replace('"value": 100.0', '"value": NaN'),
        lambda text: text.replace('"value": 100.0', '"value": Infinity'),
        lambda text: text.replace('"n": 2,', ""),
        lambda text: text.replace('"n": 2,', '"n": "many",'),
    ],
    ids=[
        "empty",
        "truncated",
        "a list",
        "no format",
        "unknown stage",
        "nan seconds",
        "nan top-1",
        "infinite top-1",
        "missing key",
        "text for a number",
    ],
)
def test_a_damaged_ledger_is_refused_and_left_alone(ledger: Ledger, change: Any) -> None:
    record(ledger, "float", answers([0, 0]))
    damaged = change(ledger.path.read_text())
    assert damaged != ledger.path.read_text()
    ledger.path.write_text(damaged)
    with pytest.raises(LedgerError, match=r"ledger\.json is not a ledger of this version"):
        ledger.stages  # noqa: B018
    with pytest.raises(LedgerError):
        record(ledger, "ptq", answers([0, 0]))
    assert ledger.path.read_text() == damaged


def test_a_ledger_that_is_not_text_is_refused(ledger: Ledger) -> None:
    ledger.path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(LedgerError, match="not a ledger"):
        ledger.stages  # noqa: B018


# --- several writers ---


def test_threads_that_record_different_stages_at_once_all_survive(ledger: Ledger) -> None:
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda stage: record(ledger, stage, answers([0, 1, 2])), STAGES))
    assert tuple(ledger.stages) == STAGES
    assert [item.agreement for item in ledger.stages.values()] == [None, 100, 100, 100, 100, 100]


def test_processes_that_record_different_stages_at_once_both_survive(ledger: Ledger) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RECORD_MANY_TIMES, stage, str(ledger.path), "12"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for stage in ("ptq", "onnx")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    stages = ledger.stages
    assert [(stage, item.source["turn"]) for stage, item in stages.items()] == [("ptq", 11), ("onnx", 11)]
    assert stages["onnx"].agreement == 50
    assert ledger.outputs("ptq").top1.value == 50
    assert ledger.outputs("onnx").top1.value == 100
