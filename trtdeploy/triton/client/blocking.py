"""What the clients that wait for their answers have in common: questions, retries, deadlines and errors."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trtdeploy.errors import ServerError, TrtDeployError
from trtdeploy.tensors import Array
from trtdeploy.triton.client.connection.attempts import Patience, Try
from trtdeploy.triton.client.connection.connection import Connection
from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits
from trtdeploy.triton.client.errors import ServerUnavailableError, SharedMemoryError
from trtdeploy.triton.client.messages import Reply, Request, output_shape, read_reply
from trtdeploy.triton.client.served_model import ServedModel, read_served_model
from trtdeploy.triton.client.shared_memory import Layout, SharedRegions

T = TypeVar("T")
_GOODBYE_S = 5.0


class InferenceClient(Connection, ABC):
    """A connection to one server, usable from several threads. Use it as a context manager, or call ``close``.

    Args:
        endpoint: Where the server listens.
        options: Certificates and headers.
        limits: How long and how often to ask. Only where the server is unavailable is it asked again, and then a
            request may have been executed twice, which is harmless for a model that keeps no state; one that does is
            not asked again. What the server refused, or did not answer in time, is never asked again.
        shared_memory: Leave tensors in shared memory, for a server on this machine.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        options: ConnectionOptions | None = None,
        limits: RequestLimits | None = None,
        *,
        shared_memory: bool = False,
    ) -> None:
        super().__init__(endpoint, options, limits)
        self._regions = SharedRegions(self._announce, self._withdraw, self._known) if shared_memory else None

    @property
    def transport(self) -> str:
        """How requests travel, in words: "grpc shared-memory"."""
        return f"{self.endpoint.protocol}{' shared-memory' if self._regions is not None else ''}"

    def describe(self, name: str, version: str = "") -> ServedModel:
        """Ask the server about a model.

        Raises:
            ServerError: The server does not answer, or the model is not ready.
        """
        return self._ask(lambda t: read_served_model(name, version, *self._metadata_and_config(name, version, t)))

    def infer(self, model: ServedModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Send one request and wait for its answer.

        Raises:
            DeadlineExceededError: There was a deadline, and no answer within it.
            ServerError: The server refuses it, does not answer in time, or the connection broke.
        """
        return self.request(model, inputs).outputs

    def request(self, model: ServedModel, inputs: Mapping[str, Array], *, any_version: bool = False) -> Reply:
        """Send one request, and say also which version has answered.

        Args:
            model: Who is asked.
            inputs: Arrays by name.
            any_version: Leave the choice of the version to the server, as most clients do.

        Raises:
            ServerError: As for ``infer``, or another version than the one that was asked for has answered.
        """
        version = "" if any_version else model.version
        patience = Patience(self.limits, has_deadline=True)
        with patience.keeping_the_deadline(self.failures, drops_late=model.drops_late):
            reply = self._ask(lambda t: self._infer(model, version, inputs, t), patience, may_repeat=not model.stateful)
        check_version(model, version, reply.version)
        return reply

    def statistics(self, model: ServedModel) -> dict[str, Any]:
        """Return the server's ``inference_stats`` of a model: a count and nanoseconds for each part of a request.

        Raises:
            ServerError: The server does not answer, or gives no statistics.
        """
        return self._ask(lambda t: dict(self._statistics(model, t)["model_stats"][0]["inference_stats"]))

    def close(self) -> None:
        """Close the connection; what was in shared memory is gone."""
        try:
            if self._regions is not None:
                self._regions.close()
        finally:
            self._disconnect()

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _disconnect(self) -> None: ...

    @abstractmethod
    def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]: ...

    @abstractmethod
    def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]: ...

    @abstractmethod
    def _exchange(self, request: Request, t: Try) -> Any:
        """Send a request once and return the ``InferResult``."""

    @abstractmethod
    def _register(self, name: str, key: str, byte_size: int, t: Try) -> None:
        """Tell the server of a region of shared memory."""

    @abstractmethod
    def _unregister(self, name: str, t: Try) -> None: ...

    @abstractmethod
    def _registered(self, t: Try) -> list[str]: ...

    def _infer(self, model: ServedModel, version: str, inputs: Mapping[str, Array], t: Try) -> Reply:
        if self._regions is None:
            request = Request(model.name, version, inputs, model.outputs)
            return read_reply(request, self._exchange(request, t))
        layout = Layout(inputs, model.outputs)
        with self._regions.borrowed(layout.byte_size) as memory:
            layout.write(memory)
            request = Request(model.name, version, inputs, model.outputs, layout.regions(memory))
            answer = self._exchange(request, t)
            reply = read_reply(request, answer)
            for spec in model.outputs:
                if spec.name in request.regions:
                    reply.outputs[spec.name] = layout.read(memory, spec, output_shape(answer, spec.name))
        return reply

    def _announce(self, name: str, key: str, byte_size: int) -> None:
        try:
            self._register(name, key, byte_size, Try(self.timeout_s))
        except Exception as error:
            explained = self.failures.explain(error)
            if type(explained) is not ServerError:
                raise explained from error
            raise SharedMemoryError(
                f"The server at {self.url} cannot use the shared memory of this machine: {explained.message}",
                hint="--shared-memory is for a server on this host that has the same /dev/shm (containers: --ipc=host) "
                "and may open the files of this user.",
            ) from error

    def _known(self) -> list[str]:
        return self._ask(self._registered)

    def _withdraw(self, name: str) -> None:
        try:
            self._unregister(name, Try(min(self.timeout_s, _GOODBYE_S)))
        except Exception as error:
            raise self.failures.explain(error) from error

    def _ask(self, call: Callable[[Try], T], patience: Patience | None = None, *, may_repeat: bool = True) -> T:
        patience = patience or Patience(self.limits)
        for pause_s in patience.pauses_s(may_repeat=may_repeat):
            try:
                return self._ask_once(call, patience)
            except ServerUnavailableError:
                time.sleep(pause_s)
        return self._ask_once(call, patience)

    def _ask_once(self, call: Callable[[Try], T], patience: Patience) -> T:
        try:
            return call(patience.next_try())
        except TrtDeployError:
            raise
        except Exception as error:
            raise self.failures.explain(error) from error


def check_version(model: ServedModel, version: str, answered: str) -> None:
    """Refuse the answer of another version than the one that was asked for; any will do where ``version`` is empty.

    Raises:
        ServerError: Another version has answered.
    """
    if version and answered != version:
        raise ServerError(f"Version {version} of {model.name} was asked; version {answered!r} has answered.")
