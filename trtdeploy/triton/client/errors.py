"""What can go wrong between a client and a server, as errors that say which of it happened."""

from __future__ import annotations

import asyncio
import http.client
import re
import ssl

from trtdeploy.errors import ServerError
from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits

_UNAVAILABLE = frozenset({"StatusCode.UNAVAILABLE", "502", "503"})
_DENIED = frozenset({"StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED", "401", "403"})
_SHOWN_CHARACTERS = 300  # of a gateway's page
_TOO_LATE = "StatusCode.DEADLINE_EXCEEDED"
# Triton's words: its gRPC and HTTP endpoints with restricted access, the queue of its core (scheduler_utils.cc), and
# its list of loaded versions (model_lifecycle.cc)
_RESTRICTED = re.compile(r"is restricted, expecting header '([^']*)'")
_DROPPED = "Request timeout expired"
_QUEUE_FULL = "Exceeds maximum queue size"
_NOT_READY = "is not at ready state"
_TLS = re.compile(r"certificate|handshake|SSL|TLS|Hostname Verification", re.IGNORECASE)
_WRONG_NAME = re.compile(r"Hostname|certificate is not valid for|not in peer certificate")
_PLAIN_HINT = "Is it running, and is this its port for this protocol?"


class ServerUnavailableError(ServerError):
    """The server cannot be reached, or says that it takes no requests now."""


class StreamBrokenError(ServerUnavailableError):
    """The stream ended before the answer had come; whether the server has executed the request is not known."""


class QueueFullError(ServerUnavailableError):
    """The model's queue holds as many requests as it may; in a moment it may hold fewer."""


class ModelNotReadyError(ServerError):
    """The server knows the version of the model that was asked, but does not serve it: it is not loaded."""


class AccessDeniedError(ServerError):
    """The server answers only requests with a certain header, and this one had it not, or with another value."""


class TlsError(ServerError):
    """No secure connection came about: a certificate is not accepted, or only one side speaks TLS."""


class RequestTimeoutError(ServerError):
    """One try of a request took longer than the client waits for one."""


class DeadlineExceededError(ServerError):
    """A request was not answered within its deadline.

    Attributes:
        dropped_by_server: Whether the server has said that it dropped it; else the client stopped waiting.
    """

    def __init__(self, message: str, *, hint: str | None = None, dropped_by_server: bool) -> None:
        super().__init__(message, hint=hint)
        self.dropped_by_server = dropped_by_server


class SharedMemoryError(ServerError):
    """The server does not see the shared memory of this machine, or may not use it."""


class Failures:
    """The errors of one connection."""

    def __init__(self, endpoint: Endpoint, options: ConnectionOptions, limits: RequestLimits) -> None:
        self._endpoint = endpoint
        self._url = endpoint.url
        self._sent_headers = frozenset(options.headers)
        self._limits = limits

    def explain(self, error: Exception) -> ServerError:
        """Return the error of ours for one that a library has raised; raise again what no server can have caused."""
        if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):  # hung up, for whatever reason
            return self.unavailable(str(error))
        if isinstance(error, ssl.SSLError):
            return self._no_tls(str(error))
        from tritonclient.utils import InferenceServerException

        if isinstance(error, InferenceServerException):
            return self.status(str(error.status()), str(error.message()))
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return self.too_late()
        if isinstance(error, ConnectionError):
            return self.unavailable(str(error) or type(error).__name__)
        if isinstance(
            error,
            (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException),
        ) or _is_of_aiohttp(error):
            return self._of_a_library(error)
        raise error

    def unavailable(self, reason: str) -> ServerUnavailableError:
        """Say that the server cannot be reached."""
        return ServerUnavailableError(f"The server at {self._url} is unavailable: {reason}", hint=self._reach_hint())

    def too_late(self) -> RequestTimeoutError:
        """Say that a try has taken longer than is allowed for one."""
        return RequestTimeoutError(
            f"The server at {self._url} did not answer within {self._limits.timeout_s:g} s.",
            hint="Is it overloaded? Allow more time, or send smaller or fewer requests.",
        )

    def past_deadline(self, *, drops_late: bool) -> DeadlineExceededError:
        """Say that the client has not got an answer within the deadline of the request."""
        hint = "Allow more time, or lower the load."
        if not drops_late:
            hint = (
                "The server goes on with it: this model's queue heeds the timeouts of requests only with "
                "allow_timeout_override and a default_timeout_microseconds in its queue policy."
            )
        return DeadlineExceededError(
            f"The server at {self._url} gave no answer within the deadline of {self._deadline()}.",
            hint=hint,
            dropped_by_server=False,
        )

    def broken_stream(self, reason: str) -> StreamBrokenError:
        """Say that a stream has ended with requests that were not answered."""
        return StreamBrokenError(f"The stream from {self._url} broke: {reason}", hint=self._reach_hint())

    def status(self, status: str, message: str) -> ServerError:
        """Say what a status of gRPC ("StatusCode.UNAVAILABLE") or HTTP ("503") means."""
        restricted = _RESTRICTED.search(message)
        if restricted:
            return self._denied(restricted[1])
        if status == _TOO_LATE:
            return self.too_late()
        if _DROPPED in message:  # with UNAVAILABLE, 503, or no status at all on a stream
            return DeadlineExceededError(
                f"The server at {self._url} dropped the request: it waited in the queue for longer than "
                f"{'its deadline of ' + self._deadline() if self._limits.deadline_s else 'the model allows'} "
                f"({message}).",
                hint="Allow more time, lower the load, or give the model more instances.",
                dropped_by_server=True,
            )
        if _QUEUE_FULL in message:  # likewise
            return QueueFullError(
                f"The server at {self._url} refused the request: as many wait already as the model's queue may hold "
                f"({message}).",
                hint="Lower the load, give the model more instances, or raise max_queue_size of its queue policy.",
            )
        if _NOT_READY in message:
            return ModelNotReadyError(
                f"The server at {self._url} does not serve this version of the model now: {message}.",
                hint="Is it loaded? See the server's log, or trtdeploy check REPOSITORY --url URL. The version_policy "
                "of the model's config says which versions a server loads.",
            )
        if status in _DENIED:
            return AccessDeniedError(
                f"The server at {self._url}, or a gateway before it, does not let this client in "
                f"({status.rpartition('.')[2]}): {message[:_SHOWN_CHARACTERS]}",
                hint="Give --header NAME=VALUE with what it asks for, as in --header 'authorization=Bearer TOKEN'.",
            )
        if status in _UNAVAILABLE:
            secure = self._endpoint.tls and _TLS.search(message)
            return self._no_tls(message) if secure else self.unavailable(message)
        return ServerError(f"The server at {self._url} refused: {message}")

    def _denied(self, header: str) -> AccessDeniedError:
        wrong = header.lower() in self._sent_headers
        return AccessDeniedError(
            f"The server at {self._url} answers this only to requests with the header {header!r}"
            + ("; the value that was sent is not the right one." if wrong else ", which was not sent."),
            hint=f"Give --header {header}=VALUE with the value that the server was started with.",
        )

    def _no_tls(self, reason: str) -> TlsError:
        hint = self._reach_hint()
        if re.search(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", reason):
            hint = "Give --ca-certificate with the authority that has signed the server's certificate."
        if _WRONG_NAME.search(reason):
            hint = "Ask the server by a name that its certificate is made out for."
        return TlsError(f"No secure connection to {self._url}: {reason}", hint=hint)

    def _of_a_library(self, error: Exception) -> ServerError:
        within = getattr(error, "os_error", None) or getattr(error, "certificate_error", None)
        if isinstance(within, ssl.SSLError):
            return self._no_tls(str(within))
        if isinstance(within, ConnectionError) or type(error).__name__ == "ServerDisconnectedError":
            return self.unavailable(str(error))
        return ServerError(
            f"The server at {self._url} gave no usable answer: {type(error).__name__}: {error}", hint=self._reach_hint()
        )

    def _reach_hint(self) -> str:
        if self._endpoint.tls:
            return (
                "Is it running, and does it speak TLS at this port? Does it want a --client-certificate that its "
                "authority has signed?"
            )
        return f"{_PLAIN_HINT} Does it want TLS ({self._endpoint.protocol}s://)?"

    def _deadline(self) -> str:
        return f"{1e3 * (self._limits.deadline_s or 0):g} ms"


def _is_of_aiohttp(error: Exception) -> bool:
    return type(error).__module__.startswith("aiohttp.")
