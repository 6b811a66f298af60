"""One pass of a float model over samples, in ONNX Runtime, with a histogram of every tensor that will be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtdeploy.calibration import AbsHistogram
from trtdeploy.errors import QuantizationError
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array


class Observer:
    """Histograms of |x| of some tensors of a float model, over all the inputs that it is given.

    Args:
        model: The model.
        keys: For each tensor the name of its histogram; tensors that share a scale share one.

    Attributes:
        histograms: By name.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
    """

    def __init__(self, model: onnx.ModelProto, keys: Mapping[str, str]) -> None:
        given = {value.name for value in model.graph.input}
        self._keys = keys
        self._made = [tensor for tensor in keys if tensor not in given]
        self._run = Witness(with_outputs(model, dict.fromkeys(self._made, TensorProto.FLOAT)), self._made)
        self.histograms = {key: AbsHistogram() for key in keys.values()}

    def look(self, inputs: Iterable[Mapping[str, Array]]) -> None:
        """Run the model on batches of inputs and count what it computes.

        Raises:
            QuantizationError: A value is not finite; the message names the tensor.
            InferenceError: ONNX Runtime cannot run the model on the samples.
        """
        for batch in inputs:
            values = {name: array for name, array in batch.items() if name in self._keys}
            values.update(zip(self._made, self._run(batch) if self._made else (), strict=True))
            for tensor, array in values.items():
                try:
                    self.histograms[self._keys[tensor]].add(np.asarray(array, dtype=np.float32))
                except QuantizationError as error:
                    raise QuantizationError(f"Tensor {tensor!r}: {error.message}", hint=error.hint) from error


def with_outputs(model: onnx.ModelProto, tensors: Mapping[str, int]) -> onnx.ModelProto:
    """Return the model with some of its tensors, given with their element types, as outputs in place of its own."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in tensors.items())
    return observed
