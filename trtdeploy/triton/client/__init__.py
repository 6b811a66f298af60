"""Clients of a Triton server over HTTP, gRPC and gRPC streams, with our errors and the facts that packaging left."""

from trtdeploy.triton.client.base import InferenceClient
from trtdeploy.triton.client.connecting import connect
from trtdeploy.triton.client.endpoint import Endpoint
from trtdeploy.triton.client.failures import (
    AccessDeniedError,
    DeadlineExceededError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    StreamBrokenError,
    TlsError,
)
from trtdeploy.triton.client.grpc import GrpcClient
from trtdeploy.triton.client.http import HttpClient
from trtdeploy.triton.client.messages import Reply
from trtdeploy.triton.client.options import ConnectionOptions, RequestLimits, parse_headers
from trtdeploy.triton.client.served_model import ServedModel

__all__ = [
    "AccessDeniedError",
    "ConnectionOptions",
    "DeadlineExceededError",
    "Endpoint",
    "GrpcClient",
    "HttpClient",
    "InferenceClient",
    "Reply",
    "RequestLimits",
    "RequestTimeoutError",
    "ServedModel",
    "ServerUnavailableError",
    "SharedMemoryError",
    "StreamBrokenError",
    "TlsError",
    "connect",
    "parse_headers",
]
