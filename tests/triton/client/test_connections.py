"""Reaching a real tritonserver: TLS, headers, streams, asyncio, deadlines and shared memory."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.cli.commands import LIMIT_S, started, wait_until
from tests.triton.client.certificates import Authority, tls_in_front_of
from trtdeploy.cli.main import app
from trtdeploy.engine import Engine
from trtdeploy.errors import ServerError, TrtDeployError, UsageError
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.triton.client import (
    AccessDeniedError,
    ConnectionOptions,
    DeadlineExceededError,
    InferenceClient,
    ServedModel,
    ServerUnavailableError,
    SharedMemoryError,
    StreamBrokenError,
    TlsError,
    connect,
    connect_async,
)
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.config.options import QueuePolicy
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.repository.versions import publish
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.options import ServerOptions
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

SECRET = "s3cret-and-long"
GRPC_KEY, HTTP_KEY = "triton-grpc-protocol-guard", "guard"
DELAY_S = 1.8  # what a request takes that waits for others
SHORT_S = 1.0  # what any other request takes at most


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def run_server(repository: Path, options: ServerOptions) -> TritonServer:
    return TritonServer(
        repository,
        find_tritonserver(),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        options=options.arguments(repository),
        health_headers=options.health_headers,
    )


# TLS and headers


@dataclass(frozen=True)
class Guarded:
    """A server with mutual TLS on gRPC and a key on inference; over HTTP the same behind a TLS end."""

    grpcs: str
    https: str
    server: TritonServer
    authority: Authority
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]
    other_authority: Authority
    wrong_name: tuple[Path, Path]

    def url(self, scheme: str) -> str:
        return self.grpcs if scheme == "grpcs" else self.https

    def options(self, scheme: str, **changes: Any) -> ConnectionOptions:
        key = GRPC_KEY if scheme == "grpcs" else HTTP_KEY
        right = {
            "ca_certificate": self.authority.certificate,
            "client_certificate": self.client[0],
            "client_key": self.client[1],
            "headers": {key: SECRET},
        }
        return ConnectionOptions(**{**right, **changes})


@pytest.fixture(scope="module")
def guarded(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    publish(qdq_plan.path, folder / "models", "digits")
    authority, other = Authority(folder, "authority"), Authority(folder, "other")
    ours, key = authority.sign("server", "DNS:localhost,IP:127.0.0.1")
    options = ServerOptions(
        grpc_tls_cert=ours,
        grpc_tls_key=key,
        grpc_tls_root=authority.certificate,
        restrict=(f"inference,model-repository:{HTTP_KEY}={SECRET}",),
        explicit=True,
    )
    with (
        run_server(folder / "models", options) as server,
        tls_in_front_of(server.http_port, (ours, key), authority.certificate) as https,
    ):
        yield Guarded(
            server.grpc_url.replace("grpc:", "grpcs:"),
            f"https://{https}",
            server,
            authority,
            authority.sign("client", "DNS:client"),
            other.sign("stranger", "DNS:stranger"),
            other,
            authority.sign("elsewhere", "DNS:elsewhere.example"),
        )


async def awaited(url: str, options: ConnectionOptions | None, inputs: dict[str, Array]) -> dict[str, Array]:
    async with connect_async(url, options=options, timeout_s=LIMIT_S) as client:
        return await client.infer(await client.describe("digits"), inputs)


def asked(url: str, options: ConnectionOptions | None, inputs: dict[str, Array], **how: Any) -> dict[str, Array]:
    with connect(url, options=options, timeout_s=LIMIT_S, **how) as client:
        return client.infer(client.describe("digits"), inputs)


WAYS: dict[str, Callable[..., dict[str, Array]]] = {
    "blocking": asked,
    "stream": lambda *given: asked(*given, stream=True),
    "asyncio": lambda *given: asyncio.run(awaited(*given)),
}
SCHEMES_AND_WAYS = [
    pytest.param(scheme, way, id=f"{scheme}-{way}")
    for scheme in ("grpcs", "https")
    for way in WAYS
    if (scheme, way) != ("https", "stream")
]


@pytest.mark.parametrize(("scheme", "way"), SCHEMES_AND_WAYS)
def test_certificates_and_the_key_let_in(scheme: str, way: str, guarded: Guarded, qdq_plan: Plan) -> None:
    batch = {"input": images(3)}
    answer = WAYS[way](guarded.url(scheme), guarded.options(scheme), batch)
    with Engine.load(qdq_plan.path) as engine:
        np.testing.assert_allclose(answer["logits"], engine.infer(batch)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "way"), SCHEMES_AND_WAYS)
def test_without_them_the_error_says_what_is_missing(scheme: str, way: str, guarded: Guarded) -> None:
    key = GRPC_KEY if scheme == "grpcs" else HTTP_KEY
    stranger = {"client_certificate": guarded.stranger[0], "client_key": guarded.stranger[1]}
    cases: list[tuple[dict[str, Any], type[TrtDeployError], str]] = [
        ({"ca_certificate": guarded.other_authority.certificate}, TlsError, "Give --ca-certificate"),
        ({"ca_certificate": None}, TlsError, "Give --ca-certificate"),
        ({"client_certificate": None, "client_key": None}, ServerError, "--client-certificate"),
        (stranger, ServerError, "--client-certificate"),
        ({"headers": {}}, AccessDeniedError, f"Give --header {key}=VALUE"),
        ({"headers": {key: "guess"}}, AccessDeniedError, "the value that was sent is not the right one"),
    ]
    for changes, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            WAYS[way](guarded.url(scheme), guarded.options(scheme, **changes), {"input": images(1)})
        assert guarded.url(scheme) in str(caught.value)
        assert SECRET not in str(caught.value)
        assert "guess" not in str(caught.value)


@pytest.mark.parametrize("way", ["blocking", "asyncio"])
def test_a_certificate_for_another_name_is_refused(way: str, guarded: Guarded) -> None:
    with (
        tls_in_front_of(guarded.server.http_port, guarded.wrong_name) as address,
        pytest.raises(TlsError, match="by a name that its certificate is made out for"),
    ):
        WAYS[way](f"https://{address}", guarded.options("https"), {"input": images(1)})


def test_tls_and_plain_do_not_meet_silently(guarded: Guarded) -> None:
    plain = guarded.grpcs.replace("grpcs:", "grpc:")
    with pytest.raises(ServerUnavailableError, match=r"Does it want TLS \(grpcs://\)"):
        asked(plain, None, {"input": images(1)})
    no_tls_there = guarded.server.http_url.replace("http:", "https:")
    with pytest.raises(ServerUnavailableError, match="speak TLS at this port"):
        asked(no_tls_there, guarded.options("https"), {"input": images(1)})


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize("command", ["validate", "load"])
def test_commands_take_certificates_and_headers_and_keep_the_secret(
    command: str, scheme: str, guarded: Guarded, tmp_path: Path
) -> None:
    options = guarded.options(scheme)
    name = next(iter(options.headers))
    how = ["--ca-certificate", options.ca_certificate, "--client-certificate", options.client_certificate,
           "--client-key", options.client_key]  # fmt: skip
    more = {
        "validate": ["--data", "digits", "--batch-size", 32, "--ledger", tmp_path / "ledger.json",
                     "--report", tmp_path / "report.html"],
        "load": ["--concurrency", 2, "--warm-up", 0, "--window", 0.2, "--max-windows", 3],
    }[command]  # fmt: skip
    common = [command, "--url", guarded.url(scheme), "--model", "digits", *more, *how]
    done = CliRunner().invoke(app, [*map(str, common), "--header", f"{name}={SECRET}", "--json"])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, [*map(str, common), "--header", f"{name}=guess-of-{SECRET}"])
    assert refused.exit_code == 3
    assert "the value that was sent is not the right one" in " ".join(refused.stderr.split())
    left = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".html"))
    assert ("transport" in left) == (command == "validate")
    assert SECRET not in done.output + refused.output + left


def test_promotion_and_the_check_of_what_is_served_take_them_too(guarded: Guarded, tmp_path: Path) -> None:
    options = guarded.options("https")
    how = ["--url", guarded.https, "--ca-certificate", options.ca_certificate, "--client-certificate",
           options.client_certificate, "--client-key", options.client_key]  # fmt: skip
    with_key = [*how, "--header", f"{HTTP_KEY}={SECRET}"]
    promotion = ["promote", "--name", "digits", "--repository", guarded.server.repository]
    checking = ["check", guarded.server.repository]

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, list(map(str, arguments)))

    done = run(*promotion, *with_key, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answered_by"] == {"1": 2}
    assert run(*checking, *with_key).exit_code == 0
    for command in (promotion, checking):
        refused = run(*command, *how)
        assert refused.exit_code == 3
        assert f"Give --header {HTTP_KEY}=VALUE" in refused.stderr
        strange = run(*command, "--url", guarded.https, "--header", f"{HTTP_KEY}={SECRET}")
        assert strange.exit_code == 3
        assert "Give --ca-certificate" in strange.stderr
        assert SECRET not in done.output + refused.output + strange.output
        nowhere = run(*command, "--header", f"{HTTP_KEY}={SECRET}")
        assert nowhere.exit_code == 2
        assert "Give --url" in nowhere.stderr


@pytest.mark.parametrize(
    ("url", "given", "words"),
    [
        ("grpc://127.0.0.1:1", {"ca_certificate": "pem"}, "a connection without TLS"),
        ("grpcs://127.0.0.1:1", {"client_certificate": "pem"}, "belong together"),
        ("grpcs://127.0.0.1:1", {"ca_certificate": "absent"}, "There is no file"),
        ("grpcs://127.0.0.1:1", {"ca_certificate": "pem"}, "holds no certificates in PEM form"),
        ("https://127.0.0.1:1", {"ca_certificate": "pem"}, "holds no certificates in PEM form"),
        ("https://127.0.0.1:1", {"client_certificate": "pem", "client_key": "pem"}, "no certificate and its key"),
        ("grpc://127.0.0.1:1", {"headers": {"a b": SECRET}}, "cannot be the name of a header"),
        ("grpc://127.0.0.1:1", {"headers": {"key": f"{SECRET}\r\nx: y"}}, "holds what cannot be sent"),
        ("http://127.0.0.1:1", {"headers": {"Content-Length": SECRET}}, "set by the client itself"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_sent(
    url: str, given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "pem").write_text("-----BEGIN NONSENSE-----\n")
    files = {name: value if name == "headers" else tmp_path / value for name, value in given.items()}
    with pytest.raises(UsageError, match=words) as caught:
        connect(url, options=ConnectionOptions(**files))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("header", [SECRET, f"authorization: Bearer {SECRET}==", f" ={SECRET}", f"={SECRET}"])
def test_a_header_of_another_form_is_refused_without_its_value(header: str) -> None:
    done = CliRunner().invoke(
        app, ["validate", "--data", "digits", "--url", "grpc://127.0.0.1:1", "--model", "m", "--header", header]
    )
    assert done.exit_code == 2
    assert "--header number 1 is not of the form NAME=VALUE" in done.stderr
    assert SECRET not in done.output


def test_options_show_no_secrets() -> None:
    options = ConnectionOptions(headers={"Authorization": f"Bearer {SECRET}"})
    assert SECRET not in repr(options) + str(options) + options.model_dump_json() + repr(options.model_dump())
    assert options.plain_headers() == {"authorization": f"Bearer {SECRET}"}


# an open server


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """``digits``, and ``late`` whose requests wait for others so long that they miss every deadline."""
    repository = tmp_path_factory.mktemp("open") / "models"
    package(qdq_plan.path, repository, "digits")
    waits = PackageOptions(
        max_queue_delay_us=int(DELAY_S * 1e6),
        queue_policy=QueuePolicy(allow_timeout_override=True, timeout_us=int(10 * DELAY_S * 1e6)),
    )
    package(qdq_plan.path, repository, "late", options=waits)
    package(qdq_plan.path, repository, "patient", options=PackageOptions(max_queue_delay_us=int(DELAY_S * 1e6)))
    with run_server(repository, ServerOptions()) as running:
        yield running


def url_of(server: TritonServer, scheme: str) -> str:
    return server.grpc_url if scheme == "grpc" else server.http_url


# streams


def test_each_answer_and_each_error_of_a_stream_comes_to_its_request(server: TritonServer) -> None:
    with connect(server.grpc_url, stream=True, timeout_s=LIMIT_S) as stream, connect(server.grpc_url) as plain:
        model = stream.describe("digits")

        def ask(number: int) -> bool:
            batch = images(1 + number % 3, seed=number)
            if number % 5 == 3:  # wrong in a way of its own
                with pytest.raises(ServerError, match=rf"got \[{len(batch)},3,{number % 7 + 1},32\]"):
                    stream.infer(model, {"input": np.ascontiguousarray(batch[:, :, : number % 7 + 1])})
                return True
            return np.array_equal(stream.infer(model, {"input": batch})["logits"], expected[number])

        expected = {
            number: plain.infer(model, {"input": images(1 + number % 3, seed=number)})["logits"] for number in range(60)
        }
        with ThreadPoolExecutor(8) as threads:
            outcomes = list(threads.map(ask, range(60)))
    assert all(outcomes)


def test_a_stream_that_breaks_fails_its_requests_and_the_next_opens_another(qdq_plan: Plan, tmp_path: Path) -> None:
    package(qdq_plan.path, tmp_path / "models", "digits", options=PackageOptions(max_queue_delay_us=20_000_000))
    server = run_server(tmp_path / "models", ServerOptions())
    with (
        server,
        connect(server.grpc_url, stream=True, timeout_s=LIMIT_S) as stream,
        connect(server.grpc_url, shared_memory=True, timeout_s=LIMIT_S) as shared,
        ThreadPoolExecutor(4) as threads,
        ExitStack() as stack,
    ):
        model = stream.describe("digits")
        waiting = [threads.submit(client.infer, model, {"input": images(1)}) for client in (stream, stream, shared)]
        common = ("validate", "--model", "digits", "--data", "digits", "--url")
        validations = [
            stack.enter_context(started(*common, url_of(server, scheme), *how))
            for scheme, how in (("grpc", ["--stream", "--shared-memory"]), ("http", ["--asyncio"]))
        ]
        wait_until(lambda: pending(server) == 5, "all requests wait")
        assert regions_of(os.getpid())
        assert regions_of(validations[0].pid)
        assert not any(answer.done() for answer in waiting)
        os.kill(server.pid, signal.SIGKILL)
        for process in validations:
            output, errors = process.communicate(timeout=LIMIT_S)
            assert (process.returncode, output) == (3, ""), errors
            assert "Traceback" not in errors
            assert not regions_of(process.pid)
        for answer in waiting[:2]:
            with pytest.raises(StreamBrokenError, match="broke: UNAVAILABLE"):
                answer.result(LIMIT_S)
        with pytest.raises(ServerUnavailableError):
            waiting[2].result(LIMIT_S)
        with pytest.raises(ServerUnavailableError, match="Is it running"):
            stream.infer(model, {"input": images(1)})
    assert not regions_of(os.getpid())


def pending(server: TritonServer, model: str = "digits") -> int:
    """How many requests wait in a model's queue, by the server's metrics."""
    metrics = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with metrics.open(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    found = re.search(rf'nv_inference_pending_request_count.*model="{model}".* ([\d.]+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def test_a_request_that_timed_out_leaves_the_stream_to_the_others(server: TritonServer) -> None:
    with connect(server.grpc_url, stream=True, timeout_s=SHORT_S) as stream:
        late, digits = stream.describe("patient"), stream.describe("digits")
        with pytest.raises(ServerError, match="did not answer within 1 s"):
            stream.infer(late, {"input": images(1)})
        time.sleep(DELAY_S)  # its answer comes, and is nobody's
        assert stream.infer(digits, {"input": images(2)})["logits"].shape == (2, 10)


def test_streams_are_for_grpc(server: TritonServer) -> None:
    with pytest.raises(UsageError, match="Streams are for gRPC"):
        connect(server.http_url, stream=True)
    done = CliRunner().invoke(app, ["load", "--url", server.http_url, "--model", "digits", "--stream"])
    assert done.exit_code == 2


# asyncio


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_many_awaited_requests_get_their_own_answers_and_errors(scheme: str, server: TritonServer) -> None:
    async def ask_all() -> tuple[ServedModel, list[Any], dict[str, Any]]:
        async with connect_async(url_of(server, scheme), timeout_s=LIMIT_S) as client:
            model = await client.describe("digits")
            calls: list[Awaitable[Any]] = [client.infer(model, {"input": images(2, seed=n)}) for n in range(40)]
            calls.append(client.infer(model, {"input": images(1)[:, :, :16]}))
            calls.append(client.describe("absent"))
            return model, await asyncio.gather(*calls, return_exceptions=True), await client.statistics(model)

    model, answers, statistics = asyncio.run(ask_all())
    with connect(url_of(server, scheme)) as client:
        assert client.describe("digits") == model
        for number, answer in enumerate(answers[:40]):
            expected = client.infer(model, {"input": images(2, seed=number)})["logits"]
            np.testing.assert_allclose(answer["logits"], expected, rtol=1e-4, atol=1e-4)
    assert [type(error) for error in answers[40:]] == [ServerError, ServerError]
    assert "shape" in str(answers[40])
    assert int(statistics["success"]["count"]) >= 40


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_request_whose_task_is_cancelled_leaves_the_others_alone(scheme: str, server: TritonServer) -> None:
    async def cancel_one() -> Array:
        async with connect_async(url_of(server, scheme), timeout_s=LIMIT_S) as client:
            patient, digits = await client.describe("patient"), await client.describe("digits")
            waiting = asyncio.create_task(client.infer(patient, {"input": images(1)}))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return (await client.infer(digits, {"input": images(2)}))["logits"]

    assert asyncio.run(cancel_one()).shape == (2, 10)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_awaited_server_that_is_not_there_is_the_same_error(scheme: str) -> None:
    with pytest.raises(ServerUnavailableError, match="Is it running"):
        asyncio.run(awaited(f"{scheme}://127.0.0.1:1", None, {}))


# deadlines


@pytest.mark.parametrize("way", ["grpc", "stream", "http", "asyncio-grpc", "asyncio-http"])
def test_a_server_that_drops_a_late_request_says_so(way: str, server: TritonServer) -> None:
    url = url_of(server, "http" if "http" in way else "grpc")

    async def ask() -> None:
        async with connect_async(url, deadline_s=0.3) as client:
            await client.infer(await client.describe("late"), {"input": images(1)})

    def blocking() -> None:
        with connect(url, deadline_s=0.3, stream=way == "stream") as client:
            client.infer(client.describe("late"), {"input": images(1)})

    # Triton does not always wake up for the end of a timeout: then the client gives up first
    for _ in range(8):
        with pytest.raises(DeadlineExceededError, match="deadline of 300 ms") as caught:
            asyncio.run(ask()) if way.startswith("asyncio") else blocking()
        assert caught.value.dropped_by_server == ("dropped the request" in caught.value.message)
        if caught.value.dropped_by_server:
            return
    pytest.fail("the server has dropped none of them")


def test_where_the_queue_has_no_policy_the_client_stops_waiting(server: TritonServer) -> None:
    with connect(server.grpc_url, deadline_s=SHORT_S, retries=3) as client:
        assert client.infer(client.describe("digits"), {"input": images(1)})["logits"].shape == (1, 10)
        with pytest.raises(DeadlineExceededError, match="allow_timeout_override") as caught:
            client.infer(client.describe("patient"), {"input": images(1)})
    assert not caught.value.dropped_by_server


# shared memory


def regions_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"trtdeploy-{pid}-*"))


@pytest.mark.parametrize("how", [("grpc", {}), ("grpc", {"stream": True}), ("http", {})], ids=str)
def test_tensors_in_shared_memory_give_the_same_bits(how: tuple[str, dict[str, Any]], server: TritonServer) -> None:
    scheme, more = how
    with connect(server.grpc_url) as plain:
        model = plain.describe("digits")
        batches = [images(1 + number % 4, seed=number) for number in range(40)]
        expected = [plain.infer(model, {"input": batch})["logits"] for batch in batches]
        with connect(url_of(server, scheme), shared_memory=True, **more) as shared:

            def ask(batch: Array) -> Array:
                return shared.infer(model, {"input": batch})["logits"]

            one_by_one = [ask(batch) for batch in batches]
            with ThreadPoolExecutor(6) as threads:
                together = list(threads.map(ask, batches))
            assert 0 < len(regions_of(os.getpid())) <= 16
            assert registered(server) == {path.name for path in regions_of(os.getpid())}
    for answer, parallel, right in zip(one_by_one, together, expected, strict=True):
        np.testing.assert_array_equal(answer, right)
        np.testing.assert_allclose(parallel, right, rtol=1e-4, atol=1e-4)  # other batches are formed
    assert not regions_of(os.getpid())
    assert not registered(server)


def registered(server: TritonServer) -> set[str]:
    import tritonclient.grpc

    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        return set(client.get_system_shared_memory_status(as_json=True).get("regions", {}))


def test_a_region_of_a_request_that_timed_out_is_not_used_again(server: TritonServer) -> None:
    with connect(server.grpc_url, shared_memory=True, timeout_s=SHORT_S) as client:
        late, digits = client.describe("patient"), client.describe("digits")
        with pytest.raises(ServerError, match="did not answer"):
            client.infer(late, {"input": images(1)})
        before = set(regions_of(os.getpid()))
        assert len(before) == 1
        client.infer(digits, {"input": images(1)})
        assert len(set(regions_of(os.getpid())) - before) == 1
    assert not regions_of(os.getpid())


def test_a_request_that_has_no_room_is_a_clear_error_and_not_the_end_of_the_process(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        connect(server.grpc_url, shared_memory=True) as client,
        pytest.raises(SharedMemoryError, match=r"no room .* No space left"),
    ):
        client.infer(client.describe("digits"), {"input": images(1)})
    assert not regions_of(os.getpid())


def test_a_server_that_does_not_see_this_memory_is_a_clear_error(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(self: InferenceClient, name: str, key: str, byte_size: int, t: Any) -> None:
        register(self, name, f"{key}-on-another-host", byte_size, t)

    from trtdeploy.triton.client import GrpcClient

    register = GrpcClient._register
    monkeypatch.setattr(GrpcClient, "_register", elsewhere)
    with (
        connect(server.grpc_url, shared_memory=True) as client,
        pytest.raises(SharedMemoryError, match="--shared-memory is for a server on this host"),
    ):
        client.infer(client.describe("digits"), {"input": images(1)})
    assert not regions_of(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_shared_memory(number: signal.Signals, server: TritonServer) -> None:
    arguments = ("--url", server.grpc_url, "--model", "digits", "--shared-memory", "--warm-up", 3, "--window", 3)
    with started("load", *arguments) as process:
        wait_until(lambda: bool(regions_of(process.pid)), "it uses shared memory")
        time.sleep(0.2)  # a signal that comes just before Python begins to wait is seen after the wait, of 3 s
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in errors
    wait_until(lambda: not regions_of(process.pid), "the memory is gone")
    left = [name for name in registered(server) if f"-{process.pid}-" in name]
    if number != signal.SIGKILL:
        assert process.returncode == 130
    elif left:  # nobody could tell the server; the next run does
        with connect(url_of(server, "http"), shared_memory=True) as client:
            client.infer(client.describe("digits"), {"input": images(1)})
        left = [name for name in registered(server) if f"-{process.pid}-" in name]
    assert not left


def test_a_validation_that_is_ended_says_so_in_one_line(server: TritonServer) -> None:
    common = ("validate", "--url", server.http_url, "--model", "patient", "--data", "digits")
    ways = (([], signal.SIGINT, "Interrupted."), (["--asyncio"], signal.SIGTERM, "Stopped."))
    with ExitStack() as stack:
        processes = [stack.enter_context(started(*common, *how)) for how, _, _ in ways]
        wait_until(lambda: pending(server, "patient") >= len(ways), "all of them wait for an answer")
        for process, (_, number, _) in zip(processes, ways, strict=True):
            process.send_signal(number)
        for process, (_, _, words) in zip(processes, ways, strict=True):
            output, errors = process.communicate(timeout=LIMIT_S)
            assert (process.returncode, output, errors.strip()) == (130, "", words)


# every way by one command


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        ("http", ()),
        ("grpc", ()),
        ("grpc", ("--stream",)),
        ("http", ("--asyncio",)),
        ("grpc", ("--asyncio",)),
        ("grpc", ("--shared-memory",)),
        ("http", ("--shared-memory",)),
        ("grpc", ("--stream", "--shared-memory", "--deadline", "20000")),
    ],
    ids=str,
)
def test_validate_by_every_way(
    scheme: str, how: tuple[str, ...], server: TritonServer, qdq_onnx: Path, tmp_path: Path
) -> None:
    gates = ("--reference", str(qdq_onnx), "--min-agreement", "99", "--max-variation", "5", "--batch-size", "8")
    arguments = ["validate", "--url", url_of(server, scheme), "--model", "digits", "--data", "digits", *gates, *how]
    done = CliRunner().invoke(app, [*arguments, "--ledger", str(tmp_path / "ledger.json"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["n"] == sum(facts["answered_by"].values()) == 359
    assert facts["latency_ms"]["p99"]["value"] > 0
    stage = json.loads((tmp_path / "ledger.json").read_text())["stages"]["served"]
    assert stage["source"]["transport"] == " ".join([scheme, *(part.strip("-") for part in how[:2])])


@pytest.mark.parametrize("way", [["--stream"], ["--asyncio"], ["--deadline", "5"], ["--header", "a=b"]])
def test_a_plan_is_asked_over_no_connection(way: list[str], qdq_plan: Plan) -> None:
    done = CliRunner().invoke(app, ["validate", "--data", "digits", "--plan", str(qdq_plan.path), *way])
    assert done.exit_code == 2
    assert "leave out the options of one" in done.stderr


@pytest.mark.parametrize("way", ["--stream", "--shared-memory"])
def test_asyncio_is_a_way_of_its_own(way: str) -> None:
    done = CliRunner().invoke(
        app, ["validate", "--data", "digits", "--url", "grpc://127.0.0.1:1", "--model", "m", "--asyncio", way]
    )
    assert done.exit_code == 2
    assert f"--asyncio and {way}" in " ".join(done.stderr.split())


def test_importing_the_client_brings_no_transport() -> None:
    code = "import sys, trtdeploy.triton.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert not {"grpc", "gevent", "aiohttp", "tritonclient"} & set(done.stdout.split())
