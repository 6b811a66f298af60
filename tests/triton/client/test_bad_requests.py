"""Requests that are far too large, never end or come byte by byte: a real tritonserver answers everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trtdeploy.engine import Engine
from trtdeploy.errors import ShapeError
from trtdeploy.plan import Plan
from trtdeploy.tensors import Array
from trtdeploy.triton.client import connect, connect_async
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

GIB = 1 << 30
SENT_BYTES = 8 << 20
BYTE_BY_BYTE = 200  # the headers, and a part of the body
BATCH = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("bad") / "models"
    package_pipeline(qdq_plan.path, repository, "digits")
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def expected(qdq_plan: Plan) -> Array:
    with Engine.load(qdq_plan.path) as engine:
        return np.asarray(engine.infer({"input": BATCH})["logits"])


@pytest.fixture
def others_are_answered(server: TritonServer, expected: Array) -> Callable[[], None]:
    def ask() -> None:
        for url in (server.grpc_url, server.http_url):
            with connect(url, timeout_s=10) as client:
                answer = client.infer(client.describe("digits"), {"input": BATCH})["logits"]
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)

    return ask


def resident_bytes(server: TritonServer) -> int:
    status = Path(f"/proc/{server._running().pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


def huge() -> dict[str, Array]:
    """4 GiB that take no memory."""
    return {
        "input": np.broadcast_to(np.zeros((1, 3, 32, 32), np.float32), (4 * GIB // (3 * 32 * 32 * 4) + 1, 3, 32, 32))
    }


@pytest.mark.parametrize("how", ["grpc", "http", "stream", "grpc-asyncio", "http-asyncio"])
def test_the_client_refuses_four_gigabytes_before_it_sends_a_byte(
    how: str, server: TritonServer, others_are_answered: Callable[[], None]
) -> None:
    url = server.http_url if "http" in how else server.grpc_url

    async def ask_later() -> None:
        async with connect_async(url) as client:
            await client.infer(await client.describe("digits"), huge())

    def ask() -> None:
        if "asyncio" in how:
            asyncio.run(ask_later())
            return
        with connect(url, stream=how == "stream") as client:
            client.infer(client.describe("digits"), huge())

    with pytest.raises(ShapeError, match=r"digits with 4\.0 GiB is too large.*\[349526, 3, 32, 32\]") as caught:
        ask()
    assert caught.value.exit_code == 2
    others_are_answered()


def http_head(length: object, *more: str) -> bytes:
    lines = (f"POST {INFER} HTTP/1.1", "Host: x", "Inference-Header-Content-Length: 100", f"Content-Length: {length}")
    return "\r\n".join([*lines, *more, "", ""]).encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def grpc_head(message_bytes: int) -> bytes:
    """The begin of a ModelInfer call whose message claims a size."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/inference.GRPCInferenceService/ModelInfer",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    # literal fields that are not indexed, without Huffman coding (RFC 7541, section 6.2.2)
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    message = b"\0" + struct.pack(">I", message_bytes)
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 0, 1, message)


def push(connection: socket.socket, content: bytes) -> int:
    """Send as much as the server takes; it may close the connection, or stop reading."""
    connection.settimeout(0.3)
    sent = 0
    with contextlib.suppress(OSError):
        while sent < len(content):
            sent += connection.send(content[sent : sent + (1 << 16)])
    return sent


# a message of gRPC says its size in 32 bits
@pytest.mark.parametrize(("protocol", "claimed"), [("http", 4 * GIB), ("http", 2**64), ("grpc", 4 * GIB - 1)])
def test_a_request_that_claims_gigabytes_takes_no_more_memory_than_it_has_sent(
    protocol: str, claimed: int, server: TritonServer, others_are_answered: Callable[[], None]
) -> None:
    port, head = (
        (server.http_port, http_head(claimed)) if protocol == "http" else (server.grpc_port, grpc_head(claimed))
    )
    before = resident_bytes(server)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(head)
        body = b"x" * SENT_BYTES
        push(connection, body if protocol == "http" else frame(0, 0, 1, b"x" * 16384) * (SENT_BYTES >> 14))
        others_are_answered()
        assert resident_bytes(server) - before < 8 * SENT_BYTES
    others_are_answered()


def test_a_compressed_request_that_is_no_request_is_refused(
    server: TritonServer, others_are_answered: Callable[[], None]
) -> None:
    body = zlib.compress(b"\0" * (64 << 20))  # 64 MiB in 64 kB
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as connection:
        connection.sendall(http_head(len(body), "Content-Encoding: deflate") + body)
        assert b"failed to parse the request JSON" in connection.recv(4096)
    others_are_answered()


def test_slow_clients_hold_nobody_up_and_get_their_answers(
    server: TritonServer, expected: Array, others_are_answered: Callable[[], None]
) -> None:
    """More clients that send byte by byte than the server has threads for HTTP."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "input",
                    "shape": list(BATCH.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": BATCH.nbytes},
                }
            ]
        }
    ).encode()
    body = header + BATCH.tobytes()
    # the first line at once: of a path in pieces Triton's HTTP library keeps the last one, and answers with 404
    line = f"POST {INFER} HTTP/1.1\r\n".encode()
    rest = f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as stack:
        ports = [server.http_port] * 24 + [server.grpc_port]
        *slow, half_open = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for port in ports]
        half_open.sendall(grpc_head(1000)[:60])
        for connection in slow:
            connection.sendall(line)
        for position in range(BYTE_BY_BYTE):
            for connection in slow:
                connection.sendall(rest[position : position + 1])
            time.sleep(0.002)  # or the kernel joins them
            if position % 40 == 0:
                others_are_answered()
        for connection in slow:
            connection.sendall(rest[BYTE_BY_BYTE:])
        for connection in slow:
            with connection.makefile("rb") as answer:
                assert answer.readline().split()[1] == b"200"
                length = next(int(line.split(b":")[1]) for line in answer if line.lower().startswith(b"content-length"))
                while answer.readline().strip():
                    pass
                content = json.loads(answer.read(length))
            logits = np.array(content["outputs"][0]["data"]).reshape(2, 10)
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    others_are_answered()
