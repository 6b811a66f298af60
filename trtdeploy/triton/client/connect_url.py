"""From a URL to a client."""

from __future__ import annotations

from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.triton.client.asynchronous import AsyncGrpcClient, AsyncHttpClient, AsyncInferenceClient
from trtdeploy.triton.client.blocking import InferenceClient
from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits
from trtdeploy.triton.client.grpc import GrpcClient
from trtdeploy.triton.client.http import HttpClient
from trtdeploy.triton.client.streaming import GrpcStreamClient


def connect(
    url: str,
    *,
    timeout_s: float = 30.0,
    retries: int = 0,
    deadline_s: float | None = None,
    options: ConnectionOptions | None = None,
    stream: bool = False,
    shared_memory: bool = False,
) -> InferenceClient:
    """Return a client for a server; nothing is sent yet.

    Args:
        url: ``grpc://host:port`` or ``http://host:port``; with TLS, ``grpcs://`` or ``https://``.
        timeout_s: How long one try of a request may take.
        retries: How often to ask again where the server is unavailable.
        deadline_s: How long a request may take with all its tries; the server is told, too.
        options: Certificates and headers.
        stream: Send requests on one gRPC stream.
        shared_memory: Leave tensors in shared memory, for a server on this machine.

    Raises:
        UsageError: The URL has another form, certificates are given for a connection without TLS, or a stream is asked
            for over HTTP.
        RuntimeUnavailableError: tritonclient is not installed.
    """
    endpoint = parse_endpoint(url, options)
    limits = RequestLimits(timeout_s=timeout_s, retries=retries, deadline_s=deadline_s)
    if stream and endpoint.protocol != "grpc":
        raise UsageError(f"Streams are for gRPC; {endpoint.url} is HTTP.", hint="Give a grpc:// or grpcs:// URL.")
    kind = HttpClient if endpoint.protocol == "http" else GrpcStreamClient if stream else GrpcClient
    try:
        return kind(endpoint, options, limits, shared_memory=shared_memory)
    except ImportError as error:
        raise _not_installed(endpoint) from error


def connect_async(
    url: str,
    *,
    timeout_s: float = 30.0,
    retries: int = 0,
    deadline_s: float | None = None,
    options: ConnectionOptions | None = None,
) -> AsyncInferenceClient:
    """Return a client for asyncio; nothing is sent yet. Arguments and errors are those of ``connect``."""
    endpoint = parse_endpoint(url, options)
    limits = RequestLimits(timeout_s=timeout_s, retries=retries, deadline_s=deadline_s)
    try:
        return (AsyncHttpClient if endpoint.protocol == "http" else AsyncGrpcClient)(endpoint, options, limits)
    except ImportError as error:
        raise _not_installed(endpoint) from error


def parse_endpoint(url: str, options: ConnectionOptions | None) -> Endpoint:
    """Read a URL, and refuse certificates that nothing would be checked with.

    Raises:
        UsageError: See ``connect``.
    """
    endpoint = Endpoint.parse(url)
    if options is not None and options.files and not endpoint.tls:
        raise UsageError(
            f"{endpoint.url} is a connection without TLS, which has no use for certificates.",
            hint=f"Use {endpoint.protocol}s://{endpoint.address}, or leave them out.",
        )
    return endpoint


def _not_installed(endpoint: Endpoint) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"The {endpoint.protocol} client of tritonclient is not installed.", hint="pip install 'trtdeploy[triton]'"
    )
