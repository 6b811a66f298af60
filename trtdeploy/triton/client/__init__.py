"""Clients of a Triton server over HTTP, gRPC and gRPC streams, blocking or for asyncio, with our errors."""

from trtdeploy.triton.client.asynchronous import AsyncGrpcClient, AsyncHttpClient, AsyncInferenceClient
from trtdeploy.triton.client.blocking import InferenceClient
from trtdeploy.triton.client.connect_url import connect, connect_async
from trtdeploy.triton.client.connection.endpoint import Endpoint
from trtdeploy.triton.client.connection.options import ConnectionOptions, RequestLimits, parse_headers
from trtdeploy.triton.client.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    ModelNotReadyError,
    QueueFullError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    StreamBrokenError,
    TlsError,
)
from trtdeploy.triton.client.grpc import GrpcClient
from trtdeploy.triton.client.http import HttpClient
from trtdeploy.triton.client.looped import LoopedClient
from trtdeploy.triton.client.messages import Reply
from trtdeploy.triton.client.served_model import ServedModel
from trtdeploy.triton.client.streaming import GrpcStreamClient

__all__ = [
    "AccessDeniedError",
    "AsyncGrpcClient",
    "AsyncHttpClient",
    "AsyncInferenceClient",
    "ConnectionOptions",
    "DeadlineExceededError",
    "Endpoint",
    "GrpcClient",
    "GrpcStreamClient",
    "HttpClient",
    "InferenceClient",
    "LoopedClient",
    "ModelNotReadyError",
    "QueueFullError",
    "Reply",
    "RequestLimits",
    "RequestTimeoutError",
    "ServedModel",
    "ServerUnavailableError",
    "SharedMemoryError",
    "StreamBrokenError",
    "TlsError",
    "connect",
    "connect_async",
    "parse_headers",
]
