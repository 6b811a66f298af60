"""A config against the manifests of its plans: what would fail only when a request comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtdeploy.errors import TrtDeployError
from trtdeploy.plan import Manifest, read_manifest
from trtdeploy.tensors import dtype_to_triton
from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.labels import unmatched_labels
from trtdeploy.triton.config.schema import schema


def plan_findings(config: Any, folder: Path) -> Iterator[Finding]:
    """Check every version that carries a manifest."""
    for manifest in sorted(folder.glob("[1-9]*/*.plan.json")):
        try:
            facts = read_manifest(manifest.with_suffix(""))
        except TrtDeployError as error:
            yield Finding(str(manifest), str(error))
            continue
        yield from _against(config, facts, manifest.parent.name)


def _against(config: Any, facts: Manifest, version: str) -> Iterator[Finding]:
    pb = schema()
    for kind, specs in (("input", facts.inputs), ("output", facts.outputs)):
        ours = {spec.name: spec for spec in specs}
        theirs = {tensor.name: tensor for tensor in getattr(config, kind)}
        if set(ours) != set(theirs):
            yield Finding(kind, f"version {version} has {sorted(ours)}; the config says {sorted(theirs)}.")
        for name in sorted(ours.keys() & theirs.keys()):
            spec, tensor = ours[name], theirs[name]
            shape = spec.shape[1:] if config.max_batch_size > 0 else spec.shape
            dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            if tensor.data_type != pb.DataType.Value(f"TYPE_{dtype_to_triton(spec.dtype)}"):
                yield Finding(f"{kind} {name}", f"{pb.DataType.Name(tensor.data_type)}; version {version} has {spec}.")
            if len(dims) != len(shape) or any(
                -1 not in pair and pair[0] != pair[1] for pair in zip(dims, shape, strict=True)
            ):
                yield Finding(f"{kind} {name}", f"dims {dims} do not fit version {version}, which has {spec}.")
    unmatched = unmatched_labels(facts)
    if unmatched is not None:
        scores, labels = unmatched
        yield Finding(
            f"output {facts.outputs[0].name}",
            f"version {version} scores {scores} classes and has {labels} labels.",
            "Build the plan from a model whose ONNX metadata names every class once, in the order of its scores.",
            # one score may stand for two classes; a score without a label is an answer that nobody can name
            severity="error" if labels < scores else "warning",
        )
    largest = max((min(s.max[0] for s in profile.values()) for profile in facts.profiles if profile), default=None)
    if largest is not None and config.max_batch_size > largest:
        yield Finding(
            "max_batch_size",
            f"{config.max_batch_size}; the profiles of version {version} cover {largest}.",
            "Build the plan with a larger --shape, or serve smaller batches.",
        )
    group_type = pb.ModelInstanceGroup
    for index, group in enumerate(config.instance_group):
        if group.kind == group_type.KIND_GPU and facts.device.kind == "cpu":
            yield Finding(f"instance_group[{index}].kind", f"KIND_GPU; version {version} is a plan for a CPU.")
        outside = [name for name in group.profile if name.isdigit() and int(name) >= max(len(facts.profiles), 1)]
        if outside:
            yield Finding(
                f"instance_group[{index}].profile",
                f"version {version} has {len(facts.profiles)} profiles, not {outside}.",
            )
