"""How a server is reached: the options that every command with ``--url`` has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtdeploy.errors import UsageError

if TYPE_CHECKING:
    from trtdeploy.triton.client import ConnectionOptions, InferenceClient

_PANEL = "Connection"
SERVER_URL_HELP = "grpc://HOST:PORT or http://HOST:PORT of a Triton server; grpcs:// and https:// for TLS."


@dataclass(frozen=True)
class ConnectionFlags:
    """Certificates and headers; for ``with_option_groups``."""

    ca_certificate: Annotated[
        Path | None,
        typer.Option(
            "--ca-certificate",
            help="PEM file of the authorities to check the server with (default: the well-known ones).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    client_certificate: Annotated[
        Path | None,
        typer.Option(
            "--client-certificate", help="PEM file of the certificate to show (mutual TLS).", rich_help_panel=_PANEL
        ),
    ] = None
    client_key: Annotated[
        Path | None, typer.Option("--client-key", help="PEM file of its key.", rich_help_panel=_PANEL)
    ] = None
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            metavar="NAME=VALUE",
            help="Sent with every request, for example triton-grpc-protocol-KEY=VALUE; may be repeated.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return bool(self.ca_certificate or self.client_certificate or self.client_key or self.header)

    def options_for(self, url: str | None) -> ConnectionOptions:
        """Return them checked, for a command whose ``--url`` may be left out.

        Raises:
            UsageError: As for ``options``, or there is no server that they are for.
        """
        if url is None and self.given:
            raise UsageError("Certificates and headers are for a server.", hint="Give --url, or leave them out.")
        return self.options()

    def options(self) -> ConnectionOptions:
        """Return them checked.

        Raises:
            UsageError: A file is missing, or a header has another form.
        """
        from trtdeploy.triton.client import ConnectionOptions, parse_headers

        return ConnectionOptions(
            ca_certificate=self.ca_certificate,
            client_certificate=self.client_certificate,
            client_key=self.client_key,
            headers=parse_headers(self.header or ()),
        )


@dataclass(frozen=True)
class TransportFlags:
    """How requests travel; for ``with_option_groups``."""

    stream: Annotated[
        bool, typer.Option("--stream", help="Send requests on one gRPC stream.", rich_help_panel=_PANEL)
    ] = False
    shared_memory: Annotated[
        bool,
        typer.Option(
            "--shared-memory",
            help="Leave tensors in system shared memory; for a server on this host.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            min=0.001,
            max=1e9,
            metavar="MS",
            help="Milliseconds within which each request must be answered; the server may drop it after that.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def deadline_s(self) -> float | None:
        """The deadline in seconds."""
        return self.deadline / 1e3 if self.deadline is not None else None


def connected(
    url: str, connection: ConnectionFlags, transport: TransportFlags, *, timeout_s: float, retries: int = 0
) -> InferenceClient:
    """Return the client that the options describe.

    Raises:
        UsageError: They contradict each other.
    """
    from trtdeploy.triton.client import connect

    return connect(
        url,
        timeout_s=timeout_s,
        retries=retries,
        deadline_s=transport.deadline_s,
        options=connection.options(),
        stream=transport.stream,
        shared_memory=transport.shared_memory,
    )
