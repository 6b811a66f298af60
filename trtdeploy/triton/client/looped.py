"""An asyncio client behind blocking calls, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from trtdeploy.tensors import Array
from trtdeploy.triton.client.asynchronous import AsyncInferenceClient
from trtdeploy.triton.client.messages import Reply
from trtdeploy.triton.client.served_model import ServedModel

T = TypeVar("T")
_JOIN_S = 10.0


class LoopedClient:
    """Runs the event loop of an asyncio client in a thread of its own. Use it as a context manager, or call ``close``.

    Attributes:
        client: The asyncio client, for coroutines that run in ``loop``.
        loop: Its event loop.
    """

    def __init__(self, client: AsyncInferenceClient) -> None:
        self.client = client
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="trtdeploy-asyncio", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.client.url

    @property
    def timeout_s(self) -> float:
        """How long one try of a request may take."""
        return self.client.timeout_s

    @property
    def transport(self) -> str:
        """How requests travel, in words."""
        return self.client.transport

    def describe(self, name: str, version: str = "") -> ServedModel:
        """Ask the server about a model; see ``AsyncInferenceClient``."""
        return self.run(self.client.describe(name, version))

    def request(self, model: ServedModel, inputs: Mapping[str, Array], *, any_version: bool = False) -> Reply:
        """Send one request and wait for its answer; see ``AsyncInferenceClient``."""
        return self.run(self.client.request(model, inputs, any_version=any_version))

    def statistics(self, model: ServedModel) -> dict[str, Any]:
        """Return the server's statistics of a model; see ``AsyncInferenceClient``."""
        return self.run(self.client.statistics(model))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for its end; it is cancelled if the wait is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connection and end the thread."""
        if self.loop.is_closed():
            return
        try:
            self.run(self.client.close())
            self.run(self.loop.shutdown_default_executor())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_JOIN_S)
            self.loop.close()

    def __enter__(self) -> LoopedClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
