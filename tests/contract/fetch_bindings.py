"""Fetch TensorRT's Python bindings, and nothing of its libraries: ``python fetch_bindings.py FOLDER``.

A few MB. What is in the folder already is not fetched again, and a wheel appears there as a whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

DISTRIBUTION = "tensorrt-cu13-bindings"
VERSIONS = ("10.16.1.11", "11.4.0.106")
"""The newest of each major version that ``trtdeploy.runtimes.tensorrt`` serves."""


def wheel_in(folder: Path, version: str) -> Path | None:
    """Return the wheel of a version for the running Python, if it is there."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"{DISTRIBUTION.replace('-', '_')}-{version}-{python}-*.whl"))
    return found[0] if found else None


def fetch(folder: Path) -> None:
    """Download what is missing.

    Raises:
        subprocess.CalledProcessError: pip cannot get a wheel; it has said why on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for version in VERSIONS:
        if wheel_in(folder, version) is not None:
            continue
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as staging:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--dest", staging, f"{DISTRIBUTION}=={version}"]
            subprocess.run(command, check=True)
            for wheel in Path(staging).glob("*.whl"):
                os.replace(wheel, folder / wheel.name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python fetch_bindings.py FOLDER")
    try:
        fetch(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"fetch_bindings: pip ended with {error.returncode}; its message is above")
