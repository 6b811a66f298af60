"""The contract between the engine and a runtime.

A runtime turns an ONNX model into plan bytes, and plan bytes into a loaded engine, which makes execution contexts. What
is above (``trtdeploy.building``, ``trtdeploy.engine``) knows nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtdeploy.plan import DeviceFacts, Manifest, PrecisionFacts, TacticFacts
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.tensors import Array
from trtdeploy.timing_cache import TimingCache

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.source import SourceModel

BuildProgress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps in all)."""


@dataclass(frozen=True)
class BuiltPlan:
    """What a build hands back: the runtime's own bytes, and facts for the manifest."""

    content: bytes
    device: DeviceFacts
    precision: PrecisionFacts
    tactic: TacticFacts | None


class ExecutionContext(ABC):
    """One inference at a time. Not thread-safe: whoever leases it has it alone."""

    @abstractmethod
    def execute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run checked, contiguous inputs; the outputs are new arrays that nothing else refers to.

        Raises:
            InferenceError: The runtime failed; its own message is included.
        """

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
    """A deserialized plan. Making contexts is thread-safe."""

    @abstractmethod
    def create_context(self) -> ExecutionContext:
        """Make a context."""

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
        cache: TimingCache | None = None,
        progress: BuildProgress | None = None,
    ) -> BuiltPlan:
        """Compile a model.

        Raises:
            ModelError: The runtime refuses the model.
            BuildError: No implementation could be built.
        """

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Say whether plans of this manifest can run here, before any byte of one is read.

        Raises:
            PlanIncompatibleError: The plan was built for another version or another machine.
        """

    @abstractmethod
    def load(self, content: bytes, manifest: Manifest, *, threads: int | None = None) -> LoadedEngine:
        """Deserialize a plan that passed ``check``.

        Args:
            content: The plan's bytes, equal to what the manifest's digest says.
            manifest: Its manifest.
            threads: Threads of one inference, on a CPU; None takes what the build measured as fastest.

        Raises:
            PlanCorruptError: The runtime cannot read it.
        """
