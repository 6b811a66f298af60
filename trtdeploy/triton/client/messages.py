"""Requests and replies, the same for every protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtdeploy.errors import ShapeError
from trtdeploy.tensors import Array, TensorSpec, dtype_to_triton

BYTES = "BYTES"
LARGEST_MESSAGE_BYTES = 2**31 - 1
"""What gRPC and protobuf carry in one message (protobuf.dev, "Proto Limits"). Over HTTP a Triton without
``--http-max-input-size`` would take any request into its memory before it looks at it."""


@dataclass(frozen=True)
class Region:
    """A part of a registered region of shared memory."""

    name: str
    byte_size: int
    offset: int


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        model: Model name.
        version: Its version; the server's choice if empty.
        inputs: Arrays by name; of BYTES tensors, arrays of objects.
        outputs: The outputs that are wanted.
        regions: Where in shared memory the inputs lie, and the outputs shall be put, by tensor name; the others travel
            with the messages.
    """

    model: str
    version: str
    inputs: Mapping[str, Array]
    outputs: tuple[TensorSpec, ...]
    regions: Mapping[str, Region] = field(default_factory=dict)

    def for_client(self, module: Any) -> tuple[list[Any], list[Any]]:
        """Return the inputs and the wanted outputs as objects of ``tritonclient.grpc`` or ``tritonclient.http``.

        Raises:
            ShapeError: The inputs are larger than a message may be.
        """
        self._check_size()
        inputs, outputs = [], []
        for name, array in self.inputs.items():
            tensor = module.InferInput(name, list(array.shape), triton_dtype(array))
            region = self.regions.get(name)
            if region is None:
                tensor.set_data_from_numpy(np.ascontiguousarray(array))
            else:
                tensor.set_shared_memory(region.name, region.byte_size, region.offset)
            inputs.append(tensor)
        for spec in self.outputs:
            wanted = module.InferRequestedOutput(spec.name)
            region = self.regions.get(spec.name)
            if region is not None:
                wanted.set_shared_memory(region.name, region.byte_size, region.offset)
            outputs.append(wanted)
        return inputs, outputs

    def as_protobuf(self, *, request_id: str, timeout_us: int | None) -> Any:
        """Return the ``ModelInferRequest`` of the KServe protocol.

        Raises:
            ShapeError: The inputs are larger than a message may be.
        """
        from tritonclient.grpc import service_pb2

        self._check_size()
        message = service_pb2.ModelInferRequest(model_name=self.model, model_version=self.version, id=request_id)
        if timeout_us is not None:
            message.parameters["timeout"].int64_param = timeout_us
        for name, array in self.inputs.items():
            tensor = message.inputs.add(name=name, datatype=triton_dtype(array), shape=array.shape)
            region = self.regions.get(name)
            if region is None:
                message.raw_input_contents.append(raw_content(array))
            else:
                _point(tensor, region)
        for spec in self.outputs:
            wanted = message.outputs.add(name=spec.name)
            if spec.name in self.regions:
                _point(wanted, self.regions[spec.name])
        return message

    def _check_size(self) -> None:
        """Refuse what no server takes before it is copied, let alone sent."""
        inline = {name: _byte_size(array) for name, array in self.inputs.items() if name not in self.regions}
        total = sum(inline.values())
        if total > LARGEST_MESSAGE_BYTES:
            largest = max(inline, key=lambda name: inline[name])
            raise ShapeError(
                f"A request to {self.model} with {total / 2**30:.1f} GiB is too large: a message carries less than "
                f"2 GiB. The input {largest!r} has the shape {list(self.inputs[largest].shape)}.",
                hint="Send fewer samples in a request.",
            )


def _byte_size(array: Array) -> int:
    if array.dtype != np.object_:
        return int(array.nbytes)
    return sum(len(element) + 4 for element in array.flat)  # after its length, each


def _point(tensor: Any, region: Region) -> None:
    tensor.parameters["shared_memory_region"].string_param = region.name
    tensor.parameters["shared_memory_byte_size"].int64_param = region.byte_size
    tensor.parameters["shared_memory_offset"].int64_param = region.offset


@dataclass(frozen=True)
class Reply:
    """The answer to one request: outputs by name, and the version that the server says has made them."""

    version: str
    outputs: dict[str, Array]


def read_reply(request: Request, answer: Any) -> Reply:
    """Read an ``InferResult``; outputs in shared memory are left out.

    Raises:
        ValueError: It lacks an output.
    """
    inline = [spec.name for spec in request.outputs if spec.name not in request.regions]
    outputs = {name: answer.as_numpy(name) for name in inline}
    missing = [name for name, array in outputs.items() if array is None]
    if missing:
        raise ValueError(f"the answer lacks the outputs {missing}")
    response = answer.get_response()
    version = response["model_version"] if isinstance(response, dict) else response.model_version
    return Reply(str(version), outputs)


def output_shape(answer: Any, name: str) -> tuple[int, ...]:
    """Return the shape of an output of an ``InferResult``.

    Raises:
        ValueError: The answer lacks it.
    """
    output = answer.get_output(name)
    if output is None:
        raise ValueError(f"the answer lacks the output {name!r}")
    return tuple(int(size) for size in (output["shape"] if isinstance(output, dict) else output.shape))


def triton_dtype(array: Array) -> str:
    """Return Triton's name of an array's data type; objects are BYTES."""
    return BYTES if array.dtype == np.object_ else dtype_to_triton(array.dtype.name)


def raw_content(array: Array) -> bytes:
    """Return an array as the protocol's raw bytes: little-endian, row by row; BYTES elements after their length."""
    if array.dtype != np.object_:
        return np.ascontiguousarray(array).tobytes()
    from tritonclient.utils import serialize_byte_tensor

    serialized = serialize_byte_tensor(array)
    content: bytes = serialized.item() if serialized.size else b""
    return content
