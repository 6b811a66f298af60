"""The client over one gRPC stream (``ModelStreamInfer``)."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from trtdeploy.errors import ServerError
from trtdeploy.triton.client.connection.attempts import Try
from trtdeploy.triton.client.errors import AccessDeniedError, Failures, TlsError
from trtdeploy.triton.client.grpc import GrpcClient, open_channel
from trtdeploy.triton.client.messages import Request

_END = None
_JOIN_S = 10.0


class GrpcStreamClient(GrpcClient):
    """Over gRPC with one stream for the requests of all threads.

    The server takes the requests in the order in which they are sent, and answers in that order; each answer, and each
    error, carries the number of its request. When the stream breaks, all requests on it fail with a
    ``StreamBrokenError``, and the next request opens a new one. Questions about models go beside the stream.
    """

    def _open(self) -> None:
        super()._open()
        self._opening = threading.Lock()
        self._stream: _Stream | None = None

    @property
    def transport(self) -> str:
        """How requests travel, in words: "grpc stream"."""
        return f"grpc stream{' shared-memory' if self._regions is not None else ''}"

    def _exchange(self, request: Request, t: Try) -> Any:
        stream = self._running_stream()
        number, answer = stream.send(request, t)
        try:
            return answer.result(t.wait_s)
        except FutureTimeoutError as error:
            stream.forget(number)
            raise TimeoutError(f"no answer within {t.wait_s:g} s") from error

    def _disconnect(self) -> None:
        with self._opening:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        super()._disconnect()

    def _running_stream(self) -> _Stream:
        with self._opening:
            if self._stream is None or self._stream.is_over:
                if self._stream is not None:
                    self._stream.close()
                self._stream = _Stream(open_channel(self.endpoint, self.options), self._headers, self.failures)
            return self._stream


class _Stream:
    """One call of ``ModelStreamInfer``, and the requests that wait for an answer on it."""

    def __init__(self, channel: Any, headers: dict[str, str], failures: Failures) -> None:
        from tritonclient.grpc import service_pb2_grpc

        self._channel = channel
        self._failures = failures
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Future[Any]] = {}
        self._forgotten: set[str] = set()
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failure: ServerError | None = None
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._call = stub.ModelStreamInfer(self._requests(), metadata=tuple(headers.items()))
        self._reader = threading.Thread(target=self._read, name="trtdeploy-stream", daemon=True)
        self._reader.start()

    @property
    def is_over(self) -> bool:
        """Whether no further request can be sent."""
        with self._lock:
            return self._failure is not None

    def send(self, request: Request, t: Try) -> tuple[str, Future[Any]]:
        """Send a request; its answer comes to the future.

        Raises:
            ServerError: The stream is broken.
        """
        answer: Future[Any] = Future()
        with self._lock:  # in the order of the numbers
            if self._failure is not None:
                raise self._failure
            number = str(next(self._numbers))
            message = request.as_protobuf(request_id=number, timeout_us=t.timeout_us)
            self._waiting[number] = answer
            self._outgoing.put(message)
        return number, answer

    def forget(self, number: str) -> None:
        """Wait no longer for an answer, which may still come."""
        with self._lock:
            if self._waiting.pop(number, None) is not None:
                self._forgotten.add(number)

    def close(self) -> None:
        """End the stream and its thread."""
        self._outgoing.put(_END)
        self._call.cancel()
        self._reader.join(_JOIN_S)
        self._channel.close()

    def _requests(self) -> Iterator[Any]:
        while (message := self._outgoing.get()) is not _END:
            yield message

    def _read(self) -> None:
        import grpc  # type: ignore[import-untyped, unused-ignore]

        try:
            for response in self._call:
                self._deliver(response)
            failure: ServerError = self._failures.broken_stream("the server has ended it.")
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details())
            failure = self._failures.status(str(code), details)
            if not isinstance(failure, (AccessDeniedError, TlsError)):
                failure = self._failures.broken_stream(f"{code.name}: {details}")
        except ServerError as error:
            failure = error
        with self._lock:
            self._failure = failure
            waiting, self._waiting = self._waiting, {}
        self._outgoing.put(_END)
        for answer in waiting.values():
            answer.set_exception(failure)

    def _deliver(self, response: Any) -> None:
        from tritonclient.grpc import InferResult
        from tritonclient.utils import InferenceServerException

        number = response.infer_response.id
        with self._lock:
            answer = self._waiting.pop(number, None)
            forgotten = number in self._forgotten
            self._forgotten.discard(number)
        if answer is None:
            if forgotten:
                return
            raise self._failures.broken_stream(f"it brought an answer to no request ({number!r}).")
        if response.error_message:
            answer.set_exception(InferenceServerException(response.error_message))
        else:
            answer.set_result(InferResult(response.infer_response))
