"""What this processor is: by the processor itself, and by /proc/cpuinfo where it cannot be questioned."""

from __future__ import annotations

import mmap
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtdeploy.runtimes.onnxruntime import cpu, cpuid

ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is an instruction of x86")
ARM = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimddp i8mm bf16\nCPU part\t: 0xd40\n\nprocessor\t: 1\n"


@pytest.fixture(autouse=True)
def questioned_afresh() -> Iterator[None]:
    cpuid.x86_features.cache_clear()
    cpuid.x86_brand.cache_clear()
    yield
    cpuid.x86_features.cache_clear()
    cpuid.x86_brand.cache_clear()


def is_emulated() -> bool:
    """Whether /proc/cpuinfo is the host's."""
    return cpuid.x86_brand() != cpu._cpuinfo().get("model name")


@ON_X86
def test_the_processor_and_the_kernel_say_the_same() -> None:
    if is_emulated():
        pytest.skip("/proc/cpuinfo is that of another processor")
    known = cpuid.x86_features()
    assert known is not None
    assert known == set(cpu._cpuinfo()["flags"].split()) & set(cpuid._FEATURES)
    assert cpu.instruction_sets().split("+") == ["x86_64", *(name for name in cpu._RELEVANT if name in known)]


@ON_X86
def test_a_system_that_refuses_machine_code_leaves_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert (cpuid.x86_features(), cpuid.x86_brand()) == (None, None)
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: {"model name": "Old", "flags": "sse avx avx2 fma"})
    assert (cpu.processor_name(), cpu.instruction_sets()) == ("Old", "x86_64+avx+avx2")


def test_no_machine_code_of_x86_runs_on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(Path, "read_text", lambda *_: ARM)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("a page of machine code was made"))
    assert cpu.instruction_sets() == "aarch64+asimd+asimddp+i8mm"


@pytest.mark.parametrize(
    ("leaves", "saved", "expected"),
    [
        ({(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (0, 1 << 5, 0, 0)}, 0x7, {"avx", "avx2"}),
        # the system saves no wide registers, so no program may use them
        ({(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (0, 1 << 5, 0, 0)}, 0x3, set()),
        ({(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 1 << 28, 0), (7, 0): (0, 1 << 5, 0, 0)}, 0x7, set()),
        # VNNI of 256 bits without AVX-512
        (
            {(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (1, 1 << 5, 0, 0), (7, 1): (1 << 4, 0, 0, 0)},
            0x7,
            {"avx", "avx2", "avx_vnni"},
        ),
        # a subleaf that the processor does not have
        (
            {(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (0, 1 << 5, 0, 0), (7, 1): (1 << 4, 0, 0, 0)},
            0x7,
            {"avx", "avx2"},
        ),
        # a processor whose last leaf is 1
        ({(0, 0): (1, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (0, 1 << 5, 0, 0)}, 0x7, {"avx"}),
        (
            {(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 0b11 << 27, 0), (7, 0): (0, 1 << 5 | 1 << 16, 1 << 11, 1 << 25)},
            0xE7,
            {"avx", "avx2", "avx512f", "avx512_vnni"},
        ),
    ],
)
def test_a_set_counts_where_processor_and_system_have_it(
    leaves: dict[tuple[int, int], tuple[int, ...]], saved: int, expected: set[str]
) -> None:
    assert cpuid._features(lambda leaf, subleaf: leaves[leaf, subleaf], lambda: saved) == expected
