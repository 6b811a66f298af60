"""What ``trtdeploy doctor`` concludes about machines, most of which are not at hand."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trtdeploy.cli.doctor import print_report
from trtdeploy.doctor import probe
from trtdeploy.doctor.examination import ask_nvidia_smi, find_server, look_at_cache, read_driver, run_probe
from trtdeploy.doctor.machine import CacheFolder, Driver, Gpu, Library, Machine, Server
from trtdeploy.doctor.report import Report, diagnose
from trtdeploy.doctor.triton_releases import releases_for
from trtdeploy.errors import PlanCorruptError
from trtdeploy.plan import DeviceFacts, Manifest, Plan, RuntimeFacts, manifest_path
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets
from trtdeploy.triton.server import installation

GIB = 1 << 30
L4 = Gpu(name="NVIDIA L4", capability="8.9", memory_bytes=24 * GIB)
H100 = Gpu(name="NVIDIA H100 PCIe", capability="9.0", memory_bytes=80 * GIB)
BLACKWELL = Gpu(name="NVIDIA GB10", capability="12.1", memory_bytes=128 * GIB)


def ok(version: str, **facts: Any) -> Library:
    return Library(state="ok", version=version, **facts)


def driver(*gpus: Gpu, version: str = "580.95.05", cuda: str = "13.0", **facts: Any) -> Driver:
    return Driver(**{"found_by": "cuda-python", "version": version, "cuda": cuda, "gpus": gpus, **facts})


def machine(*, libraries: dict[str, Library] | None = None, **parts: Any) -> Machine:
    """A CPU machine with everything for training and serving; what is given replaces or adds to it."""
    training = {name: ok("1.0") for name in ("torch", "pytorch-quantization", "scikit-learn", "safetensors")}
    everything: dict[str, Any] = {
        "trtdeploy": "0.1.0",
        "python": "3.12.1",
        "platform": "Linux-x86_64",
        "cpu": "a processor",
        "driver": Driver(detail="there is no NVIDIA driver"),
        "server": Server(path="/usr/bin/tritonserver", origin="PATH", backends=("python",)),
        "cache": CacheFolder(path="/home/u/.cache/trtdeploy", writable=True),
        "libraries": {"onnxruntime": ok("1.24.0"), "tritonclient": ok("2.73.0"), **training, **(libraries or {})},
    }
    return Machine(**{**everything, **parts})


def gpu_machine(*gpus: Gpu, libraries: dict[str, Library] | None = None, **parts: Any) -> Machine:
    """A machine with a GPU on which everything fits."""
    fitting = {"tensorrt": ok("10.16.1.11", cuda="13"), "cuda-python": ok("13.4.4")}
    return machine(libraries={**fitting, **(libraries or {})}, **{"driver": driver(*gpus), **parts})


def test_a_cpu_machine_is_healthy_and_runs_onnxruntime_plans() -> None:
    report = diagnose(machine())
    assert report.healthy
    assert (report.runtimes["onnxruntime"].build, report.runtimes["onnxruntime"].run) == (True, True)
    assert report.runtimes["tensorrt"].why_not_build == "not installed"
    assert report.commands["quickstart"].works
    assert report.commands["run, bench"].note == "plans of onnxruntime"
    assert report.commands["build --runtime tensorrt"].note == "tensorrt: pip install 'trtdeploy[tensorrt]'"


def test_rtx_without_a_gpu_builds_and_says_why_it_does_not_run() -> None:
    report = diagnose(machine(libraries={"tensorrt-rtx": ok("1.7.1.116", cuda="13"), "cuda-python": ok("13.4.4")}))
    assert report.healthy
    ability = report.runtimes["tensorrt-rtx"]
    assert (ability.build, ability.run) == (True, False)
    assert ability.why_not_run == "there is no NVIDIA driver"


def test_tensorrt_without_a_gpu_does_nothing_and_that_is_no_problem() -> None:
    report = diagnose(machine(libraries={"tensorrt": ok("11.4.0.106", builder_error="cudaErrorInsufficientDriver")}))
    assert report.healthy
    assert report.runtimes["tensorrt"].why_not_build == "there is no NVIDIA driver"


def test_a_gpu_machine_where_all_fits_builds_and_runs() -> None:
    report = diagnose(gpu_machine(L4, libraries={"tensorrt-rtx": ok("1.7.1.116", cuda="13")}))
    assert report.healthy
    assert all(ability.build and ability.run for ability in report.runtimes.values())
    assert report.commands["run, bench"].note == "plans of onnxruntime, tensorrt, tensorrt-rtx"


@pytest.mark.parametrize(
    ("seen", "what", "mend"),
    [
        pytest.param(
            gpu_machine(L4, driver=driver(L4, version="550.54", cuda="12.4"), libraries={"cuda-python": ok("12.9.1")}),
            "TensorRT 10.16.1.11 was built for CUDA 13; driver 550.54 supports CUDA 12.4.",
            "Install driver 580.65 or later, or: pip install 'tensorrt-cu12==10.*'",
            id="driver too old for TensorRT",
        ),
        pytest.param(
            gpu_machine(L4, driver=driver(L4, version="550.54", cuda="12.4", found_by="nvidia-smi")),
            "cuda-python 13.4.4 needs a driver for CUDA 13; driver 550.54 supports CUDA 12.4.",
            "Install driver 580.65 or later, or: pip install 'cuda-python==12.*'",
            id="driver too old for cuda-python",
        ),
        pytest.param(
            gpu_machine(L4, libraries={"tensorrt": ok("10.16.1.11", cuda="12")}),
            "TensorRT 10.16.1.11 was built for CUDA 12, cuda-python 13.4.4 for CUDA 13.",
            "pip install 'cuda-python==12.*'",
            id="TensorRT and cuda-python differ",
        ),
        pytest.param(
            gpu_machine(
                L4, libraries={"cuda-python": Library(state="missing")}, driver=driver(L4, found_by="nvidia-smi")
            ),
            "There is a GPU (NVIDIA L4), but cuda-python, by which plans are run, is not installed.",
            "pip install 'cuda-python==13.*'",
            id="no cuda-python",
        ),
        pytest.param(
            gpu_machine(L4, libraries={"cuda-python": ok("12.4.0"), "tensorrt": ok("10.16.1.11", cuda="12")}),
            "cuda-python 12.4.0 is too old: 12.9 or later is needed.",
            "pip install 'cuda-python==13.*'",
            id="old cuda-python",
        ),
        pytest.param(
            gpu_machine(L4, driver=driver(L4, found_by="nvidia-smi", detail="no CUDA-capable device is detected")),
            "nvidia-smi shows NVIDIA L4, but CUDA cannot use it: no CUDA-capable device is detected.",
            "Look at CUDA_VISIBLE_DEVICES and at the driver: nvidia-smi",
            id="GPU hidden from CUDA",
        ),
        pytest.param(
            machine(driver=Driver(failure="NVIDIA-SMI has failed because it couldn't communicate with the driver")),
            "An NVIDIA driver is installed, but it does not answer: NVIDIA-SMI has failed because it couldn't "
            "communicate with the driver.",
            "Load it: sudo modprobe nvidia. If that fails, install it again for the running kernel.",
            id="driver does not answer",
        ),
        pytest.param(
            machine(
                libraries={"tensorrt-rtx": ok("1.7.1.116", cuda="13"), "cuda-python": ok("13.4.4")},
                driver=driver(H100),
            ),
            "TensorRT-RTX 1.7.1.116 cannot run plans here: it has no kernels for NVIDIA H100 PCIe (compute capability "
            "9.0; it targets 8.0,8.6,8.9,12.0+).",
            "pip install 'trtdeploy[tensorrt]'",
            id="RTX on Hopper",
        ),
        pytest.param(
            machine(libraries={"onnxruntime": Library(state="broken", version="1.24.0", detail="ImportError: no lib")}),
            "ONNX Runtime is installed but does not work: ImportError: no lib.",
            "pip install --force-reinstall 'onnxruntime==1.24.0'",
            id="broken onnxruntime",
        ),
        pytest.param(
            machine(libraries={"onnxruntime": Library(state="missing")}),
            "ONNX Runtime, which trtdeploy itself needs, is not installed.",
            "pip install onnxruntime",
            id="no onnxruntime",
        ),
        pytest.param(
            machine(
                libraries={"tensorrt": Library(state="broken", version="11.4.0.106", detail="libnvinfer.so.11: no")}
            ),
            "TensorRT is installed but does not work: libnvinfer.so.11: no. The Python bindings are there and the "
            "libraries that they load are not.",
            "pip install --force-reinstall 'tensorrt==11.4.0.106'",
            id="TensorRT without its libraries",
        ),
        pytest.param(
            gpu_machine(L4, libraries={"tensorrt": ok("10.0.1", cuda="13")}),
            "TensorRT 10.0.1 is too old: 10.3 or later is needed.",
            "pip install 'tensorrt>=10.3'",
            id="old TensorRT",
        ),
        pytest.param(
            gpu_machine(L4, libraries={"tensorrt": ok("11.1.0.106", cuda="13", builder_error="pybind11: null")}),
            "TensorRT 11.1.0.106 imports but makes no builder: pybind11: null.",
            "pip install --force-reinstall 'tensorrt==11.1.0.106'",
            id="no builder",
        ),
        pytest.param(
            gpu_machine(
                L4,
                libraries={"tensorrt": ok("11.1.0.106", cuda="13")},
                server=Server(path="/opt/tritonserver/bin/tritonserver", backends=("tensorrt",), tensorrt="10.16.1.11"),
            ),
            "This tritonserver carries TensorRT 10.16.1.11 and loads plans of that version only; TensorRT 11.1.0.106 "
            "is installed for building.",
            "pip install 'tensorrt==10.16.1.11', or serve with Triton 26.07",
            id="container of another TensorRT",
        ),
        pytest.param(
            machine(
                cache=CacheFolder(path="/home/someone/.cache/trtdeploy", writable=False, detail="Permission denied")
            ),
            "The cache folder /home/someone/.cache/trtdeploy cannot be written: Permission denied.",
            "export TRTDEPLOY_CACHE=FOLDER",
            id="cache folder",
        ),
    ],
)
def test_each_mismatch_is_found_alone_with_what_mends_it(seen: Machine, what: str, mend: str) -> None:
    report = diagnose(seen)
    assert not report.healthy
    found = {problem.what: problem.mend for problem in report.problems}
    assert found.get(what) == mend, found
    # a driver that is too old is too old for both of its users; everything else is one problem
    assert len(found) == (2 if "driver 550.54" in what and "13.4.4" in what else 1), found


def test_rtx_on_hopper_is_no_problem_where_tensorrt_runs() -> None:
    report = diagnose(gpu_machine(H100, libraries={"tensorrt-rtx": ok("1.7.1.116", cuda="13")}))
    assert report.healthy
    assert not report.runtimes["tensorrt-rtx"].run
    assert "9.0" in report.runtimes["tensorrt-rtx"].why_not_run


def test_rtx_targets_take_in_what_came_later() -> None:
    rtx = {"tensorrt-rtx": ok("1.7.1.116", cuda="13")}
    assert diagnose(gpu_machine(BLACKWELL, libraries=rtx)).runtimes["tensorrt-rtx"].run


def test_what_commands_lack() -> None:
    bare = machine(
        libraries={"torch": Library(state="broken", detail="x"), "tritonclient": Library(state="missing")},
        server=Server(detail="There is no tritonserver on this machine."),
    )
    commands = diagnose(bare).commands
    assert commands["quickstart"].note == (
        "torch: pip install 'trtdeploy[training]'; tritonclient: pip install 'trtdeploy[triton]'; "
        "There is no tritonserver on this machine."
    )
    working = {name for name, command in commands.items() if command.works}
    assert working == {"build --runtime onnxruntime", "run, bench", "validate --plan"}


# Plans


@pytest.fixture
def plan_for(qdq_plan: Plan, tmp_path: Path) -> Callable[..., Path]:
    """Write the manifest of a plan that was built elsewhere; nobody reads the plan itself."""

    def write(runtime: str, version: str, device: DeviceFacts, **config: Any) -> Path:
        changed = {
            "runtime": RuntimeFacts(name=runtime, version=version),
            "device": device,
            "build_config": config,
        }
        path = tmp_path / "model.plan"
        path.write_bytes(b"plan")
        manifest: Manifest = qdq_plan.manifest.model_copy(update=changed)
        manifest_path(path).write_text(manifest.to_json())
        return path

    return write


def on(gpu: Gpu, capability: str | None = None) -> DeviceFacts:
    return DeviceFacts(kind="gpu", name=gpu.name, capability=capability or gpu.capability)


def test_a_plan_that_fits(plan_for: Callable[..., Path]) -> None:
    report = diagnose(gpu_machine(L4), [plan_for("tensorrt", "10.16.1.11", on(L4))])
    (plan,) = report.plans
    assert report.healthy
    assert plan.runs_here
    assert plan.needs == "TensorRT 10.16.1.11 on a GPU of compute capability 8.9, built on NVIDIA L4"
    assert plan.triton == "nvcr.io/nvidia/tritonserver:26.05-py3"


def test_a_plan_of_another_version(plan_for: Callable[..., Path]) -> None:
    report = diagnose(gpu_machine(L4), [plan_for("tensorrt", "11.0.0.114", on(L4))])
    (plan,) = report.plans
    assert not report.healthy
    assert report.problems == ()
    assert plan.obstacle == "TensorRT 10.16.1.11 is installed here"
    assert plan.mend.startswith("pip install 'tensorrt==11.0.0.114', or trtdeploy build ")
    assert plan.triton == "nvcr.io/nvidia/tritonserver:26.06-py3"


def test_a_version_compatible_plan_runs_on_later_versions(plan_for: Callable[..., Path]) -> None:
    path = plan_for("tensorrt", "10.14.1.48", on(L4), version_compatible=True)
    (plan,) = diagnose(gpu_machine(L4), [path]).plans
    assert plan.runs_here
    assert plan.triton.count("nvcr.io") == 4
    assert plan.triton.endswith("26.07-py3 and later")


def test_a_plan_for_another_gpu(plan_for: Callable[..., Path]) -> None:
    (plan,) = diagnose(gpu_machine(L4), [plan_for("tensorrt", "10.16.1.11", on(H100))]).plans
    assert plan.obstacle == "NVIDIA L4 has compute capability 8.9"


def test_a_plan_without_its_library_or_its_gpu(plan_for: Callable[..., Path]) -> None:
    path = plan_for("tensorrt-rtx", "1.7.1.116", on(L4, "8.0,8.6,8.9,12.0+"))
    (absent,) = diagnose(machine(), [path]).plans
    assert (absent.obstacle, absent.mend) == (
        "TensorRT-RTX is missing here",
        "pip install 'tensorrt-rtx==1.7.1.116'",
    )
    (no_gpu,) = diagnose(machine(libraries={"tensorrt-rtx": ok("1.7.1.116")}), [path]).plans
    assert no_gpu.obstacle == "there is no NVIDIA driver"
    assert no_gpu.needs == "TensorRT-RTX 1.7.1.116 on a GPU of compute capability 8.0, 8.6, 8.9, 12.0+"
    assert no_gpu.triton.startswith("none")


def test_a_plan_of_a_version_that_no_known_container_carries(plan_for: Callable[..., Path]) -> None:
    (plan,) = diagnose(gpu_machine(L4), [plan_for("tensorrt", "11.4.0.106", on(L4))]).plans
    assert plan.triton.startswith("none is known to carry TensorRT 11.4.0.106; known are 25.12 (10.14.1.48), ")


def test_a_plan_for_a_cpu(plan_for: Callable[..., Path]) -> None:
    here = DeviceFacts(kind="cpu", name="this", capability=instruction_sets())
    (plan,) = diagnose(machine(), [plan_for("onnxruntime", "1.24.0", here)]).plans
    assert plan.runs_here
    other = DeviceFacts(kind="cpu", name="other", capability="riscv64")
    (plan,) = diagnose(machine(), [plan_for("onnxruntime", "1.24.0", other)]).plans
    assert plan.obstacle == f"this processor has {instruction_sets()}"


def test_a_plan_without_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan")
    with pytest.raises(PlanCorruptError, match="no readable manifest"):
        diagnose(machine(), [tmp_path / "model.plan"])


def test_releases_are_exact_unless_version_compatible() -> None:
    assert releases_for("11.1.0.106") == ["26.07"]
    assert releases_for("11.1.0.107") == []
    assert releases_for("11.0.0.114", version_compatible=True) == ["26.06", "26.07"]


# Looking


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Install a module for child processes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, source: str) -> None:
        path = tmp_path / name
        path.mkdir()
        (path / "__init__.py").write_text(source)

    return write


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("import os; os.kill(os.getpid(), 11)", "importing it crashed (SIGSEGV): it says nothing"),
        ("import os; print('abort', file=__import__('sys').stderr, flush=True); os._exit(3)", "exit code 3: abort"),
        ("import os; os._exit(0)", "importing it ended the process"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11"),
        ("import tensorrt_bindings_that_are_absent", "No module named 'tensorrt_bindings_that_are_absent'"),
        ("", "it is something else of that name"),
    ],
)
def test_a_library_that_kills_its_process_is_only_reported(
    installed: Callable[[str, str], None], source: str, detail: str
) -> None:
    installed("tensorrt", source)
    answer = run_probe("tensorrt")
    assert answer["state"] == "broken"
    assert detail in answer["detail"]


def test_a_library_that_hangs_is_given_up(installed: Callable[[str, str], None]) -> None:
    installed("tensorrt", "import time; time.sleep(60)")
    answer = run_probe("tensorrt", limit_s=0.5)
    assert answer == {"state": "broken", "detail": "it did not answer within 0.5 s"}


def test_what_a_library_prints_is_no_answer(installed: Callable[[str, str], None]) -> None:
    builder = "class Logger:\n    INTERNAL_ERROR = 0\n    def __init__(self, level): pass\n"
    builder += "class Builder:\n    def __init__(self, logger): raise RuntimeError('no GPU')\n"
    installed("tensorrt", f"print('hello')\n{builder}__version__ = '11.4.0.106'\n")
    answer = run_probe("tensorrt")
    assert answer["state"] == "ok"
    assert (answer["version"], answer["builder_error"]) == ("11.4.0.106", "no GPU")


def test_an_absent_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> dict[str, Any]:
        importlib.import_module("nothing_of_this_name.inside")
        return {}

    monkeypatch.setitem(probe.PROBES, "nothing", ("nothing_of_this_name", look))
    assert probe.answer("nothing") == {"state": "missing"}


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" ]; then echo "NVIDIA L4, 8.9, 23034, 550.54.15"; echo "NVIDIA H100 PCIe, 9.0, 81559, 550.54.15"\n'
        'else echo "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = ask_nvidia_smi()
    assert (found.version, found.cuda) == ("550.54.15", "12.4")
    assert [(gpu.name, gpu.capability) for gpu in found.gpus] == [("NVIDIA L4", "8.9"), ("NVIDIA H100 PCIe", "9.0")]
    assert found.gpus[0].memory_bytes == 23034 << 20


def test_nvidia_smi_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it couldn\'t communicate."\nexit 9\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_nvidia_smi().failure == "NVIDIA-SMI has failed because it couldn't communicate"


def test_the_driver_is_what_cuda_python_sees() -> None:
    smi = Driver(found_by="nvidia-smi", version="580.95.05", cuda="13.0", gpus=(L4, H100))
    seen = read_driver({"driver_cuda": "13.0", "gpus": [H100.model_dump()]}, smi)
    assert (seen.found_by, seen.version, seen.gpus) == ("cuda-python", "580.95.05", (H100,))
    hidden = read_driver({"gpus": [], "detail": "no CUDA-capable device is detected"}, smi)
    assert (hidden.found_by, hidden.detail) == ("nvidia-smi", "no CUDA-capable device is detected")
    nothing = read_driver({"gpus": [], "detail": "CUDA driver version is insufficient"}, Driver())
    assert (nothing.found_by, nothing.detail) == ("none", "there is no NVIDIA driver")


def test_a_server_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "tritonserver"
    binary = home / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    for backend in ("python", "tensorrt"):
        (home / "backends" / backend).mkdir(parents=True)
    (home / "TRITON_VERSION").write_text("2.69.0\n")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("TRT_VERSION", "10.16.1.11")
    monkeypatch.setattr(installation, "_CONTAINER_SERVER", binary)
    server = find_server()
    assert (server.origin, server.version, server.tensorrt) == ("container", "2.69.0", "10.16.1.11")
    assert server.backends == ("python", "tensorrt")


def test_a_cache_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    assert look_at_cache(tmp_path / "new").writable
    (tmp_path / "file").touch()
    below = look_at_cache(tmp_path / "file" / "trtdeploy")
    assert (below.writable, below.detail) == (False, "Not a directory")


# Showing


def shown(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_said_in_words_and_fits(plan_for: Callable[..., Path], width: int) -> None:
    seen = gpu_machine(H100, libraries={"tensorrt-rtx": ok("1.7.1.116", cuda="12")})
    text = shown(diagnose(seen, [plan_for("tensorrt", "11.0.0.114", on(L4))]), width)
    mends = [line for line in text.splitlines() if "to mend it: " in line]
    assert "  to mend it: pip install 'cuda-python==12.*'" in [line.rstrip() for line in mends]
    assert all(len(line) <= width for line in text.splitlines() if line not in mends)
    words = " ".join(text.split())
    for expected in (
        "GPU ok 9.0 NVIDIA H100 PCIe, 80 GiB",
        "tensorrt ok 10.16.1.11 for CUDA 13; builds and runs plans",
        "build --runtime tensorrt yes",
        "PROBLEM 1",
        "runs here no: TensorRT 10.16.1.11 is installed here",
        "Triton nvcr.io/nvidia/tritonserver:26.06-py3",
    ):
        assert expected in words, text


def test_a_healthy_machine_says_so(plan_for: Callable[..., Path]) -> None:
    assert "No problem was found." in shown(diagnose(machine()), 80)
    path = plan_for("tensorrt", "11.0.0.114", on(L4))
    assert "not every plan above runs here" in shown(diagnose(machine(), [path]), 80)
