"""What every client is: a connection to one server, with its options, its limits and its errors."""

from __future__ import annotations

from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits
from trtdeploy.triton.client.errors import Failures


class Connection:
    """A connection to one server.

    Args:
        endpoint: Where the server listens.
        options: Certificates and headers.
        limits: How long and how often to ask.
    """

    def __init__(
        self, endpoint: Endpoint, options: ConnectionOptions | None = None, limits: RequestLimits | None = None
    ) -> None:
        self.endpoint = endpoint
        self.options = options or ConnectionOptions()
        self.limits = limits or RequestLimits()
        self.failures = Failures(endpoint, self.options, self.limits)
        self._open()

    def _open(self) -> None:
        """Import the library and make what the connection needs, if anything; nothing is sent yet."""

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.endpoint.url

    @property
    def timeout_s(self) -> float:
        """How long one try of a request may take."""
        return self.limits.timeout_s
