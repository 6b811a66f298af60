"""What a caller may ask of a build and of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtdeploy.errors import UsageError
from trtdeploy.tensors import ShapeRange

RuntimeName = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]


class BuildConfig(BaseModel):
    """Options of a build; unknown keys are refused.

    Attributes:
        runtime: Which library builds the plan and will run it; "auto" takes the best one of this machine.
        profiles: Shape ranges per input, by name. Without any, every shape that the model allows is accepted, and
            dynamic dimensions count as 1 where one size has to be chosen for timing.
        timing_cache: File that keeps measured timings between builds.
        threads: Threads of one inference; None measures one thread and all cores and keeps the faster. CPU only.
        timing_rounds: How often each candidate is timed; the median counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeName = "auto"
    profiles: tuple[dict[str, ShapeRange], ...] = ()
    timing_cache: Path | None = None
    threads: int | None = Field(default=None, ge=1)
    timing_rounds: int = Field(default=20, ge=1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> BuildConfig:
        """Read a YAML (or JSON) file with the attributes of this class.

        Raises:
            UsageError: The file cannot be read, is not YAML, or has unknown or impossible values.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"The build configuration {path} cannot be read: {error}") from error
        try:
            return cls.model_validate({} if content is None else content)
        except ValidationError as error:
            raise UsageError(f"The build configuration {path} is not valid: {error}") from error
