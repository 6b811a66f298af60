"""A context that one caller has for itself for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from trtdeploy.engine.arrays import as_arrays
from trtdeploy.errors import DtypeError, EngineClosedError, InputError, InputNameError, ShapeError
from trtdeploy.runtimes.base import ExecutionContext
from trtdeploy.tensors import Array, Profile, ProfileValues, TensorSpec, check_inputs


class Lease:
    """Exclusive use of one execution context: own output buffers, no pool in between.

    One thread at a time may use it. It ends with the ``with`` block of ``Engine.lease``.

    Attributes:
        inputs: What the plan takes.
        outputs: What it gives.
    """

    def __init__(
        self,
        context: ExecutionContext,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        profile_values: Sequence[ProfileValues],
        import_array: Callable[[str, Any], Any],
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._profiles = profiles
        self._profile_values = profile_values
        self._import_array = import_array
        self._context: ExecutionContext | None = context

    def execute(self, inputs: Mapping[str, Any], *, outputs: Literal["host", "device"] = "host") -> dict[str, Any]:
        """Run once; the outputs are new arrays.

        Args:
            inputs: Arrays by name, on the host or on the engine's GPU.
            outputs: "host" gives numpy arrays, "device" leaves them on the GPU; see ``Engine.infer``.

        Raises:
            InputError: An input has the wrong name, type, dtype or shape.
            InferenceError: The runtime failed.
            EngineClosedError: The lease has ended.
        """
        context = self._live_context()
        arrays = self._check(inputs)
        return context.execute_on_device(arrays) if outputs == "device" else context.execute(arrays)

    def execute_into(self, inputs: Mapping[str, Any], outputs: Mapping[str, Array]) -> None:
        """Run once and write every output into an array of the caller: nothing is allocated or copied.

        Args:
            inputs: Input arrays by name.
            outputs: A writable, C-contiguous array for every output, of its dtype and of the shape that these inputs
                lead to.

        Raises:
            InputError: An array has the wrong name, type, dtype or shape.
            InferenceError: The runtime failed, or an output's shape is not the one that the inputs lead to.
            EngineClosedError: The lease has ended.
        """
        context = self._live_context()
        arrays = self._check(inputs)
        if set(outputs) != {spec.name for spec in self.outputs}:
            raise InputNameError(
                f"Output arrays {sorted(outputs)} were given; this engine gives {sorted(s.name for s in self.outputs)}."
            )
        for spec in self.outputs:
            array = outputs[spec.name]
            if not isinstance(array, np.ndarray):
                raise DtypeError(f"Output {spec.name!r} is a {type(array).__name__}; a numpy array is needed.")
            if array.dtype != np.dtype(spec.dtype):
                raise DtypeError(f"Output array {spec.name!r} has dtype {array.dtype}; the engine gives {spec.dtype}.")
            if not array.flags.c_contiguous or not array.flags.writeable:
                raise ShapeError(f"Output array {spec.name!r} must be C-contiguous and writable.")
            given = [(f"input {name!r}", other) for name, other in arrays.items()]
            given += [(f"output {name!r}", other) for name, other in outputs.items() if name != spec.name]
            for what, other in given:
                if np.may_share_memory(array, other):  # exact, as all are contiguous
                    raise InputError(f"Output array {spec.name!r} overlaps {what}; each needs memory of its own.")
        context.execute_into(arrays, outputs)

    def end(self) -> None:
        """Take the context away from the lease; its pool gets it back at the end of the ``with`` block."""
        self._context = None

    def _check(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        arrays = as_arrays(inputs, self._import_array)
        return check_inputs(arrays, self.inputs, self._profiles, self._profile_values)

    def _live_context(self) -> ExecutionContext:
        if self._context is None:
            raise EngineClosedError("This lease has ended.", hint="Use it inside of its with block.")
        return self._context
