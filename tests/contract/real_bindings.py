"""TensorRT's real Python bindings, importable without TensorRT, and typed stubs of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.contract.fetch_bindings import VERSIONS, wheel_in

RTX = "tensorrt_rtx"
ALL = (*VERSIONS, RTX)
WHEELS = Path(sys.prefix) / "bindings"
# What the module looks up when it is imported. Nothing but the version is called before an object is made.
_ENTRY_POINTS = """
int getNvOnnxParserVersion(void) { return 1; }
#define ENTRY(name) void *name(void) { return 0; }
ENTRY(createInferBuilder_INTERNAL) ENTRY(createInferRefitter_INTERNAL) ENTRY(createInferRuntime_INTERNAL)
ENTRY(createNvOnnxParserRefitter_INTERNAL) ENTRY(createNvOnnxParser_INTERNAL) ENTRY(getBuilderPluginRegistry)
ENTRY(getPluginRegistry) ENTRY(getLogger) ENTRY(getInferLibVersion) ENTRY(initLibNvInferPlugins)
"""
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


class Missing(Exception):
    """Something that these tests need is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Stubs:
    """Typed stubs of one version.

    Attributes:
        version: One of ``ALL``.
        folder: Holds a package ``tensorrt``, whichever library it describes: the product imports it under that name.
    """

    version: str
    folder: Path

    @property
    def text(self) -> str:
        """The stub itself."""
        return (self.folder / "tensorrt" / "__init__.pyi").read_text()


def make_stubs(version: str, folder: Path) -> Stubs:
    """Describe one version of the bindings.

    Raises:
        Missing: Its wheel, a C compiler or the installed library is not there.
    """
    environment = dict(os.environ)
    if version == RTX:
        if importlib.util.find_spec(RTX) is None:
            raise Missing("tensorrt_rtx is not installed: pip install 'trtdeploy[rtx]'")
        module = RTX
    else:
        module = "tensorrt_bindings"
        site = _unpack(version, folder / "site")
        environment |= {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(site)}
    target = folder / "tensorrt" / "__init__.pyi"
    target.parent.mkdir(parents=True)
    script = Path(__file__).with_name("typed_stubs.py")
    subprocess.run([sys.executable, str(script), module, str(target)], env=environment, check=True)
    return Stubs(version, folder)


def _unpack(version: str, site: Path) -> Path:
    """Unpack a wheel, and put empty libraries beside it under the names that it links to."""
    wheel = wheel_in(WHEELS, version)
    if wheel is None:
        raise Missing(
            f"the bindings of TensorRT {version} are not in {WHEELS}: python tests/contract/fetch_bindings.py {WHEELS}"
        )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Missing("there is no C compiler (cc, gcc or clang) to make the empty libraries that the bindings link to")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    major = version.partition(".")[0]
    first = site / f"lib{_LIBRARIES[0]}.so.{major}"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(first)]
    subprocess.run(command, input=_ENTRY_POINTS, text=True, check=True)
    for name in _LIBRARIES[1:]:
        shutil.copyfile(first, site / f"lib{name}.so.{major}")
    return site
