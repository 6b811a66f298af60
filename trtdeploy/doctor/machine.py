"""What was seen on a machine; nothing here is judged."""

from __future__ import annotations

from typing import Literal

from trtdeploy.frozen_model import FrozenModel


class Library(FrozenModel):
    """A Python library.

    Attributes:
        state: "ok" if it imports and answers, "missing" if it is not installed, "broken" if it is and does not.
        version: Exact version, as far as it could be found.
        cuda: CUDA that it was built for, "13" or "13.0", where that can be told.
        detail: What is wrong with it, or what else is known.
        builder_error: TensorRT only: why no builder can be made here; empty if one can.
    """

    state: Literal["ok", "missing", "broken"]
    version: str | None = None
    cuda: str | None = None
    detail: str = ""
    builder_error: str = ""


class Gpu(FrozenModel):
    """A GPU."""

    name: str
    capability: str
    memory_bytes: int


class Driver(FrozenModel):
    """The NVIDIA driver and its GPUs.

    Attributes:
        found_by: Who has seen it.
        version: Of the driver, "580.65.06".
        cuda: The newest CUDA that it supports, "13.0".
        gpus: In CUDA's order.
        detail: Why CUDA cannot be used, if it cannot.
        failure: What nvidia-smi says where it is installed and fails.
    """

    found_by: Literal["cuda-python", "nvidia-smi", "none"] = "none"
    version: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    detail: str = ""
    failure: str = ""


class Server(FrozenModel):
    """A tritonserver.

    Attributes:
        path: Its executable; None if there is none.
        origin: Where it was found.
        version: Its version, where it says so.
        backends: What it can serve with.
        tensorrt: TensorRT that it carries, where it says so.
        detail: Why there is none.
    """

    path: str | None = None
    origin: str = ""
    version: str | None = None
    backends: tuple[str, ...] = ()
    tensorrt: str | None = None
    detail: str = ""


class CacheFolder(FrozenModel):
    """Where trtdeploy keeps what it prepares."""

    path: str
    writable: bool
    detail: str = ""


class Machine(FrozenModel):
    """Everything that was looked at; the libraries are named as pip names them."""

    trtdeploy: str
    python: str
    platform: str
    cpu: str
    driver: Driver
    libraries: dict[str, Library]
    server: Server
    cache: CacheFolder

    def library(self, name: str) -> Library:
        """Return a library; one that was not looked for is missing."""
        return self.libraries.get(name, Library(state="missing"))
