"""What a caller may ask of a build and of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtdeploy.errors import UsageError, invalid_fields
from trtdeploy.tensors import ShapeRange
from trtdeploy.yaml_options import read_yaml

RuntimeName = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]


CacheMode = Literal["update", "read-only", "verify"]


def _tensorrt_only(default: Any, **limits: Any) -> Any:
    """Return a field that only TensorRT and TensorRT-RTX know."""
    return Field(default=default, json_schema_extra={"runtime": "tensorrt"}, **limits)


def _onnxruntime_only(default: Any, **limits: Any) -> Any:
    """Return a field that only ONNX Runtime knows."""
    return Field(default=default, json_schema_extra={"runtime": "onnxruntime"}, **limits)


class BuildConfig(BaseModel):
    """Options of a build; unknown keys are refused, and so is an option that the chosen runtime cannot honour.

    Attributes:
        runtime: Which library builds the plan and will run it; "auto" takes the best one of this machine.
        profiles: Shape ranges per input, by name. Without any, ONNX Runtime accepts every shape that the model allows;
            TensorRT gets one profile for batches of 1 to 32 if nothing but the batch is dynamic.
        timing_cache: File that keeps measured timings between builds, or a folder with one such file per machine.
        timing_cache_mode: "update" reads and extends it; "read-only" only reads it; "verify" fails where the cache
            lacks a timing, so that the same tactics are chosen or none.
        precision: "explicit" demands INT8 Q/DQ in the model; "auto" takes the model as it is, FP8 and INT4 as well.
        ranges: Dynamic ranges per tensor, JSON or TensorRT's calibration-cache text: the model gets Q/DQ from them.
        implicit: Hand the ranges to TensorRT <= 10 as such (deprecated there) in place of Q/DQ.
        high_precision: What is not quantized runs in this type; strong typing takes it from the model, so the model is
            cast.
        isolate: Build in a process of its own: a crash of the builder, or memory that it leaks, stays there.
        threads: Threads of one inference; None measures one thread and all cores and keeps the faster.
        timing_rounds: How often each candidate is timed; the median counts.
        workspace_bytes: Limit of the scratch memory of one kernel; None leaves TensorRT's default, all there is.
        optimization_level: 0 (fast build) to 5 (fast plan); TensorRT's default is 3.
        timing_iterations: How often TensorRT times each tactic.
        auxiliary_streams: How many streams a plan may use beside its own; 0 keeps it on one.
        hardware_compatibility: Let the plan run on other GPUs: "ampere+", or "same-compute-capability".
        version_compatible: Let later versions of TensorRT load the plan; it then holds host code.
        exclude_lean_runtime: Leave the lean runtime out of a version-compatible plan.
        refit: Which weights may be replaced later: "all", "identical" or "individual".
        strip_weights: Leave the weights out; refit puts them back.
        weight_streaming: Let weights stay in host memory.
        sparsity: Look for kernels for 2:4 sparse weights.
        tf32: Allow TF32 in float layers; on by default, as in TensorRT.
        plugins: Plugin libraries to load before parsing. They are native code: load only what you trust.
        profiling_verbosity: What the engine inspector can tell later; "detailed" is needed to prove precision.
        compute_capabilities: Targets of TensorRT-RTX, such as "8.9", or only "current"; its default is all it supports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeName = "auto"
    profiles: tuple[dict[str, ShapeRange], ...] = ()
    timing_cache: Path | None = None
    timing_cache_mode: CacheMode = "update"
    precision: Literal["auto", "explicit"] = "auto"
    ranges: Path | None = None
    implicit: bool = _tensorrt_only(False)
    high_precision: Literal["fp32", "fp16", "bf16"] = _tensorrt_only("fp32")
    isolate: bool = False
    threads: int | None = _onnxruntime_only(None, ge=1)
    timing_rounds: int = _onnxruntime_only(20, ge=1)
    workspace_bytes: int | None = _tensorrt_only(None, ge=1)
    optimization_level: int | None = _tensorrt_only(None, ge=0, le=5)
    timing_iterations: int | None = _tensorrt_only(None, ge=1)
    auxiliary_streams: int | None = _tensorrt_only(None, ge=0)
    hardware_compatibility: Literal["none", "ampere+", "same-compute-capability"] = _tensorrt_only("none")
    version_compatible: bool = _tensorrt_only(False)
    exclude_lean_runtime: bool = _tensorrt_only(False)
    refit: Literal["none", "all", "identical", "individual"] = _tensorrt_only("none")
    strip_weights: bool = _tensorrt_only(False)
    weight_streaming: bool = _tensorrt_only(False)
    sparsity: bool = _tensorrt_only(False)
    tf32: bool = _tensorrt_only(True)
    plugins: tuple[Path, ...] = _tensorrt_only(())
    profiling_verbosity: Literal["detailed", "layer-names", "none"] = _tensorrt_only("detailed")
    compute_capabilities: tuple[str, ...] = _tensorrt_only(())

    @model_validator(mode="after")
    def _consistent(self) -> BuildConfig:
        if self.implicit and self.ranges is None:
            raise ValueError("implicit needs ranges")
        if self.exclude_lean_runtime and not self.version_compatible:
            raise ValueError("exclude_lean_runtime needs version_compatible")
        if self.timing_cache_mode != "update" and self.timing_cache is None:
            raise ValueError(f"timing_cache_mode {self.timing_cache_mode!r} needs timing_cache")
        if self.precision == "explicit" and self.implicit:
            raise ValueError("implicit contradicts precision 'explicit'")
        return self

    def refuse_options_of(self, other: Literal["tensorrt", "onnxruntime"], *, runtime: str) -> None:
        """Refuse options that ``runtime`` cannot honour, because only ``other`` knows them.

        Raises:
            UsageError: One of them is not at its default.
        """
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("runtime") == other and getattr(self, name) != field.default:
                raise UsageError(
                    f"The option {name.replace('_', '-')} means nothing to {runtime}: only "
                    f"{'TensorRT' if other == 'tensorrt' else 'ONNX Runtime'} has it.",
                    hint=f"Leave it out, or choose another --runtime than {runtime}.",
                )

    @classmethod
    def from_yaml(cls, path: str | Path) -> BuildConfig:
        """Read a YAML (or JSON) file with the attributes of this class.

        Raises:
            UsageError: The file cannot be read, is not YAML, or has unknown or impossible values.
        """
        content = read_yaml(path, example="isolate: true")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(f"The build configuration {path} is not valid: {invalid_fields(error)}.") from error


class LoadOptions(BaseModel):
    """How a plan is loaded; what the plan's runtime cannot honour is refused.

    Attributes:
        threads: Threads of one inference, on a CPU; None takes what the build measured as fastest.
        device: Ordinal of the GPU.
        host_code_allowed: Accept plans that hold host code (version-compatible ones). Such a plan is a program: allow
            it only for plans that you have built yourself.
        plugins: Plugin libraries that the plan refers to. They are native code: load only what you trust.
        activations: "own" gives each context its scratch memory; "shared" lets all contexts use one, and computes one
            inference at a time while the copies of others go on.
        cuda_graphs: How many CUDA graphs each context keeps, one per shape; 0 captures none.
        weight_streaming_bytes: Weights that stay on the GPU if the plan was built with weight streaming; None means
            all.
        runtime_cache: File that keeps the kernels which TensorRT-RTX compiles at run time.
        kernel_specialization: When TensorRT-RTX compiles kernels for a new shape: "lazy" in the background, "eager"
            before the first inference, "none" never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int | None = Field(default=None, ge=1)
    device: int = Field(default=0, ge=0)
    host_code_allowed: bool = False
    plugins: tuple[Path, ...] = ()
    activations: Literal["own", "shared"] = "own"
    cuda_graphs: int = Field(default=8, ge=0)
    weight_streaming_bytes: int | None = Field(default=None, ge=0)
    runtime_cache: Path | None = None
    kernel_specialization: Literal["lazy", "eager", "none"] = "lazy"
