"""Finding a tritonserver on this machine, and preparing the one that nvidia-pytriton carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.files import locked

_CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started.

    Attributes:
        binary: The executable.
        origin: Where it was found, for people.
        backends: Folder of the backends, where it is not the server's own default.
        environment: Variables to set in addition to ours.
    """

    binary: Path
    origin: str
    backends: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_tritonserver(path: str | Path | None = None) -> Installation:
    """Find a tritonserver: ``path``, then the PATH, the NGC container's place, nvidia-pytriton's wheel.

    Raises:
        RuntimeUnavailableError: There is none, or the wheel's has no Python backend for this interpreter.
    """
    if path is not None:
        binary = Path(path)
        if not (binary.is_file() and os.access(binary, os.X_OK)):
            raise RuntimeUnavailableError(f"{binary} is not an executable tritonserver.")
        return Installation(binary, "--tritonserver")
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(Path(on_path), "PATH")
    if _CONTAINER_SERVER.is_file():
        return Installation(_CONTAINER_SERVER, "container")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeUnavailableError(
            "There is no tritonserver on this machine.",
            hint="pip install 'trtdeploy[server]' brings one for CPUs; or run inside of NVIDIA's Triton container, or "
            "give --tritonserver PATH.",
        )
    return _prepare_wheel(Path(next(iter(spec.submodule_search_locations))) / "tritonserver")


def cache_folder() -> Path:
    """Return where trtdeploy keeps what it prepares: ``$TRTDEPLOY_CACHE``, else below the user's cache folder."""
    if override := os.environ.get("TRTDEPLOY_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtdeploy"


def _prepare_wheel(server: Path) -> Installation:
    """Lay out the wheel's Python backend as the server expects it, once, in the cache folder."""
    from importlib.metadata import version

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(folder.name for folder in (server / "python_backend_stubs").glob("*")))
        raise RuntimeUnavailableError(
            f"nvidia-pytriton's tritonserver has no Python backend for Python {python}; it has {known}."
        )
    backends = cache_folder() / f"tritonserver-pytriton-{version('nvidia-pytriton')}-py{python}"
    with locked(backends):
        if not backends.is_dir():
            backends.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{backends.name}.", dir=backends.parent))
            try:
                shutil.copytree(server / "backends", staging, dirs_exist_ok=True)
                shutil.copy2(stub, staging / "python" / stub.name)
                staging.chmod(0o755)
                staging.rename(backends)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    return Installation(
        server / "bin" / "tritonserver",
        "nvidia-pytriton",
        backends,
        {
            "LD_LIBRARY_PATH": _joined(
                [sysconfig.get_config_var("LIBDIR"), server.parent.parent / "nvidia_pytriton.libs"], "LD_LIBRARY_PATH"
            ),
            # The stub embeds Python and ignores PYTHONPATH; it takes the environment of the python3 that it finds.
            "PATH": _joined([Path(sys.executable).parent], "PATH"),
        },
    )


def _joined(first: list[str | Path], variable: str) -> str:
    """Put folders before what the environment variable already holds."""
    return os.pathsep.join([*map(str, filter(None, first)), *filter(None, [os.environ.get(variable)])])
