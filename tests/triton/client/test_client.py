"""The client against what is no Triton server; the real one is in the end-to-end tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import DtypeError, ServerError, UsageError
from trtdeploy.tensors import TensorSpec
from trtdeploy.triton.client import (
    AccessDeniedError,
    ConnectionOptions,
    Endpoint,
    InferenceClient,
    ModelNotReadyError,
    QueueFullError,
    RequestLimits,
    ServedModel,
    ServerUnavailableError,
    connect,
    connect_async,
)
from trtdeploy.triton.client.errors import Failures
from trtdeploy.triton.client.grpc import channel_arguments, metadata_of
from trtdeploy.triton.client.model_control import ModelControl

Behaviour = Callable[[socket.socket], None]
Call = Callable[[InferenceClient], object]
TIMEOUT_S = 0.7
MODEL = ServedModel(
    "m",
    "1",
    (TensorSpec(name="x", dtype="float32", shape=(-1, 2)),),
    (TensorSpec(name="y", dtype="float32", shape=(-1, 2)),),
    8,
    None,
    None,
)


@contextlib.contextmanager
def server_that(behave: Behaviour) -> Iterator[str]:
    """A TCP server on loopback whose every connection is handed to ``behave``; yields host:port."""
    ended = threading.Event()
    connections: list[socket.socket] = []

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    def handle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(10)
            for connection in connections:
                connection.close()


def answer(body: bytes, *, status: str = "200 OK", length: int | None = None) -> Behaviour:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"

    def behave(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(head.encode() + body)
            if length:
                connection.close()

    return behave


def junk(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(bytes(range(255, 0, -1)) * 4)
    connection.close()


def close(connection: socket.socket) -> None:
    connection.close()


def silence(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def drip(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    pause = threading.Event()
    for _ in range(1000):
        connection.sendall(b" ")
        pause.wait(0.1)


HTTP_ONLY: dict[str, Behaviour] = {
    "empty-object": answer(b"{}"),
    "list": answer(b"[]"),
    "page": answer(b"<html>It works!</html>"),
    "bytes": answer(b"\xff\xfe\x00"),
    "wrong-types": answer(b'{"inputs": [1], "outputs": 2, "versions": "x"}'),
    "too-short": answer(b"{", length=1000),
    "not-found": answer(b'{"error": "no such thing"}', status="404 Not Found"),
    "server-error": answer(b"oops", status="500 Internal Server Error"),
}
CALLS: list[Any] = [
    pytest.param(lambda client: client.describe("m"), id="describe"),
    pytest.param(lambda client: client.infer(MODEL, {"x": np.zeros((1, 2), np.float32)}), id="infer"),
]
BOTH: dict[str, Behaviour] = {"junk": junk, "close": close}


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("http", name) for name in (*BOTH, *HTTP_ONLY)] + [("grpc", name) for name in (*BOTH, "empty-object")],
)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_triton_server_is_a_server_error(scheme: str, name: str, call: Call) -> None:
    with (
        server_that({**BOTH, **HTTP_ONLY}[name]) as address,
        connect(f"{scheme}://{address}", timeout_s=5) as client,
        pytest.raises(ServerError) as caught,
    ):
        call(client)
    assert f"{scheme}://{address}" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_never_answers_is_given_up_after_the_timeout(scheme: str, call: Call) -> None:
    began = time.monotonic()
    with (
        server_that(silence) as address,
        connect(f"{scheme}://{address}", timeout_s=TIMEOUT_S) as client,
        pytest.raises(ServerError, match=rf"did not answer within {TIMEOUT_S:g} s"),
    ):
        call(client)
    assert time.monotonic() - began > TIMEOUT_S * 0.9


def test_an_answer_that_drips_in_is_given_up_after_the_timeout() -> None:
    with (
        server_that(drip) as address,
        connect(f"http://{address}", timeout_s=TIMEOUT_S) as client,
        pytest.raises(ServerError, match="did not answer within"),
    ):
        client.describe("m")


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_port_that_nobody_listens_on_is_a_server_error(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with connect(f"{scheme}://{address}", timeout_s=5) as client, pytest.raises(ServerError, match="Is it running"):
        client.describe("m")


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_proxy_of_the_environment_is_not_asked_about_loopback(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def proxy(connection: socket.socket) -> None:
        asked.set()
        connection.close()

    with server_that(proxy) as proxy_address, server_that(close) as address:
        for variable in ("http_proxy", "HTTP_PROXY", "grpc_proxy"):
            monkeypatch.setenv(variable, f"http://{proxy_address}")
        for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(variable, raising=False)
        with connect(f"{scheme}://{address}", timeout_s=5) as client, pytest.raises(ServerError):
            client.describe("m")
    assert not asked.is_set()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "localhost",
        "http://127.0.0.1",
        "ftp://127.0.0.1:8000",
        "grpc://127.0.0.1:8001?x",
        "http://:8000",
        "http://127.0.0.1:x",
        "http://127.0.0.1:99999",
        "grpc://127.0.0.1:8001/path",
        "http://127.0.0.1:8000/a b",
        "http://127.0.0.1:8000//a",
        "https://:443",
        "http://[::1:8000",
    ],
)
def test_what_is_no_url_of_a_server_is_a_usage_error_with_examples(url: str) -> None:
    with pytest.raises(UsageError, match="grpc://127") as caught:
        connect(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_connecting_sends_nothing_and_closing_twice_is_harmless(scheme: str) -> None:
    client = connect(f"{scheme}://127.0.0.1:1")
    client.close()
    client.close()


def metadata_then_config(metadata: object, config: object) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        while request := connection.recv(65536):
            body = json.dumps(config if b"/config" in request.split(b"\r\n")[0] else metadata).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return behave


METADATA = {
    "name": "m",
    "versions": ["2", "10"],
    "inputs": [{"name": "x", "datatype": "FP16", "shape": ["-1", 4]}],
    "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1, 1]}],
}


def test_a_model_of_somebody_else_has_neither_labels_nor_preprocessing() -> None:
    config = {"max_batch_size": 4, "parameters": {"theirs": {}, "other": {"string_value": "x"}}}
    with server_that(metadata_then_config(METADATA, config)) as address, connect(f"http://{address}") as client:
        model = client.describe("m")
    assert model.version == "10"
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x float16[?, 4]", "y int64[?, 1]"]
    assert (model.max_batch_size, model.labels, model.preprocessing) == (4, None, None)


def test_a_data_type_that_numpy_has_not_is_named() -> None:
    metadata = METADATA | {"inputs": [{"name": "x", "datatype": "BF16", "shape": [1]}]}
    with (
        server_that(metadata_then_config(metadata, {})) as address,
        connect(f"http://{address}") as client,
        pytest.raises(DtypeError, match="BF16 is not supported"),
    ):
        client.describe("m")


def test_what_packaging_left_comes_back() -> None:
    parameters = {
        "trtdeploy.labels": {"string_value": '["cat", "dög"]'},
        "trtdeploy.preprocessing": {"string_value": Preprocessing.square(8).to_json()},
    }
    behave = metadata_then_config(METADATA, {"parameters": parameters})
    with server_that(behave) as address, connect(f"http://{address}") as client:
        model = client.describe("m", "2")
    assert model.version == "2"
    assert model.labels == ("cat", "dög")
    assert model.preprocessing == Preprocessing.square(8)


@pytest.mark.parametrize("key", ["trtdeploy.labels", "trtdeploy.preprocessing"])
@pytest.mark.parametrize("text", ["", "{", "3"])
def test_damaged_facts_in_a_config_are_errors_not_guesses(key: str, text: str) -> None:
    behave = metadata_then_config(METADATA, {"parameters": {key: {"string_value": text}}})
    with (
        server_that(behave) as address,
        connect(f"http://{address}") as client,
        pytest.raises((ServerError, UsageError)),
    ):
        client.describe("m")


class Refused(InferenceClient):
    """A client whose server refuses the first connections; tritonclient's own would try some of them again itself."""

    def __init__(self, refused: int, retries: int) -> None:
        super().__init__(Endpoint("grpc", "nowhere:1"), limits=RequestLimits(timeout_s=1, retries=retries))
        self.left = refused
        self.asked: list[float] = []

    def _disconnect(self) -> None:
        pass

    def _register(self, name: str, key: str, byte_size: int, t: Any) -> None:
        raise NotImplementedError

    def _unregister(self, name: str, t: Any) -> None:
        raise NotImplementedError

    def _registered(self, t: Any) -> list[str]:
        raise NotImplementedError

    def _metadata_and_config(self, name: str, version: str, t: Any) -> Any:
        raise NotImplementedError

    def _exchange(self, request: Any, t: Any) -> Any:
        return self._statistics(MODEL, t)

    def _statistics(self, model: ServedModel, t: Any) -> dict[str, Any]:
        self.asked.append(time.monotonic())
        self.left -= 1
        if self.left >= 0:
            raise ConnectionRefusedError("refused")
        return {"model_stats": [{"inference_stats": {"success": {"count": 3}}}]}


def test_a_server_that_is_unavailable_is_asked_again_as_often_as_was_allowed() -> None:
    client = Refused(2, retries=2)
    assert client.statistics(MODEL)["success"]["count"] == 3
    assert len(client.asked) == 3
    assert client.asked[1] - client.asked[0] >= 0.1
    assert client.asked[2] - client.asked[1] >= 0.2
    for refused, retries in ((1, 0), (3, 2)):
        client = Refused(refused, retries)
        with pytest.raises(ServerError, match="unavailable: refused"):
            client.statistics(MODEL)
        assert len(client.asked) == retries + 1


@pytest.mark.parametrize("name", ["not-found", "server-error", "page"])
def test_what_the_server_refused_is_not_asked_again(name: str) -> None:
    asked = []

    def counted(connection: socket.socket) -> None:
        asked.append(1)
        HTTP_ONLY[name](connection)

    with (
        server_that(counted) as address,
        connect(f"http://{address}", timeout_s=5, retries=5) as client,
        pytest.raises(ServerError),
    ):
        client.statistics(MODEL)
    assert len(asked) == 1


def test_a_model_that_keeps_a_state_is_not_asked_again() -> None:
    client = Refused(1, retries=5)
    with pytest.raises(ServerUnavailableError):
        client.infer(replace(MODEL, stateful=True), {})
    assert len(client.asked) == 1


@pytest.mark.parametrize("url", ["http://user:s3cret@127.0.0.1:8000", "grpc://s3cret@127.0.0.1:8001"])
def test_a_password_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of a Triton server") as caught:
        connect(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("https://gateway.example", "gateway.example:443", "https://gateway.example:443"),
        ("grpcs://[::1]", "[::1]:443", "grpcs://[::1]:443"),
        ("http://127.0.0.1:8000/", "127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://gateway:8443/team-a/triton/", "gateway:8443", "https://gateway:8443/team-a/triton"),
    ],
)
def test_ports_of_tls_and_paths_of_gateways(url: str, address: str, shown: str) -> None:
    endpoint = Endpoint.parse(url)
    assert (endpoint.address, endpoint.url) == (address, shown)


@pytest.mark.parametrize("way", ["blocking", "asyncio", "control"])
def test_behind_a_gateway_the_path_and_the_host_are_those_that_it_expects(way: str) -> None:
    seen: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        while request := connection.recv(65536):
            seen.append(request)
            about = {} if b"/config" in request.split(b"\r\n")[0] else METADATA | {"model_stats": []}
            body = json.dumps(about).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def describe(url: str) -> None:
        async with connect_async(url, options=options) as client:
            await client.describe("m")

    options = ConnectionOptions(headers={"Host": "triton.team-a.example", "authorization": "Bearer x"})
    with server_that(behave) as address:
        url = f"http://{address}/team-a/triton"
        if way == "asyncio":
            asyncio.run(describe(url))
        elif way == "control":
            ModelControl(url, options=options).loaded()
        else:
            with connect(url, options=options) as client:
                client.describe("m")
    assert seen
    for request in seen:
        head = request.decode().lower()
        assert head.startswith("get /team-a/triton/v2/models/")
        assert head.count("\r\nhost: triton.team-a.example\r\n") == head.count("\r\nhost:") == 1
        assert "\r\nauthorization: bearer x\r\n" in head


def test_over_grpc_the_host_is_the_authority_and_no_metadata() -> None:
    options = ConnectionOptions(headers={"Host": "triton.team-a.example", "authorization": "Bearer x"})
    arguments = dict(channel_arguments(Endpoint.parse("grpc://127.0.0.1:1"), options))
    assert arguments["grpc.default_authority"] == "triton.team-a.example"
    assert metadata_of(options) == {"authorization": "Bearer x"}


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_gateway_that_wants_a_token_is_said_so(status: str) -> None:
    options = ConnectionOptions(headers={"authorization": "Bearer s3cret"})
    with (
        server_that(answer(b"<html>no</html>", status=status)) as address,
        connect(f"http://{address}", options=options, retries=5) as client,
        pytest.raises(AccessDeniedError, match="--header") as caught,
    ):
        client.describe("m")
    assert "s3cret" not in str(caught.value)


FULL = "[request id: <id_unknown>] Exceeds maximum queue size"
NOT_READY = "'m' version 1 is not at ready state"


@pytest.mark.parametrize("status", ["StatusCode.UNAVAILABLE", "503", "400", "None"])
@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (FULL, QueueFullError, "as many wait already as the model's queue may hold"),
        (NOT_READY, ModelNotReadyError, "does not serve this version of the model now"),
    ],
)
def test_a_server_that_answers_is_not_said_to_be_unreachable(
    status: str, message: str, kind: type[ServerError], words: str
) -> None:
    error = Failures(Endpoint.parse("grpc://127.0.0.1:1"), ConnectionOptions(), RequestLimits()).status(status, message)
    assert type(error) is kind
    assert words in str(error)
    assert message in str(error)
    assert "Is it running" not in str(error)


@pytest.mark.parametrize(("message", "kind", "times"), [(FULL, QueueFullError, 3), (NOT_READY, ModelNotReadyError, 1)])
def test_a_full_queue_is_asked_again_and_a_version_that_is_not_loaded_is_not(
    message: str, kind: type[ServerError], times: int
) -> None:
    asked: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        while request := connection.recv(65536):
            asked.append(request)
            body = json.dumps({"error": message}).encode()
            connection.sendall(b"HTTP/1.1 503 Unavailable\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with (
        server_that(behave) as address,
        connect(f"http://{address}", timeout_s=10, retries=2) as client,
        pytest.raises(kind),
    ):
        client.statistics(MODEL)
    assert len(asked) == times


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable"])
def test_a_server_that_is_going_down_is_asked_again_over_http_too(status: str) -> None:
    asked: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        while request := connection.recv(65536):
            asked.append(request)
            body = b'{"error": "Server is stopping"}'
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    with (
        server_that(behave) as address,
        connect(f"http://{address}", timeout_s=10, retries=2) as client,
        pytest.raises(ServerUnavailableError, match="Server is stopping"),
    ):
        client.statistics(MODEL)
    assert len(asked) == 3
