"""Features and name of an x86 processor, by its own CPUID.

The instruction CPUID is the only source that is true for a process under an emulator, where /proc/cpuinfo is still that
of the host. Python has no way to execute it, so a page with a few bytes of machine code is made, called and given back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# System V calling convention: leaf in edi, subleaf in esi, address of four 32-bit results in rdx; rbx is the caller's.
_CPUID = bytes.fromhex(
    "53"  # push rbx
    "89f8 89f1 4989d0"  # mov eax, edi; mov ecx, esi; mov r8, rdx
    "0fa2"  # cpuid
    "418900 41895804 41894808 4189500c"  # mov [r8], eax; [r8 + 4], ebx; [r8 + 8], ecx; [r8 + 12], edx
    "5b c3"  # pop rbx; ret
)
_XGETBV = bytes.fromhex(
    "89f9"  # mov ecx, edi
    "0f01d0"  # xgetbv
    "48c1e220 4809d0 c3"  # shl rdx, 32; or rax, rdx; ret
)

_EAX, _EBX, _ECX, _EDX = range(4)
_OSXSAVE = (1, 0, _ECX, 27)
# What the operating system saves at a switch of processes: Intel, Software Developer's Manual, volume 1, section 13.3.
_YMM, _ZMM, _TILES = 0x6, 0xE6, 0x60000
# Name as in Linux' arch/x86/include/asm/cpufeatures.h: leaf, subleaf, register and bit (Software Developer's Manual,
# volume 2, CPUID), and the registers that must be saved.
_FEATURES = {
    "avx": ((1, 0, _ECX, 28), _YMM),
    "avx2": ((7, 0, _EBX, 5), _YMM),
    "avx512f": ((7, 0, _EBX, 16), _ZMM),
    "avx512_vnni": ((7, 0, _ECX, 11), _ZMM),
    "avx_vnni": ((7, 1, _EAX, 4), _YMM),
    "avx512_bf16": ((7, 1, _EAX, 5), _ZMM),
    "amx_int8": ((7, 0, _EDX, 25), _TILES),
}

_Registers = tuple[int, ...]


@cache
def x86_features() -> frozenset[str] | None:
    """Return which of the sets that decide about kernels the processor has and the operating system supports.

    None where the processor cannot be questioned: it is no x86-64, or the system refuses a page of machine code.
    """
    if not _is_posix_x86_64():
        return None
    try:
        with _instruction(_CPUID) as cpuid, _instruction(_XGETBV) as xgetbv:
            return _features(_reader(cpuid), lambda: int(xgetbv(0, 0, None)))
    except OSError:
        return None


@cache
def x86_brand() -> str | None:
    """Return the processor's name, as the Software Developer's Manual's leaves 0x80000002 to 0x80000004 spell it."""
    if not _is_posix_x86_64():
        return None
    try:
        with _instruction(_CPUID) as cpuid:
            read = _reader(cpuid)
            if read(0x80000000, 0)[_EAX] < 0x80000004:
                return None
            registers = [value for leaf in (0x80000002, 0x80000003, 0x80000004) for value in read(leaf, 0)]
    except OSError:
        return None
    text = b"".join(value.to_bytes(4, "little") for value in registers)
    return " ".join(text.split(b"\0")[0].decode("ascii", "replace").split()) or None


def _is_posix_x86_64() -> bool:
    return os.name == "posix" and platform.machine() in ("x86_64", "AMD64") and ctypes.sizeof(ctypes.c_void_p) == 8


def _features(read: Callable[[int, int], _Registers], saved: Callable[[], int]) -> frozenset[str]:
    def has(leaf: int, subleaf: int, register: int, bit: int) -> bool:
        # a subleaf beyond the last one repeats another leaf's values on some processors
        there = leaf <= read(0, 0)[_EAX] and (leaf != 7 or subleaf <= read(7, 0)[_EAX])
        return there and bool(read(leaf, subleaf)[register] >> bit & 1)

    states = saved() if has(*_OSXSAVE) else 0
    return frozenset(name for name, (place, state) in _FEATURES.items() if has(*place) and states & state == state)


def _reader(cpuid: Callable[..., int]) -> Callable[[int, int], _Registers]:
    def read(leaf: int, subleaf: int) -> _Registers:
        registers = (ctypes.c_uint32 * 4)()
        cpuid(leaf, subleaf, ctypes.addressof(registers))
        return tuple(registers)

    return read


@contextmanager
def _instruction(code: bytes) -> Iterator[Callable[..., int]]:
    """Machine code as a function of up to two 32-bit numbers and an address."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        first = ctypes.c_char.from_buffer(page)
        try:
            kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
            yield kind(ctypes.addressof(first))
        finally:
            del first  # a page that something points into cannot be given back
