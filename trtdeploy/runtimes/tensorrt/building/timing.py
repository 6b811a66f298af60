"""TensorRT's timing cache as bytes: counting its entries, combining two of them, giving one to a build."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trtdeploy.errors import RuntimeUnavailableError, TimingCacheError
from trtdeploy.runtimes.tensorrt.bindings import Bindings, load_bindings

if TYPE_CHECKING:
    import tensorrt

    from trtdeploy.timing_cache import BlobCache

_REFUSALS = ("Failed to deserialize timing cache", "Magic tag does not match", "Timing cache header mismatch")


def timing_blobs(runtime_name: str) -> TimingBlobs:
    """Return what reads the timing caches of a runtime.

    Raises:
        RuntimeUnavailableError: Its library is not installed.
    """
    return TimingBlobs(load_bindings(runtime_name))


class TimingBlobs:
    """Reads timing caches with the library itself, the only one that knows their format."""

    def __init__(self, bindings: Bindings) -> None:
        self._bindings = bindings

    def entries(self, blob: bytes) -> int:
        """Return how many tactics a cache holds; 0 where this version cannot tell.

        Raises:
            TimingCacheError: TensorRT does not take it. It says so in its log only, and works on with an empty cache.
        """
        _builder, config = self._scratch()
        cache = self.open(config, blob)
        return len(cache.queryKeys()) if hasattr(cache, "queryKeys") else 0

    def combine(self, first: bytes, second: bytes, *, ignore_mismatch: bool = False) -> bytes:
        """Return ``first`` with what ``second`` adds.

        Args:
            first: Wins where both have an entry.
            second: Must come from the same version, whatever is ignored.
            ignore_mismatch: Combine what comes from two devices, because something else says that they are alike.
                TensorRT itself compares the devices' UUIDs, which differ between two boards of one model.

        Raises:
            TimingCacheError: TensorRT refuses: another version, device or set of builder options.
        """
        _builder, config = self._scratch()
        cache = self.open(config, first)
        addition = self.open(config, second)
        with self._bindings.messages.capture() as capture:
            if not cache.combine(addition, ignore_mismatch=ignore_mismatch):
                raise TimingCacheError(
                    f"{self._title} refuses to combine two timing caches: they come from other versions or devices.",
                    log_lines=capture.lines,
                )
        return bytes(cache.serialize())

    def combining(self, cache: BlobCache) -> Callable[[bytes, bytes], bytes]:
        """Return what adds a blob of this machine to the one on disk, from whichever board of its model that came."""

        def combine(on_disk: bytes, ours: bytes) -> bytes:
            return self.combine(on_disk, ours, ignore_mismatch=cache.vouches_for(on_disk))

        return combine

    def open(self, config: tensorrt.IBuilderConfig, blob: bytes) -> tensorrt.ITimingCache:
        """Make a cache from bytes; none at all make an empty one.

        Raises:
            TimingCacheError: TensorRT does not take them.
        """
        with self._bindings.messages.capture() as capture:
            cache: tensorrt.ITimingCache | None = config.create_timing_cache(blob)
            if capture.mentions("cudaError"):
                raise RuntimeUnavailableError(
                    f"{self._title} cannot read timing caches here: it needs a GPU with a working driver.",
                    log_lines=capture.lines,
                )
            refusal = any(capture.mentions(words) for words in _REFUSALS)
            if cache is None or (blob and refusal):
                raise TimingCacheError(
                    f"{self._title} does not take these {len(blob)} bytes as a timing cache.", log_lines=capture.lines
                )
            # A silent replacement by an empty cache shows in the size: an empty one is a header alone.
            if blob and len(bytes(cache.serialize())) < len(blob):
                raise TimingCacheError(f"{self._title} took only a part of a timing cache of {len(blob)} bytes.")
        return cache

    @property
    def _title(self) -> str:
        return f"{self._bindings.flavour.title} {self._bindings.version}"

    def _scratch(self) -> tuple[tensorrt.Builder, tensorrt.IBuilderConfig]:
        """Make a config to make caches with; its builder must live as long."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._bindings.trt
        try:
            builder = trt.Builder(self._bindings.messages.logger)
        except (RuntimeError, TypeError) as error:
            raise RuntimeUnavailableError(f"{self._title} cannot make a builder here: {error}.") from error
        return builder, builder.create_builder_config()
