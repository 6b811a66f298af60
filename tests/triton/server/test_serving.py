"""A real tritonserver on loopback: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.cli.commands import LIMIT_S, SERVE_ON_FREE_PORTS, ServeCommand, run, started, wait_until
from tests.validation.nan_on_images import nan_on_images
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.engine import Engine
from trtdeploy.errors import ServerError
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.triton.client import InferenceClient, connect
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

QUICK = BuildConfig(timing_rounds=1)
LABELS = [str(digit) for digit in range(10)]
PERMUTED = ["3", "1", "4", "0", "5", "9", "2", "6", "8", "7"]
GATHER_BATCH = 4


def make_model(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: Any = ()) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def change_classifier(source: Path, target: Path, *, last: list[Any], constants: Any = (), labels: Any = None) -> Path:
    """The classifier with more nodes at its end, from ``before`` to ``logits``."""
    model = onnx.load(source)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(last)
    model.graph.initializer.extend(constants)
    if labels is not None:
        properties = {entry.key: entry.value for entry in model.metadata_props}
        helper.set_model_props(model, properties | {"trtdeploy.labels": json.dumps(labels)})
    onnx.save(model, target)
    return target


@pytest.fixture(scope="module")
def plans(qdq_plan: Plan, qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plans by model name and version."""
    folder = tmp_path_factory.mktemp("plans")
    value = helper.make_tensor_value_info
    divide_by_zero, their_constants = nan_on_images("before", "logits")
    models = {
        "negated": change_classifier(
            qdq_onnx, folder / "negated.onnx", last=[helper.make_node("Neg", ["before"], ["logits"])]
        ),
        "permuted": change_classifier(
            qdq_onnx,
            folder / "permuted.onnx",
            last=[helper.make_node("Gather", ["before", "order"], ["logits"], axis=1)],
            constants=[numpy_helper.from_array(np.array([LABELS.index(name) for name in PERMUTED]), "order")],
            labels=PERMUTED,
        ),
        "nan": change_classifier(
            qdq_onnx,
            folder / "nan.onnx",
            last=divide_by_zero,
            constants=their_constants,
        ),
        "gather": make_model(
            folder / "gather.onnx",
            [helper.make_node("Gather", ["table", "index"], ["row"])],
            [value("index", TensorProto.INT64, ["batch", 2])],
            [value("row", TensorProto.FLOAT, ["batch", 2, 3])],
            [numpy_helper.from_array(np.arange(30, dtype=np.float32).reshape(10, 3), "table")],
        ),
        "mixed": make_model(
            folder / "mixed.onnx",
            [
                helper.make_node("Identity", ["half"], ["half_out"]),
                helper.make_node("Neg", ["long"], ["long_out"]),
                helper.make_node("Not", ["flag"], ["flag_out"]),
                helper.make_node("ArgMax", ["single"], ["best"], axis=1, keepdims=0),
            ],
            [
                value("half", TensorProto.FLOAT16, [2, 3]),
                value("long", TensorProto.INT64, [2]),
                value("flag", TensorProto.BOOL, [2, 1]),
                value("single", TensorProto.FLOAT, ["batch", 4]),
            ],
            [
                value("half_out", TensorProto.FLOAT16, [2, 3]),
                value("long_out", TensorProto.INT64, [2]),
                value("flag_out", TensorProto.BOOL, [2, 1]),
                value("best", TensorProto.INT64, ["batch"]),
            ],
        ),
    }
    return {"digits": qdq_plan.path} | {
        name: build(path, folder / f"{name}.plan", QUICK).path for name, path in models.items()
    }


@pytest.fixture(scope="module")
def server(plans: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One server for all tests that only ask."""
    repository = tmp_path_factory.mktemp("served") / "models"
    digits = package(plans["digits"], repository, "digits", options=PackageOptions(max_queue_delay_us=2000)).folder
    with (digits / "config.pbtxt").open("a") as config:
        config.write("version_policy { all { } }\n")
    package(plans["negated"], repository, "digits", options=PackageOptions(max_queue_delay_us=2000, contexts=2))
    for name in ("permuted", "nan", "mixed"):
        package(plans[name], repository, name)
    # a batch is complete with four requests, and nothing runs before that
    complete = PackageOptions(max_batch_size=GATHER_BATCH, max_queue_delay_us=20_000_000)
    package(plans["gather"], repository, "gather", options=complete)
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: TritonServer) -> Iterator[InferenceClient]:
    url = server.http_url if request.param == "http" else server.grpc_url
    with connect(url, timeout_s=LIMIT_S) as connection:
        yield connection


@pytest.fixture(scope="module")
def engine(qdq_plan: Plan) -> Iterator[Engine]:
    with Engine.load(qdq_plan.path) as loaded:
        yield loaded


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def statistics(server: TritonServer, name: str) -> dict[str, Any]:
    import tritonclient.http

    asked = tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://"))
    try:
        facts: dict[str, Any] = asked.get_inference_statistics(name)["model_stats"][0]
        return facts
    finally:
        asked.close()


def test_the_server_says_what_was_packaged(client: InferenceClient, qdq_plan: Plan) -> None:
    model = client.describe("digits", "1")
    assert (model.name, model.version, model.max_batch_size) == ("digits", "1", 32)
    assert (model.inputs, model.outputs) == (qdq_plan.manifest.inputs, qdq_plan.manifest.outputs)
    assert model.preprocessing == qdq_plan.manifest.preprocessing
    assert model.labels == qdq_plan.manifest.labels


@pytest.mark.parametrize("count", [1, 5, 32])
def test_answers_are_those_of_the_engine(count: int, client: InferenceClient, engine: Engine) -> None:
    batch = images(count, seed=count)
    answer = client.infer(client.describe("digits", "1"), {"input": batch})["logits"]
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4)


def test_both_versions_are_served_and_the_newest_answers_by_default(client: InferenceClient, engine: Engine) -> None:
    batch = images(3)
    expected = engine.infer({"input": batch})["logits"]
    newest = client.describe("digits")
    assert newest.version == "2"
    for model, sign in ((client.describe("digits", "1"), 1), (newest, -1)):
        np.testing.assert_allclose(
            client.infer(model, {"input": batch})["logits"], sign * expected, rtol=1e-4, atol=1e-4
        )


def test_every_request_of_many_threads_gets_its_own_answer(
    client: InferenceClient, server: TritonServer, engine: Engine
) -> None:
    model = client.describe("digits", "1")
    requests = [images(1 + number % 3, seed=1000 + number) for number in range(400)]
    before = statistics(server, "digits")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda batch: client.infer(model, {"input": batch})["logits"], requests))
    after = statistics(server, "digits")
    for batch, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, engine.infer({"input": batch})["logits"], rtol=1e-4, atol=1e-4)
    executions = int(after["execution_count"]) - int(before["execution_count"])
    assert executions < len(requests), "no batch was formed"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"image": images(1)}, "image"),
        ({}, "input"),
        ({"input": images(1)[:, :, :16]}, "shape"),
        ({"input": images(1)[0]}, "shape|batch"),
        ({"input": images(33)}, "33|32"),
        ({"input": images(1).astype(np.float16)}, "FP16|FP32"),
        ({"input": images(1).astype(np.int64)}, "INT64|FP32"),
    ],
    ids=["name", "nothing", "shape", "rank", "batch", "half", "int64"],
)
def test_a_wrong_request_is_refused_and_the_server_goes_on(
    inputs: dict[str, Array], words: str, client: InferenceClient
) -> None:
    model = client.describe("digits", "1")
    with pytest.raises(ServerError, match=words) as caught:
        client.infer(model, inputs)
    assert client.url in str(caught.value)
    assert client.infer(model, {"input": images(1)})["logits"].shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "version"), [("absent", ""), ("digits", "3"), ("digits", "x"), ("", ""), ("a/b", ""), ("nän", "")]
)
def test_a_model_that_is_not_there_is_a_server_error(name: str, version: str, client: InferenceClient) -> None:
    with pytest.raises(ServerError):
        client.describe(name, version)


def test_a_bad_request_in_a_formed_batch_leaves_the_others_alone(client: InferenceClient, server: TritonServer) -> None:
    model = client.describe("gather")
    table = np.arange(30, dtype=np.float32).reshape(10, 3)

    def ask(index: int) -> Array | ServerError:
        try:
            return client.infer(model, {"index": np.array([[index, 1]])})["row"]
        except ServerError as error:
            return error

    with ThreadPoolExecutor(GATHER_BATCH) as threads:
        good = list(threads.map(ask, range(GATHER_BATCH)))
        batches = {int(entry["batch_size"]) for entry in statistics(server, "gather")["batch_stats"]}
        mixed = list(threads.map(ask, [5, 99, 6, 7]))
    assert batches == {GATHER_BATCH}
    for index, answer in enumerate(good):
        np.testing.assert_array_equal(answer, table[[[index, 1]]])
    for index, answer in ((5, mixed[0]), (6, mixed[2]), (7, mixed[3])):
        np.testing.assert_array_equal(answer, table[[[index, 1]]])
    assert isinstance(mixed[1], ServerError)
    assert "99" in str(mixed[1])


def test_other_data_types_and_fixed_shapes_go_through(client: InferenceClient) -> None:
    model = client.describe("mixed")
    assert model.max_batch_size == 0
    inputs = {
        "half": np.array([[1.5, -2, 0], [65504, 6e-8, np.inf]], np.float16),
        "long": np.array([2**62, -3]),
        "flag": np.array([[True], [False]]),
        "single": np.array([[0, 3, 1, 2], [9, 1, 1, 1], [0, 0, 0, 1]], np.float32),
    }
    outputs = client.infer(model, inputs)
    np.testing.assert_array_equal(outputs["half_out"], inputs["half"])
    np.testing.assert_array_equal(outputs["long_out"], -inputs["long"])
    np.testing.assert_array_equal(outputs["flag_out"], ~inputs["flag"])
    np.testing.assert_array_equal(outputs["best"], [1, 0, 3])
    assert {name: array.dtype.name for name, array in outputs.items()} == {
        "half_out": "float16",
        "long_out": "int64",
        "flag_out": "bool",
        "best": "int64",
    }


# validate


def validate(server: TritonServer, *arguments: object, scheme: str = "grpc", model: str = "digits") -> Any:
    url = server.grpc_url if scheme == "grpc" else server.http_url
    return CliRunner().invoke(
        app, ["validate", "--url", url, "--model", model, "--data", "digits", *map(str, arguments)]
    )


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_validation_of_what_is_served(
    scheme: str, server: TritonServer, qdq_onnx: Path, qdq_plan: Plan, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.json"
    gates = ("--reference", qdq_onnx, "--min-agreement", 99, "--max-drop", 1)
    done = validate(server, "--version", 1, *gates, "--ledger", ledger, "--batch-size", 8, "--json", scheme=scheme)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["version"] == "1"
    assert facts["n"] == 359
    assert facts["agreement"] >= 99
    assert [gate["passed"] for gate in facts["gates"]] == [True, True]
    stages = Ledger(ledger).stages
    assert list(stages) == ["served"]
    assert stages["served"].top1.value == facts["top1"]["value"]
    assert stages["served"].source["version"] == "1"
    assert stages["served"].answered_by == facts["answered_by"] == {"1": 359}
    shown = CliRunner().invoke(app, ["ledger", "show", str(ledger)]).stdout
    assert "served was answered by version 1: 359" in shown
    recorded = Ledger(ledger).outputs("served").logits
    again = validate(server, "--version", 1, "--ledger", ledger, "--concurrency", 7, "--batch-size", 3, scheme=scheme)
    assert again.exit_code == 0, again.output
    np.testing.assert_allclose(Ledger(ledger).outputs("served").logits, recorded, rtol=1e-4, atol=1e-4)


def test_a_version_that_answers_otherwise_fails_the_gate(server: TritonServer, qdq_onnx: Path, tmp_path: Path) -> None:
    done = validate(server, "--reference", qdq_onnx, "--min-agreement", 99, "--batch-size", 32)
    assert done.exit_code == 1
    assert re.search(r"FAILED +agreement \d", done.stdout)
    assert "answered by version 2: 359" in done.stdout  # the server's choice is the newest


def test_labels_in_another_order_are_matched_by_name(server: TritonServer, qdq_onnx: Path) -> None:
    facts = []
    for arguments in (("--version", 1), ("--reference", qdq_onnx, "--min-agreement", 99)):
        name = "digits" if "--version" in arguments else "permuted"
        done = validate(server, *arguments, "--batch-size", 32, "--json", model=name)
        assert done.exit_code == 0, done.output
        facts.append(json.loads(done.stdout))
    assert facts[0]["top1"]["value"] == pytest.approx(facts[1]["top1"]["value"], abs=0.6)


@pytest.mark.parametrize(
    ("arguments", "model", "code", "words"),
    [
        (["--max-drop", "nan"], "digits", 2, "max_drop"),
        (["--max-drop", "1"], "digits", 2, "--max-drop needs something to drop from"),
        (["--batch-size", "33"], "digits", 2, "at most 32 samples per request, not 33"),
        ([], "nan", 2, "not finite"),
        ([], "absent", 3, "absent"),
        (["--version", "7"], "digits", 3, "7"),
        ([], "mixed", 2, "4 inputs and 4 outputs"),
        (["--timeout", "0.000001"], "digits", 2, "--timeout"),
    ],
)
def test_validation_says_what_is_wrong(
    arguments: list[str], model: str, code: int, words: str, server: TritonServer, tmp_path: Path
) -> None:
    done = validate(server, *arguments, "--ledger", tmp_path / "ledger.json", model=model)
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("*.json"))


def test_the_wrong_protocol_is_explained(server: TritonServer) -> None:
    for url in (server.grpc_url.replace("grpc", "http"), server.http_url.replace("http", "grpc")):
        with connect(url, timeout_s=10) as confused, pytest.raises(ServerError, match="is this its port for this"):
            confused.describe("digits")


def test_a_closed_client_and_a_stopped_server_are_server_errors(server: TritonServer) -> None:
    with pytest.raises(ServerError, match="already running"):
        server.start()
    client = connect(server.grpc_url)
    client.close()
    with pytest.raises(ServerError):
        client.describe("digits")


# trtdeploy serve


@pytest.fixture(scope="module")
def small_repository(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("small") / "models"
    # every request waits a little, so that a validation takes its time
    package(qdq_plan.path, repository, "digits", options=PackageOptions(max_queue_delay_us=20_000))
    return repository


def test_serve_ends_in_order_on_every_signal(small_repository: Path) -> None:
    """Four servers at the same time: SIGTERM, SIGINT, SIGHUP without a stderr, and an impatient second Ctrl-C."""
    dead_proxy = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    cases: list[tuple[int, int, dict[str, Any], tuple[object, ...]]] = [
        (signal.SIGTERM, 0, {"env": dead_proxy}, ()),
        (signal.SIGINT, 0, {}, ()),
        (signal.SIGHUP, 0, {}, ("--", "--log-verbose=1")),
        (signal.SIGINT, 130, {}, ()),
    ]
    with ExitStack() as stack:
        processes = []
        for number, _, options, more in cases:
            process = stack.enter_context(started("serve", small_repository, *SERVE_ON_FREE_PORTS, *more, **options))
            assert process.stderr is not None
            if number == signal.SIGHUP:  # the terminal is gone, and the pipe to it closed
                process.stderr.close()
                process.stderr = None
            else:
                threading.Thread(target=process.stderr.read, daemon=True).start()
            processes.append(process)
        servers = [ServeCommand(process) for process in processes]
        for server, (number, code, _, _) in zip(servers, cases, strict=True):
            with connect(server.grpc_url) as client:
                model = client.describe("digits")
                assert client.infer(model, {"input": images(2)})["logits"].shape == (2, 10)
            assert len(server.children) >= 2, "a server and a stub of the Python backend"
            server.process.send_signal(number)
            if code == 130:
                wait_until(lambda: not accepts(servers[-1].ports[0]), "the server began to stop")
                server.process.send_signal(number)
        for server, (number, code, _, _) in zip(servers, cases, strict=True):
            assert server.process.wait(LIMIT_S) == code, signal.Signals(number).name
            server.assert_nothing_is_left()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def infer_count(http_url: str) -> int:
    import tritonclient.http

    asked = tritonclient.http.InferenceServerClient(http_url.removeprefix("http://"))
    try:
        return int(asked.get_inference_statistics("digits")["model_stats"][0]["inference_count"])
    finally:
        asked.close()


def test_a_server_that_is_killed_ends_validations_and_serve_with_exit_code_3(
    small_repository: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        serving = stack.enter_context(started("serve", small_repository, *SERVE_ON_FREE_PORTS))
        assert serving.stderr is not None
        log: list[str] = []
        stderr = serving.stderr
        reader = threading.Thread(target=lambda: log.extend(stderr), daemon=True)
        reader.start()
        server = ServeCommand(serving)

        # a busy port, while there is one
        busy = run("serve", small_repository, "--http-port", server.ports[0], "--grpc-port", 0, "--metrics-port", 0)
        assert busy.returncode == 3
        assert f"Port {server.ports[0]} on 127.0.0.1 is taken" in busy.stderr
        assert "Traceback" not in busy.stderr

        # a ledger that has something to lose
        ledgers = {}
        for url in (server.grpc_url, server.http_url):
            folder = tmp_path / url[:4]
            folder.mkdir()
            record_float_stage(folder / "ledger.json")
            ledgers[url] = {path: path.read_bytes() for path in folder.glob("*.*")}
        before = infer_count(server.http_url)
        validations = [
            stack.enter_context(
                started(
                    *("validate", "--url", url, "--model", "digits", "--data", "digits", "--concurrency", 2),
                    *("--max-drop", 100, "--ledger", tmp_path / url[:4] / "ledger.json"),
                )
            )
            for url in ledgers
        ]
        wait_until(lambda: infer_count(server.http_url) > before + 110, "both validations are under way")
        os.kill(server.server_pid, signal.SIGKILL)
        for validation, (url, files) in zip(validations, ledgers.items(), strict=True):
            output, errors = validation.communicate(timeout=LIMIT_S)
            assert validation.returncode == 3, errors
            assert re.search(r"error: (\d+ of 359 requests were answered, then: )?The server at ", errors)
            assert url in errors
            assert "Traceback" not in errors
            assert output == ""
            assert {path: path.read_bytes() for path in (tmp_path / url[:4]).glob("*.*")} == files
        assert serving.wait(LIMIT_S) == 3
        reader.join(LIMIT_S)
        assert any("tritonserver ended with signal SIGKILL" in line for line in log)
        assert "Traceback" not in "".join(log)
        server.assert_nothing_is_left()


def record_float_stage(path: Path) -> None:
    from trtdeploy.data import open_dataset
    from trtdeploy.ledger import StageOutputs

    with open_dataset("digits") as dataset:
        split = dataset.split("test")
        logits = np.eye(10, dtype=np.float32)[split.labels]
        facts = {"name": "digits", "fingerprint": dataset.fingerprint}
        Ledger(path).record("float", StageOutputs(split.ids, split.labels, logits), seconds=1, source={}, dataset=facts)


def test_a_model_that_does_not_load_ends_serve_with_its_reason(
    small_repository: Path, qdq_plan: Plan, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    package(qdq_plan.path, repository, "good")
    broken = package(qdq_plan.path, repository, "broken").folder / "1" / "engine.plan"
    broken.write_bytes(broken.read_bytes()[:-10])
    with started("serve", repository, *SERVE_ON_FREE_PORTS, stdout=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3
    assert output == ""
    message = errors[errors.index("error: ") :]
    assert "tritonserver ended with exit code" in message
    assert "engine.plan is not the one that its manifest describes" in message
    assert "Traceback" not in errors
    assert "NVML" not in message


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["empty"], 2, "empty holds no model"),
        (["absent"], 2, "There is no model repository at absent"),
        (["models", "--tritonserver", "/nowhere/tritonserver"], 3, "/nowhere/tritonserver is not an executable"),
        (["models", "--tritonserver", "true"], 3, "true ended|tritonserver ended with exit code 0"),
        (
            ["models", "--", "--http-max-input-sice=5"],
            3,
            r"error: tritonserver refuses its command line: unrecognized option '--http-max-input-sice=5'\.\n.*--help",
        ),
        (["models", "--http-port", "9", "--grpc-port", "9"], 2, "must differ"),
        (["models", "--host", "192.0.2.1"], 3, "192.0.2.1"),
        (["models", "--ready-timeout", "nan"], 2, "--ready-timeout"),
        (["models", "--drain-timeout", "inf"], 2, "--drain-timeout"),
    ],
)
def test_serve_says_why_it_does_not_start(
    arguments: list[str], code: int, words: str, small_repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "models").symlink_to(small_repository)
    shutil.copy("/bin/true", tmp_path / "true")
    ports = () if "--http-port" in arguments else SERVE_ON_FREE_PORTS
    done = run("serve", *ports, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(words, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_server_that_never_becomes_ready_is_stopped(small_repository: Path, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\necho E no progress\nsleep 1000 & wait\n")
    stuck.chmod(0o755)
    server = TritonServer(
        small_repository,
        find_tritonserver(stuck),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        ready_timeout_s=0.5,
        drain_timeout_s=1,
    )
    with pytest.raises(ServerError, match=r"was not ready within 0\.5 s") as caught:
        server.start()
    assert caught.value.log_lines == ("E no progress",)
    with pytest.raises(ServerError, match="not running"):
        _ = server.pid
