"""Instance groups, profiles and the rate limiter (``ValidateInstanceGroup``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema


def instance_findings(config: Any, gpus: int) -> Iterator[Finding]:
    """Check where instances run."""
    group_type = schema().ModelInstanceGroup
    on_tensorrt = "tensorrt" in (config.backend, config.platform.removesuffix("_plan"))
    names: set[str] = set()
    for index, group in enumerate(config.instance_group):
        where = f"instance_group[{index}]"
        if group.count < 0:
            yield Finding(f"{where}.count", f"{group.count} is negative.", "Give 1 or more.")
        if group.name and group.name in names:
            yield Finding(f"{where}.name", f"{group.name!r} is there twice.", "Leave the names out.")
        names.add(group.name)
        if group.kind in (group_type.KIND_CPU, group_type.KIND_MODEL) and group.gpus:
            yield Finding(f"{where}.gpus", f"{group_type.Kind.Name(group.kind)} has no gpus.", "Leave them out.")
        if group.kind == group_type.KIND_GPU:
            # a plan for GPUs is packaged on machines without one: there, only its own backend says KIND_GPU rightly
            elsewhere = gpus == 0 and on_tensorrt
            if gpus == 0 and not on_tensorrt:
                yield Finding(f"{where}.kind", "KIND_GPU, and there is no GPU.", "Use KIND_CPU, or say how many GPUs.")
            bad = [number for number in group.gpus if number < 0 or (number >= gpus and not elsewhere)]
            if bad:
                yield Finding(f"{where}.gpus", f"there is no GPU {bad}; the server has {gpus}, numbered from 0.")
        if group.kind == group_type.KIND_CPU and on_tensorrt:
            yield Finding(f"{where}.kind", "TensorRT runs on GPUs only.", "Use KIND_GPU.")
        if group.profile and not on_tensorrt:
            yield Finding(f"{where}.profile", "profiles are TensorRT's.", "Leave it out.")
        elif bad_profiles := [name for name in group.profile if not re.fullmatch(r"\d{1,9}", name)]:
            yield Finding(f"{where}.profile", f"{bad_profiles} are no profile numbers.", 'Write them as "0".')
        for number, resource in enumerate(group.rate_limiter.resources):
            if not resource.name or resource.count == 0:
                yield Finding(
                    f"{where}.rate_limiter.resources[{number}]", "a resource needs a name and a count above 0."
                )
        for number, device in enumerate(group.secondary_devices):
            if not on_tensorrt or device.device_id < 0:
                yield Finding(f"{where}.secondary_devices[{number}]", "TensorRT's DLA cores only, numbered from 0.")
        resources = [(resource.name) for resource in group.rate_limiter.resources]
        if len(set(resources)) != len(resources):
            yield Finding(f"{where}.rate_limiter.resources", "a resource is there twice.", "Add their counts.")
    kinds: dict[str, bool] = {}
    for index, group in enumerate(config.instance_group):
        for resource in group.rate_limiter.resources:
            shared = bool(getattr(resource, "global"))
            if kinds.setdefault(resource.name, shared) != shared:
                yield Finding(
                    f"instance_group[{index}].rate_limiter", f"{resource.name!r} is global in one place only."
                )
