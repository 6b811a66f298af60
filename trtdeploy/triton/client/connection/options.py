"""How a server is reached (certificates, headers), and how long and how often it is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trtdeploy.errors import UsageError

HOST = "host"
"""The header by which a gateway chooses the service; over gRPC it is the channel's authority."""
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_OF_THE_PROTOCOLS = frozenset(
    {
        *("connection", "te", "transfer-encoding", "user-agent"),
        *("content-length", "content-type", "content-encoding", "accept-encoding"),
        "inference-header-content-length",
    }
)


class ConnectionOptions(BaseModel):
    """How to reach a server. Values of headers are secrets: they are sent, and shown nowhere.

    Attributes:
        ca_certificate: PEM file of the authorities that the server's certificate is checked with; those of the system
            (over gRPC, those that gRPC brings) if None.
        client_certificate: PEM file of the certificate that the client shows; needs ``client_key``.
        client_key: PEM file of its key.
        headers: Sent with every request; over gRPC as metadata. Names are in lower case.
    """

    # a message of pydantic would show the values
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    ca_certificate: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    headers: Mapping[str, SecretStr] = Field(default_factory=dict)

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        for name, value in headers.items():
            text = value.get_secret_value()
            if not _HEADER_NAME.fullmatch(name.lower()) or name.lower().endswith("-bin"):
                raise UsageError(f"{name!r} cannot be the name of a header.", hint="Example: triton-grpc-protocol-key")
            if name.lower() in _OF_THE_PROTOCOLS or name.lower().startswith("grpc-"):
                raise UsageError(f"The header {name!r} is set by the client itself.")
            if not text.isascii() or not text.isprintable():
                raise UsageError(f"The value of the header {name!r} holds what cannot be sent: not printable ASCII.")
        return {name.lower(): value for name, value in headers.items()}

    @model_validator(mode="after")
    def _complete(self) -> ConnectionOptions:
        if (self.client_certificate is None) != (self.client_key is None):
            raise UsageError(
                "A client certificate and its key belong together.", hint="Give --client-certificate and --client-key."
            )
        for path in self.files:
            if not path.is_file():
                raise UsageError(f"There is no file {path}.", hint="Certificates and keys are PEM files.")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """The certificates and the key that were given."""
        given = (self.ca_certificate, self.client_certificate, self.client_key)
        return tuple(path for path in given if path is not None)

    def plain_headers(self) -> dict[str, str]:
        """Return a new dictionary of the headers as they are sent."""
        return {name: value.get_secret_value() for name, value in self.headers.items()}


def parse_headers(texts: Sequence[str]) -> dict[str, SecretStr]:
    """Read ``NAME=VALUE`` of each ``--header``.

    Raises:
        UsageError: One has another form, or two have one name. The message holds no part of a value.
    """
    headers: dict[str, SecretStr] = {}
    for number, text in enumerate(texts, 1):
        name, separator, value = text.partition("=")
        if not separator or not _HEADER_NAME.fullmatch(name.lower()):
            raise UsageError(
                f"--header number {number} is not of the form NAME=VALUE.",
                hint="Example: --header triton-grpc-protocol-key=VALUE, or --header 'authorization=Bearer TOKEN'",
            )
        if name.lower() in headers:
            raise UsageError(f"--header {name} is given twice.")
        headers[name.lower()] = SecretStr(value)
    return headers


class RequestLimits(BaseModel):
    """How long and how often to ask.

    Attributes:
        timeout_s: How long one try may take.
        retries: How often to ask again, with growing pauses, where the server is unavailable.
        deadline_s: How long a request may take with all its tries; the server is told, too. No limit if None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    timeout_s: float = Field(default=30.0, gt=0)
    retries: int = Field(default=0, ge=0)
    deadline_s: float | None = Field(default=None, gt=0)
