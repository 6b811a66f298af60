"""Certificates and keys as gRPC and OpenSSL want them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from trtdeploy.errors import UsageError
from trtdeploy.triton.client.connection.options import ConnectionOptions


def grpc_credentials(options: ConnectionOptions) -> Any:
    """Return ``grpc.ChannelCredentials``.

    Raises:
        UsageError: A file is no certificate or key, or the key is not that of the certificate.
    """
    import grpc  # type: ignore[import-untyped, unused-ignore]

    ssl_context(options)  # gRPC itself would only say that the connection failed
    return grpc.ssl_channel_credentials(
        root_certificates=_content(options.ca_certificate),
        private_key=_content(options.client_key),
        certificate_chain=_content(options.client_certificate),
    )


def ssl_context(options: ConnectionOptions, kind: Any = ssl) -> Any:
    """Return an ``SSLContext`` that checks the server's certificate and name.

    Args:
        options: With the certificates.
        kind: The module whose ``create_default_context`` makes it: ``ssl`` or ``gevent.ssl``.

    Raises:
        UsageError: A file is no certificate or key, or the key is not that of the certificate.
    """
    try:
        context = kind.create_default_context(cafile=options.ca_certificate)
    except (OSError, ValueError) as error:
        raise UsageError(f"{options.ca_certificate} holds no certificates in PEM form: {error}.") from error
    if options.client_certificate is not None and options.client_key is not None:
        try:
            # with a password: OpenSSL would ask for one on the terminal
            context.load_cert_chain(options.client_certificate, options.client_key, password="")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{options.client_certificate} and {options.client_key} are no certificate and its key: {error}.",
                hint="Both must be PEM files, and the key not encrypted.",
            ) from error
    return context


def _content(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None else None
