"""Triton's own protobuf schema of ``config.pbtxt``, as tritonclient carries it."""

from __future__ import annotations

from typing import Any

from trtdeploy.errors import RuntimeUnavailableError


def schema() -> Any:
    """Return tritonclient's ``model_config_pb2``.

    Raises:
        RuntimeUnavailableError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise RuntimeUnavailableError(
            "Triton's configuration schema comes with tritonclient, which is not installed.",
            hint="pip install 'trtdeploy[triton]'",
        ) from error
    return model_config_pb2
