"""Measured timings that outlive a build, shared safely between threads and processes.

One file, one lock that spans reading, merging and replacing it: no update is lost, no reader sees a part.
"""

from trtdeploy.timing_cache.blob import BlobCache
from trtdeploy.timing_cache.measured import TimingCache
from trtdeploy.timing_cache.sidecar import Fingerprint
from trtdeploy.timing_cache.store import CacheMode

__all__ = ["BlobCache", "CacheMode", "Fingerprint", "TimingCache"]
