"""What a plan without manifest says of itself: made by trtexec, say."""

from __future__ import annotations

import struct

from trtdeploy.cuda.device import Device
from trtdeploy.errors import PlanIncompatibleError
from trtdeploy.plan import DeviceFacts, Manifest, RuntimeFacts, manifest_of_unknown_plan
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.execution.deserialization import deserialize
from trtdeploy.runtimes.tensorrt.execution.io_tensors import engine_profiles, engine_tensors
from trtdeploy.tensors import TensorSpec

_MAGIC = b"ftrt"
_VERSION_AT = 24


def describe_plan(bindings: Bindings, content: bytes, options: LoadOptions, device: Device) -> Manifest:
    """Deserialize a plan and read its inputs, outputs and profiles.

    Raises:
        PlanIncompatibleError: It was built with another version, as its header says.
        PlanCorruptError: The library cannot read it.
    """
    built_with = version_in_header(content)
    if built_with is not None and built_with[:3] != bindings.release[:3] and not options.host_code_allowed:
        raise PlanIncompatibleError(
            f"The plan was built with TensorRT {'.'.join(map(str, built_with))}; {bindings.version} is installed.",
            hint="Build it again, or allow host code if it is a version-compatible plan that you have built yourself.",
        )
    with device.use():
        return _describe(bindings, content, options, device)


def _describe(bindings: Bindings, content: bytes, options: LoadOptions, device: Device) -> Manifest:
    runtime, engine = deserialize(bindings, content, options)
    tensors = engine_tensors(bindings, engine)
    specs = {
        tensor.name: TensorSpec(
            name=tensor.name,
            dtype=tensor.dtype.name,
            shape=tuple(int(size) for size in engine.get_tensor_shape(tensor.name)),
        )
        for tensor in tensors
    }
    profiles = engine_profiles(engine, tensors)
    shapes = tuple(profile.shapes for profile in profiles)
    values = tuple(profile.values for profile in profiles)
    manifest = manifest_of_unknown_plan(
        content,
        runtime=RuntimeFacts(name=bindings.flavour.name, version=bindings.version),
        device=DeviceFacts(kind="gpu", name=device.name, capability=device.capability),
        inputs=tuple(specs[tensor.name] for tensor in tensors if tensor.is_input),
        outputs=tuple(specs[tensor.name] for tensor in tensors if not tensor.is_input),
        profiles=shapes if any(shapes) or any(values) else (),
        profile_values=values if any(values) else (),
    )
    del engine  # before its runtime
    del runtime
    return manifest


def version_in_header(content: bytes) -> tuple[int, ...] | None:
    """Return the version in the header of a TensorRT plan; None for bytes that have no such header.

    As trtexec's --getPlanVersionOnly reads it (TensorRT, samples/common/sampleEngines.cpp): the magic, a zero, and from
    byte 24 on one byte each for major, minor, patch and build.
    """
    if len(content) < _VERSION_AT + 4 or content[:4] != _MAGIC or struct.unpack_from("<I", content, 4)[0] != 0:
        return None
    return tuple(content[_VERSION_AT : _VERSION_AT + 4])
