"""A plan on disk: the runtime's own bytes, untouched, and beside them ``<plan>.json``, the manifest.

The manifest is checked before any byte of the plan reaches a deserializer: plans are code, and a runtime's own checks
run after it has begun to read them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import PlanCorruptError, PlanIncompatibleError, ShapeError, TrtDeployError, invalid_fields
from trtdeploy.file_format import FileFormat
from trtdeploy.files import atomic_write, atomic_writer, sha256_bytes
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.tensors import DYNAMIC, ShapeRange, TensorSpec, ValueRange


class RuntimeFacts(FrozenModel):
    """The library that built the plan and the only one that may load it."""

    name: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    version: str


class DeviceFacts(FrozenModel):
    """What the plan was built for.

    Attributes:
        kind: "cpu" or "gpu".
        name: Model name of the processor.
        capability: A GPU's compute capability ("8.9"), or the instruction sets of a CPU that the plan depends on.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    capability: str


class LayerPrecision(FrozenModel):
    """One layer with constant weights.

    Attributes:
        macs: Its multiply-accumulates at the best served shapes.
        quantized: Whether its input and weights both pass through Q/DQ, or have dynamic ranges.
        asked_for: The type that the model asks for: "int8", "fp8", "int4 weight-only" ...; None for float.
        runs_in: The type that it was shown to run in, "float32" among them; None where nothing shows it.
        left_float: Why nothing but float is asked of it, in a network of which other layers are.
    """

    macs: int
    quantized: bool
    asked_for: str | None = None
    runs_in: str | None = None
    left_float: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_once_written(cls, data: Any) -> Any:
        # manifests had no types while INT8 was the only one
        if isinstance(data, dict) and "asked_for" not in data and data.get("quantized") is True:
            return {**data, "asked_for": "int8"}
        return data


class PrecisionFacts(FrozenModel):
    """What the layers of a network are asked to compute in, what they are shown to run in, and what is not known.

    Attributes:
        weighted_layers: Convolutions and matrix products with constant weights.
        quantized_layers: Those among them whose input and weights both pass through Q/DQ.
        integer_kernels: Kernels of the plan that compute in integers; None where the runtime does not say.
        asked_for: Percent of the multiply-accumulates that the model asks for in each type; the rest is float.
        runs_in: Percent of the multiply-accumulates that was shown to run in each type.
        unknown_percent: Percent of the multiply-accumulates that nothing shows; None where none were counted.
        evidence: Where that comes from: "engine inspector", "kernel names" (what the plan lists), "parsed network"
            (which shows nothing of the plan) or "optimized graph".
        reformats: Layers that only convert data between types and layouts.
        fallbacks: Quantized layers that are shown not to run in their type, and why.
        unknown: Layers that nothing shows the type of, and why.
        layers: The layers with constant weights by ONNX node name, where they were looked at one by one.
        note: How the numbers were found, and what they do not say.
    """

    weighted_layers: int
    quantized_layers: int
    integer_kernels: int | None
    asked_for: dict[str, float] = Field(default_factory=dict)
    runs_in: dict[str, float] = Field(default_factory=dict)
    unknown_percent: float | None = None
    evidence: Literal["engine inspector", "kernel names", "parsed network", "optimized graph"] = "optimized graph"
    reformats: tuple[str, ...] = ()
    fallbacks: dict[str, str] = Field(default_factory=dict)
    unknown: dict[str, str] = Field(default_factory=dict)
    layers: dict[str, LayerPrecision] = Field(default_factory=dict)
    note: str

    @model_validator(mode="before")
    @classmethod
    def _as_once_written(cls, data: Any) -> Any:
        # One share stood for what was asked for or for what runs, depending on the evidence.
        if not isinstance(data, dict) or "int8_macs_percent" not in data:
            return data
        facts = dict(data)
        share = facts.pop("int8_macs_percent")
        if share is not None and facts.get("evidence") == "engine inspector":
            return {"runs_in": {"int8": share}, "unknown_percent": round(100 - share, 2), **facts}
        return facts if share is None else {"asked_for": {"int8": share}, "unknown_percent": 100.0, **facts}

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LayerPrecision],
        *,
        evidence: Literal["engine inspector", "kernel names", "parsed network", "optimized graph"],
        note: str,
        integer_kernels: int | None = None,
        reformats: tuple[str, ...] = (),
        fallbacks: Mapping[str, str] | None = None,
        unknown: Mapping[str, str] | None = None,
    ) -> PrecisionFacts:
        """Return the facts of these layers with their sums."""
        total = sum(layer.macs for layer in layers.values())
        asked: Counter[str] = Counter()
        shown: Counter[str] = Counter()
        for layer in layers.values():
            asked[layer.asked_for or ""] += layer.macs
            shown[layer.runs_in or ""] += layer.macs
        return cls(
            weighted_layers=len(layers),
            quantized_layers=sum(layer.quantized for layer in layers.values()),
            integer_kernels=integer_kernels,
            asked_for={kind: _percent(macs, total) for kind, macs in asked.items() if kind and total},
            runs_in={kind: _percent(macs, total) for kind, macs in shown.items() if kind and total},
            unknown_percent=_percent(shown[""], total) if total else None,
            evidence=evidence,
            reformats=reformats,
            fallbacks=dict(fallbacks or {}),
            unknown=dict(unknown or {}),
            layers=dict(layers),
            note=note,
        )

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that is asked for or shown."""
        return tuple(dict.fromkeys((*self.asked_for, *self.runs_in)))

    def explained(self, reasons: Mapping[str, str]) -> PrecisionFacts:
        """Return the facts with the reasons why layers are in float that nothing else is asked of, by name."""
        layers = {
            name: layer if layer.asked_for else layer.model_copy(update={"left_float": reasons.get(name)})
            for name, layer in self.layers.items()
        }
        return self.model_copy(update={"layers": layers})

    @property
    def shares(self) -> str:
        """What is asked for, shown and not known, in percent of the multiply-accumulates, for people."""
        if self.unknown_percent is None:
            return ""
        asked = _in_words(self.asked_for) or "nothing but float"
        shown = f"shown by the {self.evidence}: {_in_words(self.runs_in)}" if self.runs_in else "shown: nothing"
        return f"MACs asked for: {asked}; {shown}; unknown: {self.unknown_percent:.1f}%"

    @property
    def int8_macs_percent(self) -> float | None:
        """Percent of the multiply-accumulates that was shown to run in INT8; None where nothing was shown."""
        return self.runs_in.get("int8", 0.0) if self.runs_in else None


def _percent(part: int, total: int) -> float:
    return round(100 * part / total, 2)


def _in_words(percent: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1f}% {kind}" for kind, share in percent.items())


class SourceFacts(FrozenModel):
    """The ONNX file that the plan was built from."""

    file: str
    sha256: str


UNKNOWN = "unknown"
"""Stands in a manifest that was made for a plan without one, for what nobody can tell."""


class TacticFacts(FrozenModel):
    """The implementation that was chosen and what else was measured.

    Attributes:
        name: The winner.
        threads: Threads per inference that it was measured with.
        milliseconds: Median latency of every candidate.
        rejected: Candidates that were not eligible, and why.
        cached: Whether the timings come from the timing cache.
        shapes: The shape of every input that it was measured and checked on.
        inputs: Where the values of these came from.
    """

    name: str
    threads: int
    milliseconds: dict[str, float]
    rejected: dict[str, str] = Field(default_factory=dict)
    cached: bool = False
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    inputs: str = UNKNOWN

    def threads_each(self, sharers: int) -> int:
        """Return the threads of one inference where so many run at the same time."""
        return max(1, self.threads // sharers)


class Manifest(FileFormat):
    """Everything that is known about a plan.

    Attributes:
        profiles: The shapes that each optimization profile covers, by input.
        profile_values: The values that the same profiles cover, by shape tensor; none where there are no such inputs.
    """

    TITLE: ClassVar[str] = "a manifest"
    ERROR: ClassVar[type[TrtDeployError]] = PlanIncompatibleError
    EXACT: ClassVar[tuple[str, ...]] = ("preprocessing",)

    format: Literal[1] = 1
    minor: int = Field(default=1, ge=0)
    trtdeploy_version: str
    created_at: str
    runtime: RuntimeFacts
    device: DeviceFacts
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, ShapeRange], ...] = ()
    profile_values: tuple[dict[str, ValueRange], ...] = ()
    precision: PrecisionFacts
    tactic: TacticFacts | None = None
    plan_bytes: int
    plan_sha256: str
    onnx: SourceFacts
    build_config: dict[str, Any]
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    calibration: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_for_one(self) -> Manifest:
        if self.profile_values and len(self.profile_values) != len(self.profiles):
            raise ValueError(f"{len(self.profiles)} profiles have {len(self.profile_values)} profile_values")
        return self

    @property
    def ranges(self) -> tuple[dict[str, ShapeRange | ValueRange], ...]:
        """What each profile covers, to be shown: shapes and values together, as a build is given them."""
        values = self.profile_values or ({},) * len(self.profiles)
        return tuple({**shapes, **held} for shapes, held in zip(self.profiles, values, strict=True))

    @property
    def best_served(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the first profile serves best, or else those that the build measured, by input."""
        measured = self.tactic.shapes if self.tactic is not None else {}
        return {**measured, **{name: each.opt for profile in self.profiles[:1] for name, each in profile.items()}}

    def shapes_of_batch(self, batch: int) -> dict[str, list[int]]:
        """Return input shapes with this batch; other dynamic dimensions are those that are best served, else 1.

        Raises:
            ShapeError: An input has another fixed first dimension.
        """
        shapes = {}
        for spec in self.inputs:
            if not spec.shape or spec.shape[0] not in (DYNAMIC, batch):
                raise ShapeError(f"Input {spec} has a fixed first dimension; batch {batch} is not possible.")
            usual = self.best_served.get(spec.name) or [1 if size == DYNAMIC else size for size in spec.shape]
            shapes[spec.name] = [batch, *usual[1:]]
        return shapes

    def to_json(self) -> str:
        """Return the manifest as it is written to disk."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def manifest_of_unknown_plan(
    content: bytes,
    *,
    runtime: RuntimeFacts,
    device: DeviceFacts,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    profiles: tuple[dict[str, ShapeRange], ...] = (),
    profile_values: tuple[dict[str, ValueRange], ...] = (),
) -> Manifest:
    """Return a manifest for a plan that has none: what its runtime reads from it, and "unknown" for the rest."""
    return Manifest(
        trtdeploy_version=UNKNOWN,
        created_at=UNKNOWN,
        runtime=runtime,
        device=device,
        inputs=inputs,
        outputs=outputs,
        profiles=profiles,
        profile_values=profile_values,
        precision=PrecisionFacts(
            weighted_layers=0, quantized_layers=0, integer_kernels=None, note="Not known: the plan has no manifest."
        ),
        plan_bytes=len(content),
        plan_sha256=sha256_bytes(content),
        onnx=SourceFacts(file=UNKNOWN, sha256=UNKNOWN),
        build_config={},
    )


@dataclass(frozen=True)
class Plan:
    """A plan file and its manifest."""

    path: Path
    manifest: Manifest


def manifest_path(plan: str | Path) -> Path:
    """Return where the manifest of a plan lies: ``b0.plan`` has ``b0.plan.json``."""
    path = Path(plan)
    return path.with_name(path.name + ".json")


def is_manifest(content: bytes) -> bool:
    """Say whether a file is a manifest, of any version and also a damaged one; an empty one may be."""
    return not content.strip() or b'"trtdeploy_version"' in content


def write_plan(path: str | Path, content: bytes, manifest: Manifest) -> Plan:
    """Write a plan and its manifest; on an error, a full disk for example, both files are as they were.

    A kill between the two renames leaves a manifest that does not match its plan, which loading reports.
    """
    target = Path(path)
    with atomic_writer(manifest_path(target)) as stream:
        stream.write(manifest.to_json().encode())
        # on disk before the plan gets its name: nothing after that needs space
        stream.flush()
        os.fsync(stream.fileno())
        atomic_write(target, content)
    return Plan(target, manifest)


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a plan without opening the plan.

    Raises:
        PlanCorruptError: It is missing or damaged.
        PlanIncompatibleError: A newer trtdeploy wrote it, in a format that this one does not read.
    """
    source = manifest_path(path)
    if not Path(path).is_file():
        raise PlanCorruptError(f"There is no plan at {path}.", hint="Build one: trtdeploy build MODEL.onnx -o PLAN")
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanCorruptError(
            f"The plan {path} has no readable manifest {source.name} beside it: {error}.",
            hint="Copy the manifest together with the plan, or build the plan again. One that you have built with "
            "other tools loads by Engine.load(PLAN, without_manifest=RUNTIME).",
        ) from error
    try:
        return Manifest.read(text, source)
    except ValidationError as error:
        raise PlanCorruptError(
            f"{source} is not a manifest of this version ({invalid_fields(error)}).", hint="Build the plan again."
        ) from error


def read_plan_bytes(path: str | Path) -> bytes:
    """Read a plan, whatever its manifest says.

    Raises:
        PlanCorruptError: It cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PlanCorruptError(f"The plan {path} cannot be read: {error}.") from error


def read_plan(path: str | Path) -> tuple[bytes, Manifest]:
    """Read a plan whose bytes match its manifest.

    Raises:
        PlanCorruptError: The plan or manifest is missing, or their sizes or digests differ.
    """
    manifest = read_manifest(path)
    content = read_plan_bytes(path)
    if len(content) != manifest.plan_bytes or sha256_bytes(content) != manifest.plan_sha256:
        raise PlanCorruptError(
            f"The plan {path} is not the one that its manifest describes: {len(content)} bytes with SHA-256 "
            f"{sha256_bytes(content)[:16]}..., expected {manifest.plan_bytes} bytes with "
            f"{manifest.plan_sha256[:16]}...",
            hint="It is truncated, changed or mixed up with another one; build or copy both files again.",
        )
    return content, manifest
