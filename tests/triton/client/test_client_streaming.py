"""A gRPC stream against servers that break it, mix up answers, or end it; the real one is in the end-to-end tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trtdeploy.errors import ServerError
from trtdeploy.tensors import TensorSpec
from trtdeploy.triton.client import AccessDeniedError, ServedModel, StreamBrokenError, connect

grpc = pytest.importorskip("grpc")
service_pb2 = pytest.importorskip("tritonclient.grpc").service_pb2
service_pb2_grpc = pytest.importorskip("tritonclient.grpc").service_pb2_grpc

MODEL = ServedModel(
    "m",
    "1",
    (TensorSpec(name="x", dtype="float32", shape=(-1, 2)),),
    (TensorSpec(name="y", dtype="float32", shape=(-1, 2)),),
    8,
    None,
    None,
)
Behaviour = Callable[[Any, Iterator[Any], Any], Iterator[Any]]


def negated(request: Any, number: str | None = None) -> Any:
    """The answer to a request: its input times -1."""
    response = service_pb2.ModelInferResponse(model_name="m", model_version="1", id=number or request.id)
    response.outputs.add(name="y", datatype="FP32", shape=request.inputs[0].shape)
    response.raw_output_contents.append((-np.frombuffer(request.raw_input_contents[0], np.float32)).tobytes())
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def refused(request: Any) -> Any:
    response = service_pb2.ModelInferResponse(id=request.id)
    return service_pb2.ModelStreamInferResponse(error_message=f"no {request.id}", infer_response=response)


@contextlib.contextmanager
def serving(behave: Behaviour) -> Iterator[str]:
    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[name-defined, misc]
        def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
            return behave(self, requests, context)

    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(0).wait(10)


def x(value: float) -> dict[str, Any]:
    return {"x": np.full((1, 2), value, np.float32)}


def test_answers_out_of_order_and_errors_among_them_come_to_their_requests() -> None:
    def behave(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
        held = [next(requests) for _ in range(6)]
        for request in reversed(held):
            yield refused(request) if int(request.id) % 3 == 0 else negated(request)

    def ask(number: int) -> Any:
        try:
            return float(client.infer(MODEL, x(number))["y"][0, 0])
        except ServerError as error:
            return error.message

    with serving(behave) as url, connect(url, stream=True, timeout_s=10) as client, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, range(6)))
    wrong = [answer for answer in answers if isinstance(answer, str)]
    assert sorted(error.rpartition(" ")[2] for error in wrong) == ["3", "6"]
    assert all(answer == -number for number, answer in enumerate(answers) if not isinstance(answer, str))


def breaking_once(seen: list[int]) -> Behaviour:
    """Breaks the first stream at its second request; the others answer."""

    def behave(_: Any, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        seen.append(0)
        for request in requests:
            seen[-1] += 1
            if len(seen) == 1 and seen[-1] == 2:
                context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            yield negated(request)

    return behave


def test_a_broken_stream_is_asked_again_where_that_is_safe_and_allowed() -> None:
    seen: list[int] = []
    with serving(breaking_once(seen)) as url, connect(url, stream=True, retries=1, timeout_s=10) as client:
        for value in (1.0, 2.0, 3.0):
            assert client.infer(MODEL, x(value))["y"].tolist() == [[-value, -value]]
    assert seen == [2, 2]


@pytest.mark.parametrize(("retries", "stateful"), [(0, False), (3, True)])
def test_it_is_not_asked_again_where_nobody_allowed_it_or_the_model_has_a_state(retries: int, stateful: bool) -> None:
    seen: list[int] = []
    model = replace(MODEL, stateful=stateful)
    with serving(breaking_once(seen)) as url, connect(url, stream=True, retries=retries, timeout_s=10) as client:
        client.infer(model, x(1))
        with pytest.raises(StreamBrokenError, match="UNAVAILABLE: going down"):
            client.infer(model, x(2))
        assert seen == [2]
        assert client.infer(model, x(3))["y"].tolist() == [[-3, -3]]


def ends(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
    next(requests)
    return iter(())


def strange_number(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
    yield negated(next(requests), "77")


def answers_twice(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
    request = next(requests)
    yield negated(request)
    yield negated(request)
    next(requests)


def nonsense(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
    response = negated(next(requests))
    response.infer_response.raw_output_contents[0] = b"123"
    yield response


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (ends, "the server has ended it"),
        (strange_number, "an answer to no request"),
        (nonsense, "gave no usable answer"),
    ],
)
def test_a_server_that_answers_otherwise_is_an_error_of_the_request(behave: Behaviour, words: str) -> None:
    with (
        serving(behave) as url,
        connect(url, stream=True, timeout_s=10) as client,
        pytest.raises(ServerError, match=words),
    ):
        client.infer(MODEL, x(1))


def test_a_second_answer_to_a_request_breaks_the_stream_and_not_the_next_request() -> None:
    """A decoupled model answers as often as it likes: the answer must not be taken for another request's."""
    with serving(answers_twice) as url, connect(url, stream=True, retries=2, timeout_s=10) as client:
        for value in (1.0, 2.0, 3.0):
            assert client.infer(MODEL, x(value))["y"].tolist() == [[-value, -value]]


def test_a_late_answer_is_dropped_and_the_stream_goes_on() -> None:
    late = threading.Event()

    def behave(_: Any, requests: Iterator[Any], __: Any) -> Iterator[Any]:
        first = next(requests)
        late.wait(10)
        yield negated(first)
        for request in requests:
            yield negated(request)

    with serving(behave) as url, connect(url, stream=True, timeout_s=1) as client:
        with pytest.raises(ServerError, match="did not answer within 1 s"):
            client.infer(MODEL, x(1))
        late.set()
        assert client.infer(MODEL, x(2))["y"].tolist() == [[-2, -2]]


def test_a_key_that_is_missing_is_said_so_and_the_headers_are_sent() -> None:
    def behave(_: Any, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        if ("triton-grpc-protocol-guard", "key") not in [tuple(pair) for pair in context.invocation_metadata()]:
            words = "This protocol is restricted, expecting header 'triton-grpc-protocol-guard'"
            context.abort(grpc.StatusCode.UNAVAILABLE, words)
        for request in requests:
            yield negated(request)

    from trtdeploy.triton.client import ConnectionOptions

    right = ConnectionOptions(headers={"triton-grpc-protocol-guard": "key"})
    with serving(behave) as url:
        with connect(url, stream=True, retries=3) as client, pytest.raises(AccessDeniedError, match="was not sent"):
            client.infer(MODEL, x(1))
        with connect(url, stream=True, options=right) as client:
            assert client.infer(MODEL, x(1))["y"].tolist() == [[-1, -1]]
