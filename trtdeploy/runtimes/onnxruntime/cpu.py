"""What this machine's processor is called and which instruction sets decide about kernels and layouts."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from trtdeploy.runtimes.onnxruntime.cpuid import x86_brand, x86_features

# The sets by which ONNX Runtime's CPU kernels choose code paths and the block size of the blocked layout.
_RELEVANT = (
    "avx",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def processor_name() -> str:
    """Return the model name of the processor."""
    return x86_brand() or _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Return the architecture and the relevant instruction sets, as ``x86_64+avx+avx2+avx512f``.

    By the processor itself where it can be questioned, which is true under an emulator too; else by /proc/cpuinfo.
    """
    known = x86_features()
    if known is None:
        cpuinfo = _cpuinfo()
        known = frozenset((cpuinfo.get("flags") or cpuinfo.get("features") or "").split())
    return "+".join([platform.machine(), *(name for name in _RELEVANT if name in known)])


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo, by lower-case name; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return fields
