"""Requests that are encoded once and sent many times: what a load asks of its client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtdeploy.errors import ServerError
from trtdeploy.tensors import Array
from trtdeploy.triton.client.blocking import check_version
from trtdeploy.triton.client.connection.attempts import Patience
from trtdeploy.triton.client.grpc import GrpcClient, metadata_of, open_channel
from trtdeploy.triton.client.messages import Request
from trtdeploy.triton.client.served_model import ServedModel

_METHOD = "/inference.GRPCInferenceService/ModelInfer"


class PreparedRequests:
    """Requests for one model over gRPC, usable from several threads. Use it as a context manager, or call ``close``.

    Encoding a request of 600 kB (an image at 224 pixels) anew each time takes a tenth of the time that a small network
    needs for its answer, and would be counted as the server's. A request is never asked again. Of an answer, the
    version and the names of the outputs are looked at; they are not decoded.

    Args:
        client: A connection whose endpoint, headers and limits are used; requests go over a channel of their own.
        model: Who is asked.
        requests: Inputs by name, of each request.
        any_version: Leave the choice of the version to the server, as most clients do.
    """

    def __init__(
        self,
        client: GrpcClient,
        model: ServedModel,
        requests: Sequence[Mapping[str, Array]],
        *,
        any_version: bool = False,
    ) -> None:
        from tritonclient.grpc import service_pb2

        self._failures = client.failures
        self._limits = client.limits
        self._model = model
        self._version = "" if any_version else model.version
        timeout_us = Patience(client.limits, has_deadline=True).next_try().timeout_us
        self._messages = [
            Request(model.name, self._version, inputs, model.outputs)
            .as_protobuf(request_id="", timeout_us=timeout_us)
            .SerializeToString()
            for inputs in requests
        ]
        self._metadata = tuple(metadata_of(client.options).items())
        self._channel = open_channel(client.endpoint, client.options)
        self._call = self._channel.unary_unary(
            _METHOD,
            request_serializer=lambda message: message,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def send(self, number: int) -> None:
        """Send one of the requests, in turn, and wait for its answer.

        Raises:
            DeadlineExceededError: There was a deadline, and no answer within it.
            ServerError: The server refuses it, does not answer in time, or the connection broke.
        """
        import grpc  # type: ignore[import-untyped, unused-ignore]

        patience = Patience(self._limits, has_deadline=True)
        message = self._messages[number % len(self._messages)]
        with patience.keeping_the_deadline(self._failures, drops_late=self._model.drops_late):
            try:
                answer = self._call(message, timeout=patience.next_try().wait_s, metadata=self._metadata)
            except grpc.RpcError as error:
                raise self._failures.status(str(error.code()), str(error.details())) from error
        self._check(answer)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> PreparedRequests:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self, answer: Any) -> None:
        missing = {spec.name for spec in self._model.outputs} - {output.name for output in answer.outputs}
        if missing:
            raise ServerError(f"The answer of {self._model.name} lacks the outputs {sorted(missing)}.")
        check_version(self._model, self._version, answer.model_version)
