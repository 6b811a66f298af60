"""Every error that trtdeploy raises on purpose.

A message says what was given, what was expected and what to do next. ``exit_code`` is what the commands return:
1 a gate or check failed, 2 wrong usage or input, 3 the machine lacks what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class TrtDeployError(Exception):
    """Root of all errors raised by trtdeploy.

    Args:
        message: What was given and what was expected.
        hint: What to do next.
        log_lines: The runtime's own last messages, oldest first.
    """

    exit_code: int = 2

    def __init__(self, message: str, *, hint: str | None = None, log_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log_lines = tuple(log_lines)

    def __str__(self) -> str:
        parts = [self.message]
        if self.hint:
            parts.append(self.hint)
        if self.log_lines:
            parts.append("\n".join(f"  | {line}" for line in self.log_lines))
        return "\n".join(parts)


class UsageError(TrtDeployError):
    """An option, or a combination of options, that makes no sense."""


class DataError(TrtDeployError):
    """A dataset or an image that cannot be read or does not have the expected layout."""


class CheckpointError(TrtDeployError):
    """A checkpoint that is corrupt, unsafe to load or does not fit the model."""


class TrainingError(TrtDeployError):
    """Training cannot go on, for example because the loss is no longer finite."""


class ModelError(TrtDeployError):
    """An ONNX file that is not one, or that breaks a rule of the runtime."""


class QuantizationError(TrtDeployError):
    """Quantization or its export would not mean what was asked for."""


class BuildError(TrtDeployError):
    """A runtime could not build a plan."""


class PlanError(TrtDeployError):
    """A plan that cannot be used."""


class PlanCorruptError(PlanError):
    """A plan or manifest that is missing, truncated or does not match its counterpart."""


class PlanIncompatibleError(PlanError):
    """An intact plan for another runtime version, another machine or a newer trtdeploy."""

    exit_code = 3


class TimingCacheError(TrtDeployError):
    """A timing cache that cannot be locked, read or merged."""


class LedgerError(TrtDeployError):
    """A ledger that cannot be read, or a stage that does not belong to it."""


class InputError(TrtDeployError):
    """An inference input that the engine does not accept."""


class InputNameError(InputError):
    """An input that is missing, or a name that the engine does not have."""


class ShapeError(InputError):
    """A shape outside of what the engine accepts."""


class DtypeError(InputError):
    """A data type, or a kind of object, that the engine does not accept."""


class InferenceError(TrtDeployError):
    """The runtime failed while executing a plan."""


class CudaError(InferenceError):
    """A call of CUDA failed."""


class DeviceMemoryError(CudaError):
    """The GPU, or memory that it can read, has not got as many bytes as were asked for."""

    exit_code = 3


class GraphCaptureError(CudaError):
    """Work that cannot be captured as a CUDA graph."""


class EngineBusyError(TrtDeployError):
    """No execution context became free in time."""

    exit_code = 3


class EngineClosedError(TrtDeployError):
    """The engine, or the lease on one of its contexts, has been closed."""


class RuntimeUnavailableError(TrtDeployError):
    """A library, driver or device that was asked for is not on this machine."""

    exit_code = 3


class RepositoryError(TrtDeployError):
    """A model repository that cannot be written, or an entry that already exists."""


class ServerError(TrtDeployError):
    """A Triton server that does not start, does not answer or died."""

    exit_code = 3


class GateError(TrtDeployError):
    """A release gate was not met."""

    exit_code = 1


def invalid_fields(error: ValidationError, *, at_most: int = 3) -> str:
    """Return what pydantic found wrong in one line: the fields, and what is the matter with them."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}" for item in found[:at_most]]
    return "; ".join(shown) + (f"; and {len(found) - at_most} more" if len(found) > at_most else "")
