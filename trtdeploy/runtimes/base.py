"""The contract between the engine and a runtime.

A runtime turns an ONNX model into plan bytes, and plan bytes into a loaded engine, which makes execution contexts. What
is above (``trtdeploy.building.build``, ``trtdeploy.engine``) knows nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtdeploy.errors import InferenceError, UsageError
from trtdeploy.plan import DeviceFacts, Manifest, PrecisionFacts, TacticFacts
from trtdeploy.runtimes.config import BuildConfig, LoadOptions
from trtdeploy.tensors import Array, ShapeRange, ValueRange

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.reading.source import SourceModel
    from trtdeploy.runtimes.trial_inputs import RealInputs

BuildProgress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps in all)."""


@dataclass(frozen=True)
class BuiltPlan:
    """What a build hands back: the runtime's own bytes, and facts for the manifest.

    Attributes:
        content: The plan.
        device: What it was built for.
        precision: What of it runs in INT8.
        tactic: The implementation that was measured as fastest, where the runtime says so.
        profiles: The shape ranges that it covers; none where it accepts whatever the model does.
        profile_values: The same profiles' ranges of the values of shape tensors; none where there are no such inputs.
    """

    content: bytes
    device: DeviceFacts
    precision: PrecisionFacts
    tactic: TacticFacts | None
    profiles: tuple[dict[str, ShapeRange], ...]
    profile_values: tuple[dict[str, ValueRange], ...] = ()


class Pending(ABC):
    """An inference that has been started."""

    @abstractmethod
    def wait(self) -> dict[str, Array]:
        """Sleep until it has ended and return its outputs, new arrays that nothing else refers to; call it once.

        Raises:
            InferenceError: The runtime failed.
        """


class ExecutionContext(ABC):
    """One inference at a time. Not thread-safe: whoever leases it has it alone."""

    @abstractmethod
    def execute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run checked, contiguous inputs; the outputs are new arrays that nothing else refers to.

        Raises:
            InferenceError: The runtime failed; its own message is included.
        """

    def start(self, inputs: Mapping[str, Array]) -> Pending:
        """Begin an inference and return before it has ended. Only if ``LoadedEngine.asynchronous``.

        Inputs on the host have been copied; those on a device are read where they lie, until the inference has ended.

        Raises:
            InferenceError: The runtime failed.
        """
        raise InferenceError(f"{type(self).__name__} cannot start an inference without waiting for it.")

    def starts_quickly(self, inputs: Mapping[str, Array]) -> bool:
        """Say whether ``start`` only hands over work now, and does nothing that it does once per shape."""
        return False

    def execute_on_device(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Run and leave the outputs where they are computed, as arrays with DLPack and ``__cuda_array_interface__``.

        Raises:
            UsageError: The context computes on the CPU.
            InferenceError: The runtime failed.
        """
        raise UsageError(
            "This plan runs on the CPU: there is no device to leave outputs on.", hint='Use outputs="host".'
        )

    @abstractmethod
    def execute_into(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run and write the results into the caller's contiguous arrays of the right dtype and shape.

        Raises:
            InferenceError: The runtime failed, or an output array does not fit.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the context holds."""


class LoadedEngine(ABC):
    """A deserialized plan. Making contexts is thread-safe.

    Attributes:
        asynchronous: Whether its contexts have ``start``: a device computes, and no thread has to.
    """

    asynchronous: bool = False

    def enter_thread(self) -> None:  # noqa: B027  # most runtimes need nothing
        """Called once in each thread that works for this engine alone, before it does anything."""

    @abstractmethod
    def create_context(self) -> ExecutionContext:
        """Make a context."""

    def import_array(self, name: str, value: Any) -> Any:
        """Return a view of an array on the engine's device, with dtype, shape and nbytes; None for anything else.

        Raises:
            DtypeError: It lies on a device, but not so that it can be read in place.
        """
        return None

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Return the bytes that the engine itself holds, by owner; contexts are counted by who leases them."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine; all its contexts must have been closed."""


class Runtime(ABC):
    """A library that builds and runs plans."""

    name: str

    @property
    @abstractmethod
    def version(self) -> str:
        """Exact version of the library."""

    @abstractmethod
    def build(
        self,
        source: SourceModel,
        config: BuildConfig,
        *,
        real: RealInputs | None = None,
        progress: BuildProgress | None = None,
    ) -> BuiltPlan:
        """Compile a model.

        Args:
            source: The model.
            config: Options.
            real: Real inputs, to check and measure on where that is done, and to take profiles from.
            progress: Called with (phase, steps done, steps in all).

        Raises:
            ModelError: The runtime refuses the model.
            UsageError: Sizes or values of inputs have to be given.
            BuildError: No implementation could be built.
        """

    @abstractmethod
    def describe(self, content: bytes, options: LoadOptions) -> Manifest:
        """Read from a plan without manifest what it says of itself; this deserializes it.

        Raises:
            PlanCorruptError: The runtime cannot read it.
            PlanIncompatibleError: It was built for another version or device.
            RuntimeUnavailableError: The machine lacks what is needed to read it.
        """

    def precision_of(self, content: bytes, manifest: Manifest, options: LoadOptions) -> PrecisionFacts:
        """Ask a plan that passed ``check`` what of it runs in INT8; by default, what its manifest says."""
        return manifest.precision

    @abstractmethod
    def check(self, manifest: Manifest, options: LoadOptions) -> None:
        """Say whether plans of this manifest can run here, before any byte of one is read.

        Raises:
            PlanIncompatibleError: The plan was built for another version or another machine.
            RuntimeUnavailableError: The machine lacks what every plan of this runtime needs, a GPU for example.
        """

    @abstractmethod
    def load(self, content: bytes, manifest: Manifest, options: LoadOptions) -> LoadedEngine:
        """Deserialize a plan that passed ``check``.

        Args:
            content: The plan's bytes, equal to what the manifest's digest says.
            manifest: Its manifest.
            options: How to load it.

        Raises:
            PlanCorruptError: The runtime cannot read it.
            UsageError: The runtime cannot honour an option.
        """
