"""Where the accuracy benchmarks find their data and leave their results."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.files import atomic_write
from trtdeploy.runtimes.onnxruntime.cpu import processor_name, usable_cores

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = PROJECT / "benchmarks" / "results" / "accuracy"
SHARED = PROJECT.parent / "shared" / "data"
CIFAR10 = SHARED / "cifar10.tar.xz"
FLOAT_CHECKPOINT = SHARED / "efficientnet_b0_cifar10_fp16.safetensors"
_PACKAGES = ("torch", "pytorch-quantization", "nvidia-modelopt", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


@dataclass(frozen=True)
class Table:
    """What a reader of ``docs/accuracy.md`` sees of a result.

    Attributes:
        title: Names the measurement.
        columns: One heading per cell of a row.
        rows: Cells as they are printed.
        note: What the reader must know to read it: samples, seeds, what is compared with what.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def require(*paths: Path) -> None:
    """Stop a benchmark whose data is not there.

    Raises:
        RuntimeUnavailableError: A path does not exist.
    """
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise RuntimeUnavailableError(
            f"This benchmark needs {', '.join(missing)}, which is not there.",
            hint="Give --data and --checkpoint; the data is not part of this project.",
        )


def write_result(name: str, facts: Mapping[str, Any], *, tables: Sequence[Table] = (), folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` with the date, the machine and the versions that made the figures.

    Args:
        name: Of the benchmark.
        facts: All that was measured.
        tables: The part of it that ``benchmarks.accuracy.tables`` puts into ``docs/accuracy.md``.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": {"processor": processor_name(), "cores": usable_cores(), "python": platform.python_version()},
        "versions": _versions(),
        "tables": [asdict(table) for table in tables],
        **facts,
    }
    atomic_write(path, json.dumps(content, indent=2) + "\n")
    return path


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
