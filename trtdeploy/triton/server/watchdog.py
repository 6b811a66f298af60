"""Ending a server whose owner was killed and could not do it."""

from __future__ import annotations

import contextlib
import math
import subprocess

# End of file without a word before it: the owner is gone. The group is asked to end, then made to.
_SCRIPT = """
if read -r word; then exit 0; fi
kill -s TERM -- "-$1" 2>/dev/null || exit 0
left="$2"
while [ "$left" -gt 0 ] && kill -s 0 -- "-$1" 2>/dev/null; do sleep 0.2; left=$((left - 1)); done
kill -s KILL -- "-$1" 2>/dev/null
exit 0
"""
_TRIES_PER_SECOND = 5


class Watchdog:
    """A small process that ends a process group when its own standard input, which only we hold, is closed.

    The kernel closes it however we end, by SIGKILL too. PR_SET_PDEATHSIG would do less: it goes by the thread that
    started the server, not by the process, and reaches no child of the server.

    Args:
        group: The process group.
        grace_s: How long the group may take to end when it is asked to.
    """

    def __init__(self, group: int, *, grace_s: float) -> None:
        tries = math.ceil(grace_s * _TRIES_PER_SECOND)
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "watchdog", str(group), str(tries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        """Send it home: the group has ended in order."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            self._process.communicate(b"done\n")
        self._process.wait()
