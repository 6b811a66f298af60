"""A server that speaks as much of Triton's HTTP as a promotion needs, and misbehaves where it is told to."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trtdeploy.tensors import Array, dtype_to_triton

Fault = Callable[["Handler"], None]


class FalseTriton(ThreadingHTTPServer):
    """Holds models by name and answers every inference with the same outputs.

    Attributes:
        served: The versions that each model has loaded.
        outputs: What is answered.
        given: Name and shape of the one input.
        faults: What to do instead, by the kind of request and whether it is about a candidate: ("load", True).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, outputs: Mapping[str, Array], given: tuple[str, tuple[int, ...]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.outputs = outputs
        self.given = given
        self.served: dict[str, list[str]] = {}
        self.to_load: Callable[[str], list[str]] = lambda name: ["2"]
        self.faults: dict[tuple[str, bool], Fault] = {}
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FalseTriton
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._dispatch()

    def _dispatch(self) -> None:
        kinds = {
            "index": r"/v2/repository/index",
            "loaded": r"/v2/models/stats",
            "load": r"/v2/repository/models/([^/]+)/load",
            "unload": r"/v2/repository/models/([^/]+)/unload",
            "ready": r"/v2/models/([^/]+)/versions/(\d+)/ready",
            "config": r"/v2/models/([^/]+)(?:/versions/\d+)?/config",
            "infer": r"/v2/models/([^/]+)(?:/versions/\d+)?/infer",
            "metadata": r"/v2/models/([^/]+)(?:/versions/\d+)?",
        }
        for kind, pattern in kinds.items():
            match = re.fullmatch(pattern, self.path)
            if match is not None:
                name = match[1] if match.groups() else ""
                fault = self.server.faults.get((kind, name.endswith(".candidate")))
                if fault is not None:
                    with contextlib.suppress(OSError):
                        fault(self)
                    self.close_connection = True
                else:
                    getattr(self, f"_{kind}")(*match.groups())
                return
        self.say({"error": "unknown"}, 404)

    def say(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _index(self) -> None:
        self.say([{"name": name, "version": "1", "state": "READY"} for name in self.server.served if "." not in name])

    def _loaded(self) -> None:
        listed = [{"name": name, "version": version} for name, have in self.server.served.items() for version in have]
        self.say({"model_stats": listed})

    def _load(self, name: str) -> None:
        self.server.served[name] = self.server.to_load(name)
        self.say({})

    def _unload(self, name: str) -> None:
        self.server.served.pop(name, None)
        self.say({})

    def _ready(self, name: str, version: str) -> None:
        self.say({}, 200 if version in self.server.served.get(name, []) else 400)

    def _config(self, name: str) -> None:
        self.say({"max_batch_size": 32})

    def _metadata(self, name: str) -> None:
        tensor, shape = self.server.given
        outputs = [
            {"name": key, "datatype": dtype_to_triton(array.dtype.name), "shape": [-1, *array.shape[1:]]}
            for key, array in self.server.outputs.items()
        ]
        inputs = [{"name": tensor, "datatype": "FP32", "shape": list(shape)}]
        self.say({"name": name, "versions": self.server.served[name], "inputs": inputs, "outputs": outputs})

    def _infer(self, name: str) -> None:
        self.answer(name, self.server.outputs, max(self.server.served[name]))

    def answer(self, name: str, outputs: Mapping[str, Array], version: str) -> None:
        listed = [
            {
                "name": key,
                "datatype": dtype_to_triton(array.dtype.name),
                "shape": list(array.shape),
                "data": array.ravel().tolist(),
            }
            for key, array in outputs.items()
        ]
        self.say({"model_name": name, "model_version": version, "outputs": listed})


@contextlib.contextmanager
def running(server: FalseTriton) -> Iterator[FalseTriton]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def hang(handler: Handler) -> None:
    handler.server.ended.wait(30)


def drip(handler: Handler) -> None:
    """Send one byte after the other, for as long as anybody listens."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b" ")


def close(handler: Handler) -> None:
    handler.connection.close()


def junk(handler: Handler) -> None:
    handler.wfile.write(bytes(range(255, 0, -1)) * 4)


def page(handler: Handler) -> None:
    body = b"<html>It works!</html>"
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def broken_off(handler: Handler) -> None:
    """An error whose text never comes to its end."""
    handler.wfile.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 1000\r\n\r\nout of")


def out_of_memory(handler: Handler) -> None:
    handler.say({"error": "failed to load: out of memory"}, 400)


def too_large(handler: Handler) -> None:
    """What Triton says of a load whose JSON exceeds its limit (its http_server.cc)."""
    text = "request JSON size of 99 bytes exceeds the maximum allowed input size of 9 bytes."
    handler.say({"error": f"load model: {text} Use --http-max-input-size to increase the limit."}, 400)


def gateway_limit(handler: Handler) -> None:
    handler.say({"error": "Request Entity Too Large"}, 413)


def half_a_batch(handler: Handler) -> None:
    half = {key: array[: len(array) // 2] for key, array in handler.server.outputs.items()}
    handler.answer("m", half, "2")


def not_finite(handler: Handler) -> None:
    handler.answer("m", {key: array * float("nan") for key, array in handler.server.outputs.items()}, "2")


def by_another_version(handler: Handler) -> None:
    handler.answer("m", handler.server.outputs, "1")
