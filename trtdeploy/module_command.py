"""Starting a module of ours in a process of its own, whatever lies in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

# ``python -m`` searches the current folder first: a user's own training.py or trtdeploy.py there would be run instead.
# Where ours lie is searched last, so that nothing installed beside them can stand for a module of Python.
_RUN = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv.pop(1)]; "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module, as ``python -m`` would without a current folder."""
    return [sys.executable, "-c", _RUN, str(Path(__file__).parents[1]), module, *arguments]
