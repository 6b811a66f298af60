"""One small client over tritonclient's HTTP and gRPC clients, with our errors and the facts that packaging left."""

from __future__ import annotations

import http.client
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from trtdeploy.errors import RuntimeUnavailableError, ServerError, UsageError
from trtdeploy.onnxgraph.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.preprocessing import Preprocessing
from trtdeploy.tensors import Array, TensorSpec, dtype_from_triton, dtype_to_triton

_UNLIMITED = -1  # gRPC's own word for it
_FIRST_PAUSE_S = 0.1
_DOUBLINGS = 5


class ServerUnavailableError(ServerError):
    """The server cannot be reached, or says that it takes no requests now."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says of one model.

    Attributes:
        name: Its name.
        version: The version that answers.
        inputs: Inputs with the batch dimension, -1 where dynamic.
        outputs: Outputs, likewise.
        max_batch_size: Largest batch of one request; 0 where the first dimension is not a batch.
        preprocessing: How images become its input, if it was packaged with that.
        labels: Its class names, if it was packaged with them.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Reply:
    """The answer to one request: outputs by name, and the version that the server says has made them."""

    version: str
    outputs: dict[str, Array]


class InferenceClient(ABC):
    """A connection to one server, usable from several threads. Use it as a context manager, or call ``close``.

    Args:
        address: ``host:port``.
        timeout_s: How long one try of a request may take.
        retries: How often to ask again, with growing pauses, where the server is unavailable. A request may then have
            been executed twice, which is harmless: our models keep no state. What the server refused, or did not
            answer in time, is never asked again.
    """

    scheme: str

    def __init__(self, address: str, *, timeout_s: float, retries: int = 0) -> None:
        self.address = address
        self._retries = retries
        self.timeout_s = timeout_s

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.scheme}://{self.address}"

    def describe(self, name: str, version: str = "") -> ServedModel:
        """Ask the server about a model.

        Raises:
            ServerError: The server does not answer, or the model is not ready.
        """
        model: ServedModel = self._ask(lambda: _served_model(name, version, *self._metadata_and_config(name, version)))
        return model

    def infer(self, model: ServedModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Send one request and wait for its answer.

        Raises:
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
        reply: Reply = self._ask(lambda: self._infer(model, version, inputs))
        if version and reply.version != version:
            raise ServerError(f"Version {version} of {model.name} was asked; version {reply.version!r} has answered.")
        return reply

    def statistics(self, model: ServedModel) -> dict[str, Any]:
        """Return the server's ``inference_stats`` of a model: a count and nanoseconds for each part of a request.

        Raises:
            ServerError: The server does not answer, or gives no statistics.
        """
        stats: dict[str, Any] = self._ask(lambda: self._statistics(model)["model_stats"][0]["inference_stats"])
        return stats

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _metadata_and_config(self, name: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]: ...

    @abstractmethod
    def _statistics(self, model: ServedModel) -> dict[str, Any]: ...

    @abstractmethod
    def _infer(self, model: ServedModel, version: str, inputs: Mapping[str, Array]) -> Reply: ...

    def _ask(self, call: Any) -> Any:
        for pause_s in (_FIRST_PAUSE_S * 2 ** min(number, _DOUBLINGS) for number in range(self._retries)):
            try:
                return self._ask_once(call)
            except ServerUnavailableError:
                time.sleep(pause_s)
        return self._ask_once(call)

    def _ask_once(self, call: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        hint = "Is it running, and is this its port for this protocol?"
        try:
            return call()
        except InferenceServerException as error:
            if error.status() == "StatusCode.DEADLINE_EXCEEDED":
                raise self._too_late() from error
            if error.status() == "StatusCode.UNAVAILABLE":
                raise ServerUnavailableError(
                    f"The server at {self.url} is unavailable: {error.message()}", hint=hint
                ) from error
            raise ServerError(f"The server at {self.url} refused: {error.message()}") from error
        except TimeoutError as error:
            raise self._too_late() from error
        except ConnectionError as error:
            raise ServerUnavailableError(f"The server at {self.url} is unavailable: {error}", hint=hint) from error
        except (
            OSError,
            EOFError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            http.client.HTTPException,
        ) as error:
            raise ServerError(
                f"The server at {self.url} gave no usable answer: {type(error).__name__}: {error}", hint=hint
            ) from error

    def _too_late(self) -> ServerError:
        return ServerError(
            f"The server at {self.url} did not answer within {self.timeout_s:g} s.",
            hint="Is it overloaded? Allow more time, or send smaller or fewer requests.",
        )


class GrpcClient(InferenceClient):
    """Over gRPC; one channel serves all threads."""

    scheme = "grpc"

    def __init__(self, address: str, *, timeout_s: float, retries: int = 0) -> None:
        super().__init__(address, timeout_s=timeout_s, retries=retries)
        import tritonclient.grpc

        self._module = tritonclient.grpc
        # gRPC would send even loopback through a proxy that the environment names
        host = urlsplit(self.url).hostname or ""
        direct = (
            [("grpc.enable_http_proxy", 0)] if host == "localhost" or host.startswith("127.") or host == "::1" else []
        )
        unlimited = [(f"grpc.max_{way}_message_length", _UNLIMITED) for way in ("send", "receive")]
        self._client = tritonclient.grpc.InferenceServerClient(address, channel_args=[*unlimited, *direct])

    def close(self) -> None:
        self._client.close()

    def _metadata_and_config(self, name: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
        metadata = self._client.get_model_metadata(name, version, as_json=True, client_timeout=self.timeout_s)
        config = self._client.get_model_config(name, version, as_json=True, client_timeout=self.timeout_s)
        return metadata, config["config"]

    def _statistics(self, model: ServedModel) -> dict[str, Any]:
        stats: dict[str, Any] = self._client.get_inference_statistics(
            model.name, model.version, as_json=True, client_timeout=self.timeout_s
        )
        return stats

    def _infer(self, model: ServedModel, version: str, inputs: Mapping[str, Array]) -> Reply:
        answer = self._client.infer(
            model.name,
            _tensors(self._module, inputs),
            model_version=version,
            outputs=[self._module.InferRequestedOutput(spec.name) for spec in model.outputs],
            client_timeout=self.timeout_s,
        )
        return Reply(answer.get_response().model_version, _outputs(model.outputs, answer))


class HttpClient(InferenceClient):
    """Over HTTP; tritonclient's HTTP client is bound to its thread, so every thread gets its own."""

    scheme = "http"

    def __init__(self, address: str, *, timeout_s: float, retries: int = 0) -> None:
        super().__init__(address, timeout_s=timeout_s, retries=retries)
        import tritonclient.http

        self._module = tritonclient.http
        self._local = threading.local()

    def close(self) -> None:
        # Connections of other threads end with their threads: only a thread itself may close its own.
        client = self._local.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _client(self) -> Any:
        if not hasattr(self._local, "client"):
            self._local.client = self._module.InferenceServerClient(
                self.address, connection_timeout=self.timeout_s, network_timeout=self.timeout_s
            )
        return self._local.client

    def _metadata_and_config(self, name: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
        client = self._client()
        with self._deadline():
            return client.get_model_metadata(name, version), client.get_model_config(name, version)

    def _statistics(self, model: ServedModel) -> dict[str, Any]:
        with self._deadline():
            stats: dict[str, Any] = self._client().get_inference_statistics(model.name, model.version)
        return stats

    def _infer(self, model: ServedModel, version: str, inputs: Mapping[str, Array]) -> Reply:
        with self._deadline():
            answer = self._client().infer(
                model.name,
                _tensors(self._module, inputs),
                model_version=version,
                outputs=[self._module.InferRequestedOutput(spec.name, binary_data=True) for spec in model.outputs],
            )
        return Reply(answer.get_response()["model_version"], _outputs(model.outputs, answer))

    def _deadline(self) -> Any:
        """Limit a whole exchange: the client's own timeouts begin anew with every byte that arrives."""
        import gevent  # type: ignore[import-untyped, unused-ignore]

        return gevent.Timeout(self.timeout_s, TimeoutError(f"no answer within {self.timeout_s:g} s"))


def connect(url: str, *, timeout_s: float = 30.0, retries: int = 0) -> InferenceClient:
    """Return a client for ``grpc://host:port`` or ``http://host:port``; nothing is sent yet.

    Raises:
        UsageError: The URL has another form.
        RuntimeUnavailableError: tritonclient is not installed.
    """
    kinds: dict[str, type[InferenceClient]] = {"grpc": GrpcClient, "http": HttpClient}
    try:
        parts = urlsplit(url)
        complete = parts.scheme in kinds and bool(parts.hostname) and parts.port is not None and parts.path in ("", "/")
    except ValueError:  # a port that is no number, a bracket that is not closed
        complete = False
    if not complete:
        raise UsageError(
            f"{url!r} is not the URL of a Triton server.",
            hint="Examples: grpc://127.0.0.1:8001, http://127.0.0.1:8000",
        )
    try:
        return kinds[parts.scheme](parts.netloc, timeout_s=timeout_s, retries=retries)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"The {parts.scheme} client of tritonclient is not installed.", hint="pip install 'trtdeploy[triton]'"
        ) from error


def _served_model(name: str, version: str, metadata: dict[str, Any], config: dict[str, Any]) -> ServedModel:
    parameters = {key: entry.get("string_value", "") for key, entry in config.get("parameters", {}).items()}
    labels = parameters.get(LABELS_KEY)
    preprocessing = parameters.get(PREPROCESSING_KEY)
    return ServedModel(
        name=name,
        version=version or str(max(map(int, metadata.get("versions", ["1"])))),
        inputs=tuple(_spec(tensor) for tensor in metadata["inputs"]),
        outputs=tuple(_spec(tensor) for tensor in metadata["outputs"]),
        max_batch_size=int(config.get("max_batch_size", 0)),
        preprocessing=Preprocessing.from_json(preprocessing) if preprocessing is not None else None,
        labels=tuple(json.loads(labels)) if labels is not None else None,
    )


def _spec(tensor: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=tensor["name"],
        dtype=dtype_from_triton(tensor["datatype"]),
        shape=tuple(int(size) for size in tensor["shape"]),
    )


def _tensors(module: Any, inputs: Mapping[str, Array]) -> list[Any]:
    tensors = []
    for name, array in inputs.items():
        tensor = module.InferInput(name, list(array.shape), dtype_to_triton(array.dtype.name))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    return tensors


def _outputs(specs: Sequence[TensorSpec], answer: Any) -> dict[str, Array]:
    outputs = {spec.name: answer.as_numpy(spec.name) for spec in specs}
    missing = [name for name, array in outputs.items() if array is None]
    if missing:
        raise ValueError(f"the answer lacks the outputs {missing}")
    return outputs
