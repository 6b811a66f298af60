"""The engine that services embed."""

from trtdeploy.engine.engine import Engine
from trtdeploy.engine.lease import Lease
from trtdeploy.engine.memory import MemoryReport

__all__ = ["Engine", "Lease", "MemoryReport"]
