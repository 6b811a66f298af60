"""Where a server listens, and by which protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from trtdeploy.errors import UsageError

Protocol = Literal["grpc", "http"]
_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: the protocol, ``host:port``, and whether they go through TLS."""

    protocol: Protocol
    address: str
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read ``grpc://``, ``grpcs://``, ``http://`` or ``https://`` and ``host:port``.

        Raises:
            UsageError: The URL has another form.
        """
        try:
            parts = urlsplit(url)
            complete = (
                parts.scheme in _SCHEMES
                and bool(parts.hostname)
                and parts.port is not None
                and "@" not in parts.netloc
                and parts.path in ("", "/")
                and not (parts.query or parts.fragment)
            )
        except ValueError:  # a port that is no number, a bracket that is not closed
            complete = False
        if not complete:
            shown = repr(url) if "@" not in url else "What was given"  # a password may stand before the @
            raise UsageError(
                f"{shown} is not the URL of a Triton server.",
                hint="Examples: grpc://127.0.0.1:8001, http://127.0.0.1:8000; grpcs:// and https:// for TLS.",
            )
        protocol, tls = _SCHEMES[parts.scheme]
        return cls(protocol, parts.netloc, tls)

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"{self.protocol}{'s' if self.tls else ''}://{self.address}"

    @property
    def is_loopback(self) -> bool:
        """Whether the name is one of this machine itself."""
        host = urlsplit(self.url).hostname or ""
        return host == "localhost" or host.startswith("127.") or host == "::1"
