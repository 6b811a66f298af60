"""The client over gRPC."""

from __future__ import annotations

from typing import Any

from trtdeploy.triton.client.blocking import InferenceClient
from trtdeploy.triton.client.connection.attempts import Try
from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import HOST, ConnectionOptions
from trtdeploy.triton.client.connection.tls import grpc_credentials
from trtdeploy.triton.client.messages import Request
from trtdeploy.triton.client.served_model import ServedModel

_UNLIMITED = -1  # gRPC's own word for it


class GrpcClient(InferenceClient):
    """Over gRPC; one channel serves all threads."""

    def _open(self) -> None:
        import tritonclient.grpc

        self._module = tritonclient.grpc
        self._client = tritonclient.grpc.InferenceServerClient(
            self.endpoint.address,
            creds=grpc_credentials(self.options) if self.endpoint.tls else None,
            channel_args=channel_arguments(self.endpoint, self.options),
        )
        self._headers = metadata_of(self.options)

    def _disconnect(self) -> None:
        self._client.close()

    def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]:
        how = {"as_json": True, "headers": self._headers, "client_timeout": t.wait_s}
        metadata = self._client.get_model_metadata(name, version, **how)
        return metadata, self._client.get_model_config(name, version, **how)["config"]

    def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]:
        stats: dict[str, Any] = self._client.get_inference_statistics(
            model.name, model.version, as_json=True, headers=self._headers, client_timeout=t.wait_s
        )
        return stats

    def _exchange(self, request: Request, t: Try) -> Any:
        inputs, outputs = request.for_client(self._module)
        return self._client.infer(
            request.model,
            inputs,
            model_version=request.version,
            outputs=outputs,
            timeout=t.timeout_us,
            headers=self._headers,
            client_timeout=t.wait_s,
        )

    def _register(self, name: str, key: str, byte_size: int, t: Try) -> None:
        self._client.register_system_shared_memory(name, key, byte_size, headers=self._headers, client_timeout=t.wait_s)

    def _unregister(self, name: str, t: Try) -> None:
        self._client.unregister_system_shared_memory(name, headers=self._headers, client_timeout=t.wait_s)

    def _registered(self, t: Try) -> list[str]:
        status = self._client.get_system_shared_memory_status(
            as_json=True, headers=self._headers, client_timeout=t.wait_s
        )
        return list(status.get("regions", {}))


def open_channel(endpoint: Endpoint, options: ConnectionOptions) -> Any:
    """Return a new ``grpc.Channel``; nothing is sent yet."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    arguments = channel_arguments(endpoint, options)
    if endpoint.tls:
        return grpc.secure_channel(endpoint.address, grpc_credentials(options), options=arguments)
    return grpc.insecure_channel(endpoint.address, options=arguments)


def channel_arguments(endpoint: Endpoint, options: ConnectionOptions) -> list[tuple[str, Any]]:
    """Return the arguments of a channel: messages of any size, and no proxy in front of this machine itself."""
    arguments: list[tuple[str, Any]] = [(f"grpc.max_{way}_message_length", _UNLIMITED) for way in ("send", "receive")]
    if endpoint.is_loopback:  # gRPC would send even that through a proxy that the environment names
        arguments.append(("grpc.enable_http_proxy", 0))
    if HOST in options.headers:
        arguments.append(("grpc.default_authority", options.plain_headers()[HOST]))
    return arguments


def metadata_of(options: ConnectionOptions) -> dict[str, str]:
    """Return the headers that go with every call; the host is one of the channel."""
    return {name: value for name, value in options.plain_headers().items() if name != HOST}
