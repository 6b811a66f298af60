"""The witness, which computes an ONNX graph as written: numbers are judged by nothing else here.

A runtime may fuse Q/DQ into integer kernels, which on some processors saturate (x86 without VNNI adds pairs of products
in 16 bits), and then a file seems to compute what it does not. So a witness runs every operator of the file by itself,
without any graph optimization; Q/DQ with floats between; and operators on integers that the file has itself, by the
kernels that are exact on every processor (see ``exact_integers``). Plans are measured and served as they were built;
what they are held against comes from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from google.protobuf.message import DecodeError

from trtdeploy.errors import InferenceError, ModelError
from trtdeploy.onnxgraph.exact_integers import exact_integers
from trtdeploy.runtimes.onnxruntime.cpu import usable_cores
from trtdeploy.runtimes.onnxruntime.session import (
    OPTIMIZE_NOTHING,
    RUNTIME_ERRORS,
    first_line,
    make_session,
    tensor_spec,
)
from trtdeploy.tensors import Array, TensorSpec


class Witness:
    """A model in ONNX Runtime, exactly as it is written, on all usable cores.

    Args:
        model: The model, or its bytes.
        outputs: Names of the outputs to return, in this order; all if None.
        name: What messages call the model.

    Attributes:
        outputs: The names of what is returned.

    Raises:
        ModelError: ONNX Runtime does not accept the model, or it is larger than one file can be.
    """

    def __init__(
        self, model: onnx.ModelProto | bytes, outputs: Sequence[str] | None = None, *, name: str = "the model"
    ) -> None:
        self._name = name
        try:
            parsed = onnx.load_model_from_string(model) if isinstance(model, bytes) else model
            self._session = make_session(
                serialized(exact_integers(parsed)), threads=usable_cores(), optimization=OPTIMIZE_NOTHING
            )
        except (*RUNTIME_ERRORS, DecodeError) as error:
            raise ModelError(f"ONNX Runtime does not accept {name}: {first_line(error)}") from error
        self.outputs = list(outputs) if outputs is not None else [made.name for made in self._session.get_outputs()]

    @property
    def inputs(self) -> list[TensorSpec]:
        """What the model takes."""
        return [tensor_spec(value) for value in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs.

        Raises:
            InferenceError: ONNX Runtime fails on the inputs.
        """
        try:
            answers: list[Array] = self._session.run(self.outputs, dict(inputs))
        except RUNTIME_ERRORS as error:
            raise InferenceError(f"ONNX Runtime failed on {self._name}: {first_line(error)}") from error
        return answers


def serialized(model: onnx.ModelProto) -> bytes:
    """Return a model as bytes.

    Raises:
        ModelError: It is larger than protobuf's 2 GiB.
    """
    try:
        content: bytes = model.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, or ValueError, depending on its implementation
        raise ModelError(
            f"The model does not fit into one ONNX file of at most 2 GiB ({error}).",
            hint="Quantize it in parts, or quantize the checkpoint with: trtdeploy train calibrate",
        ) from error
    return content
