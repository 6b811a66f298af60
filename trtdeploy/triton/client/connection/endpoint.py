"""Where a server listens, and by which protocol."""

from __future__ import annotations

import re
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


_TLS_PORT = 443
_BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        protocol: What is spoken there.
        address: ``host:port``.
        tls: Whether requests go through TLS.
        path: What stands before the paths of the protocol, behind a gateway; empty over gRPC.
    """

    protocol: Protocol
    address: str
    tls: bool = False
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read a URL: grpc, grpcs, http or https, a host, and a port, which may be left out with TLS (443).

        Raises:
            UsageError: The URL has another form.
        """
        try:
            parts = urlsplit(url)
            protocol, tls = _SCHEMES[parts.scheme]
            port = parts.port or (_TLS_PORT if tls else None)
            path = parts.path.rstrip("/")
            usable = "@" not in parts.netloc and not (parts.query or parts.fragment) and _BASE_PATH.fullmatch(path)
            complete = bool(parts.hostname and port and usable and not (path and protocol == "grpc"))
        except (ValueError, KeyError):  # a port that is no number, a bracket that is not closed; another scheme
            complete = False
        if not complete:
            shown = repr(url) if "@" not in url else "What was given"  # a password may stand before the @
            raise UsageError(
                f"{shown} is not the URL of a Triton server.",
                hint="Examples: grpc://127.0.0.1:8001, http://127.0.0.1:8000; grpcs:// and https:// for TLS.",
            )
        return cls(protocol, parts.netloc if parts.port else f"{parts.netloc.rstrip(':')}:{port}", tls, path)

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"{self.protocol}{'s' if self.tls else ''}://{self.address}{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Whether the name is one of this machine itself."""
        host = urlsplit(self.url).hostname or ""
        return host == "localhost" or host.startswith("127.") or host == "::1"
