"""The same clients for asyncio: each request is awaited, and nothing runs in threads."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from trtdeploy.errors import TrtDeployError
from trtdeploy.tensors import Array
from trtdeploy.triton.client.blocking import check_version
from trtdeploy.triton.client.connection.attempts import Patience, Try
from trtdeploy.triton.client.connection.connection import Connection
from trtdeploy.triton.client.connection.tls import grpc_credentials, ssl_context
from trtdeploy.triton.client.errors import ServerUnavailableError
from trtdeploy.triton.client.grpc import channel_arguments, metadata_of
from trtdeploy.triton.client.messages import Reply, Request, read_reply
from trtdeploy.triton.client.served_model import ServedModel, read_served_model

T = TypeVar("T")


class AsyncInferenceClient(Connection, ABC):
    """A connection to one server for one event loop. Use it as an asynchronous context manager, or await ``close``.

    Any number of requests may be awaited at once; they share the connection. A request whose task is cancelled is
    cancelled on the server too, over gRPC.

    Args:
        endpoint: Where the server listens.
        options: Certificates and headers.
        limits: How long and how often to ask; as for ``InferenceClient``.
    """

    _connected: Any = None

    @property
    def transport(self) -> str:
        """How requests travel, in words: "grpc asyncio"."""
        return f"{self.endpoint.protocol} asyncio"

    async def describe(self, name: str, version: str = "") -> ServedModel:
        """Ask the server about a model.

        Raises:
            ServerError: The server does not answer, or the model is not ready.
        """

        async def ask(t: Try) -> ServedModel:
            return read_served_model(name, version, *await self._metadata_and_config(name, version, t))

        return await self._ask(ask)

    async def infer(self, model: ServedModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Send one request and await its answer.

        Raises:
            DeadlineExceededError: There was a deadline, and no answer within it.
            ServerError: The server refuses it, does not answer in time, or the connection broke.
        """
        return (await self.request(model, inputs)).outputs

    async def request(self, model: ServedModel, inputs: Mapping[str, Array], *, any_version: bool = False) -> Reply:
        """Send one request, and say also which version has answered.

        Args:
            model: Who is asked.
            inputs: Arrays by name.
            any_version: Leave the choice of the version to the server, as most clients do.

        Raises:
            ServerError: As for ``infer``, or another version than the one that was asked for has answered.
        """
        version = "" if any_version else model.version
        request = Request(model.name, version, inputs, model.outputs)
        patience = Patience(self.limits, has_deadline=True)

        async def ask(t: Try) -> Reply:
            return read_reply(request, await self._exchange(request, t))

        with patience.keeping_the_deadline(self.failures, drops_late=model.drops_late):
            reply = await self._ask(ask, patience, may_repeat=not model.stateful)
        check_version(model, version, reply.version)
        return reply

    async def statistics(self, model: ServedModel) -> dict[str, Any]:
        """Return the server's ``inference_stats`` of a model: a count and nanoseconds for each part of a request.

        Raises:
            ServerError: The server does not answer, or gives no statistics.
        """

        async def ask(t: Try) -> dict[str, Any]:
            return dict((await self._statistics(model, t))["model_stats"][0]["inference_stats"])

        return await self._ask(ask)

    async def close(self) -> None:
        """Close the connection."""
        client, self._connected = self._connected, None
        if client is not None:
            await client.close()

    async def __aenter__(self) -> AsyncInferenceClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _client(self) -> Any:
        """The library's client; made at the first request, because it belongs to the loop that runs then."""
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    @abstractmethod
    def _connect(self) -> Any: ...

    @abstractmethod
    async def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]: ...

    @abstractmethod
    async def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]: ...

    @abstractmethod
    async def _exchange(self, request: Request, t: Try) -> Any: ...

    async def _ask(
        self, call: Callable[[Try], Awaitable[T]], patience: Patience | None = None, *, may_repeat: bool = True
    ) -> T:
        patience = patience or Patience(self.limits)
        for pause_s in patience.pauses_s(may_repeat=may_repeat):
            try:
                return await self._ask_once(call, patience)
            except ServerUnavailableError:
                await asyncio.sleep(pause_s)
        return await self._ask_once(call, patience)

    async def _ask_once(self, call: Callable[[Try], Awaitable[T]], patience: Patience) -> T:
        t = patience.next_try()
        try:
            return await asyncio.wait_for(call(t), t.wait_s)
        except TrtDeployError:
            raise
        except Exception as error:
            raise self.failures.explain(error) from error


class AsyncGrpcClient(AsyncInferenceClient):
    """Over gRPC."""

    def _open(self) -> None:
        import tritonclient.grpc.aio

        self._module = tritonclient.grpc.aio
        self._credentials = grpc_credentials(self.options) if self.endpoint.tls else None
        self._headers = metadata_of(self.options)

    def _connect(self) -> Any:
        return self._module.InferenceServerClient(
            self.endpoint.address, creds=self._credentials, channel_args=channel_arguments(self.endpoint, self.options)
        )

    async def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]:
        metadata = await self._client().get_model_metadata(name, version, headers=self._headers, as_json=True)
        config = await self._client().get_model_config(name, version, headers=self._headers, as_json=True)
        return metadata, config["config"]

    async def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]:
        stats: dict[str, Any] = await self._client().get_inference_statistics(
            model.name, model.version, headers=self._headers, as_json=True
        )
        return stats

    async def _exchange(self, request: Request, t: Try) -> Any:
        inputs, outputs = request.for_client(self._module)
        return await self._client().infer(
            request.model,
            inputs,
            model_version=request.version,
            outputs=outputs,
            timeout=t.timeout_us,
            client_timeout=t.wait_s,
            headers=self._headers,
        )


class AsyncHttpClient(AsyncInferenceClient):
    """Over HTTP."""

    def _open(self) -> None:
        import tritonclient.http.aio

        self._module = tritonclient.http.aio
        self._context = ssl_context(self.options) if self.endpoint.tls else None

    def _connect(self) -> Any:
        return self._module.InferenceServerClient(
            self.endpoint.address + self.endpoint.path,
            conn_limit=0,  # as many as requests are awaited at once
            conn_timeout=self.timeout_s,
            ssl=self.endpoint.tls,
            ssl_context=self._context or True,
        )

    async def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]:
        headers = self.options.plain_headers()
        metadata = await self._client().get_model_metadata(name, version, headers=headers)
        return metadata, await self._client().get_model_config(name, version, headers=headers)

    async def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]:
        stats: dict[str, Any] = await self._client().get_inference_statistics(
            model.name, model.version, headers=self.options.plain_headers()
        )
        return stats

    async def _exchange(self, request: Request, t: Try) -> Any:
        inputs, outputs = request.for_client(self._module)
        return await self._client().infer(
            request.model,
            inputs,
            model_version=request.version,
            outputs=outputs,
            timeout=t.timeout_us,
            headers=self.options.plain_headers(),  # it adds its own to them
        )
