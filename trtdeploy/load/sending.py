"""How the requests of a load are sent: encoded beforehand where the transport allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trtdeploy.load.arrivals import Send
from trtdeploy.load.prepared_requests import PreparedRequests
from trtdeploy.tensors import Array
from trtdeploy.triton.client import GrpcClient
from trtdeploy.triton.targets.served_classifier import Client, ServedTarget


@contextmanager
def sending(client: Client, target: ServedTarget, requests: Sequence[Array], *, version: str = "") -> Iterator[Send]:
    """Yield what sends request number ``i`` and waits for its answer.

    Over plain gRPC requests are encoded once. Other transports write into shared memory, or number every request.

    Args:
        client: The connection.
        target: The model behind it.
        requests: Inputs to send in turn.
        version: The version to ask; if empty, the server chooses.

    Raises:
        ServerError: The server does not answer.
    """
    if isinstance(client, GrpcClient) and client.transport == "grpc":
        model = client.describe(target.name, target.version)
        inputs = [{target.input.name: request} for request in requests]
        with PreparedRequests(client, model, inputs, any_version=not version) as prepared:
            yield prepared.send
    else:
        yield lambda number: target.scores(requests[number % len(requests)])
