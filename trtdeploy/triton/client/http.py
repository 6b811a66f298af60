"""The client over HTTP."""

from __future__ import annotations

import threading
from typing import Any

from trtdeploy.triton.client.blocking import InferenceClient
from trtdeploy.triton.client.connection.attempts import Try
from trtdeploy.triton.client.connection.tls import ssl_context
from trtdeploy.triton.client.messages import Request
from trtdeploy.triton.client.served_model import ServedModel


class HttpClient(InferenceClient):
    """Over HTTP; tritonclient's HTTP client is bound to its thread, so every thread gets its own."""

    def _open(self) -> None:
        import gevent.ssl  # type: ignore[import-untyped, unused-ignore]
        import tritonclient.http

        self._module = tritonclient.http
        self._context = ssl_context(self.options, gevent.ssl) if self.endpoint.tls else None
        self._local = threading.local()

    def _disconnect(self) -> None:
        # Connections of other threads end with their threads: only a thread itself may close its own.
        client = self._local.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _client(self) -> Any:
        if not hasattr(self._local, "client"):
            import gevent

            hub = gevent.get_hub()  # of this thread; it would print a traceback at Ctrl-C, and raise it then
            hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
            self._local.client = self._module.InferenceServerClient(
                self.endpoint.address + self.endpoint.path,
                connection_timeout=self.timeout_s,
                network_timeout=self.timeout_s,
                ssl=self.endpoint.tls,
                ssl_context_factory=self._made_context if self.endpoint.tls else None,
            )
        return self._local.client

    def _made_context(self, **_: object) -> Any:
        return self._context  # it is called with certificates of its own

    def _metadata_and_config(self, name: str, version: str, t: Try) -> tuple[dict[str, Any], dict[str, Any]]:
        client, headers = self._client(), self.options.plain_headers()
        with _limited(t):
            metadata = client.get_model_metadata(name, version, headers=headers)
            return metadata, client.get_model_config(name, version, headers=headers)

    def _statistics(self, model: ServedModel, t: Try) -> dict[str, Any]:
        with _limited(t):
            stats: dict[str, Any] = self._client().get_inference_statistics(
                model.name, model.version, headers=self.options.plain_headers()
            )
        return stats

    def _exchange(self, request: Request, t: Try) -> Any:
        inputs, outputs = request.for_client(self._module)
        with _limited(t):
            return self._client().infer(
                request.model,
                inputs,
                model_version=request.version,
                outputs=outputs,
                timeout=t.timeout_us,
                headers=self.options.plain_headers(),  # it adds its own to them
            )

    def _register(self, name: str, key: str, byte_size: int, t: Try) -> None:
        with _limited(t):
            self._client().register_system_shared_memory(name, key, byte_size, headers=self.options.plain_headers())

    def _unregister(self, name: str, t: Try) -> None:
        with _limited(t):
            self._client().unregister_system_shared_memory(name, headers=self.options.plain_headers())

    def _registered(self, t: Try) -> list[str]:
        with _limited(t):
            status = self._client().get_system_shared_memory_status(headers=self.options.plain_headers())
        return [region["name"] for region in status]


def _limited(t: Try) -> Any:
    """Limit a whole exchange: the client's own timeouts begin anew with every byte that arrives."""
    import gevent

    return gevent.Timeout(t.wait_s, TimeoutError(f"no answer within {t.wait_s:g} s"))
