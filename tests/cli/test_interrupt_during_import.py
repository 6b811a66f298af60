"""Ctrl-C while a module is being imported: some extension modules print the exception of an import, or swallow it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SWALLOWS = """
import sys, time
print("importing", flush=True)
try:
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)
except BaseException as error:
    print("swallowed", error, flush=True)
"""
RUNS = """
import signal, threading
from trtdeploy.cli.console import interrupt
signal.signal(signal.SIGINT, interrupt)
try:
    import swallows
    threading.Event().wait(200)  # a wait that only a signal to this very thread ends
    print("not interrupted")
except KeyboardInterrupt as error:
    print("caught", error)
"""


def test_the_signal_waits_for_the_end_of_the_import(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{RUNS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert output == "caught Interrupted.\n"
