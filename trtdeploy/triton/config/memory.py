"""How much device memory a served plan will take, as far as its files say."""

from __future__ import annotations

from dataclasses import dataclass

from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC
from trtdeploy.triton.config.options import PackageOptions


@dataclass(frozen=True)
class DeviceMemory:
    """Predicted memory of the engines on each GPU.

    Attributes:
        engine_bytes: One copy: the plan's size, for its weights are nearly all of it.
        copies: How many copies lie on one GPU.
        total_bytes: All of them; activations of each context come on top.
        reason: Why there are so many.
    """

    engine_bytes: int
    copies: int
    total_bytes: int
    reason: str


def predicted_memory(manifest: Manifest, options: PackageOptions) -> DeviceMemory:
    """Return the memory that the engines of a plan take.

    Triton's TensorRT backend shares one engine among the instances of a GPU only if no dimension of an input or output
    is dynamic; else every instance deserializes its own copy (``CreateEngine`` in its ``model_state.cc``). Instances of
    the Python backend are processes, and share nothing.
    """
    dynamic = [spec.name for spec in (*manifest.inputs, *manifest.outputs) if DYNAMIC in spec.shape]
    if manifest.runtime.name != "tensorrt":
        copies, reason = options.instances, "each instance of the Python backend is a process of its own"
    elif dynamic:
        copies, reason = options.instances, f"{', '.join(dynamic)} has a dynamic shape: instances do not share engines"
    else:
        copies, reason = 1, "all shapes are static: the instances of a GPU share one engine"
    return DeviceMemory(manifest.plan_bytes, copies, copies * manifest.plan_bytes, reason)
