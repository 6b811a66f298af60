"""What this machine's processor is called and which instruction sets decide about kernels and layouts."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Return the architecture and the relevant instruction sets, as ``x86_64+avx2+avx512f``."""
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("features") or "").split())
    return "+".join([platform.machine(), *(name for name in _RELEVANT if name in flags)])


def multiplies_exactly() -> bool:
    """Return whether a product of UINT8 and INT8 is summed up without saturation.

    On x86 without VNNI, ONNX Runtime adds pairs of products in 16 bits (VPMADDUBSW), and large ones saturate.
    Source: "Quantize ONNX models", section "When and why do I need to try U8U8", https://onnxruntime.ai.
    """
    here = instruction_sets()
    return not here.startswith(("x86_64", "AMD64", "i386", "i686")) or "vnni" in here


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
