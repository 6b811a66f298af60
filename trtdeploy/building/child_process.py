"""A build in a process of its own: a crash of the builder, or memory that it leaks, ends with that process.

Parent and child speak JSON: the job on the child's stdin, one line per step of progress and one for the end on its
stdout (``worker``). The child writes plan and manifest itself, as atomically as ever.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtdeploy import errors
from trtdeploy.building.real_inputs import InputSource
from trtdeploy.errors import BuildError, TrtDeployError
from trtdeploy.module_command import module_command
from trtdeploy.plan import Plan, read_manifest
from trtdeploy.runtimes.base import BuildProgress
from trtdeploy.runtimes.config import BuildConfig

logger = logging.getLogger(__name__)

_GRACE_S = 30.0


def build_in_child(
    model: Path,
    output: Path,
    config: BuildConfig,
    *,
    inputs: InputSource,
    ledger: Path | None,
    progress: BuildProgress | None,
) -> Plan:
    """Build as ``trtdeploy.build`` does, in a child process.

    Raises:
        TrtDeployError: What the build raised in the child.
        BuildError: The child crashed; plan and manifest are as they were.
    """
    job = {
        "model": str(model),
        "output": str(output),
        "config": config.model_copy(update={"isolate": False}).model_dump(mode="json"),
        "inputs": inputs.model_dump(mode="json"),
        "ledger": None if ledger is None else str(ledger),
    }
    command = module_command("trtdeploy.building.worker")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            _hand_over(child, job)
            outcome = _follow(child.stdout or (), progress)
            code = child.wait()
        except BaseException:
            _end(child)
            raise
    if "error" in outcome:
        raise _rebuilt(outcome["error"])
    if "done" not in outcome:
        raise BuildError(
            f"The process that built {model} ended with {_describe(code)} before it had a plan.",
            hint="Its last words are above. Fewer options, or another version of the runtime, may avoid the crash.",
        )
    if code != 0:
        # the plan is complete: what crashed is the library's own clean-up
        logger.warning("the process that built %s ended with %s after its work was done", model, _describe(code))
    return Plan(output, read_manifest(output))


def _hand_over(child: subprocess.Popen[str], job: dict[str, Any]) -> None:
    if child.stdin is not None:
        # one that ended before it read the job says why by its exit code
        with suppress(BrokenPipeError), child.stdin:
            json.dump(job, child.stdin)


def _follow(lines: Iterable[str], progress: BuildProgress | None) -> dict[str, Any]:
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "progress" not in message:
            return message
        if progress:
            phase, done, total = message["progress"]
            progress(phase, done, total)
    return {}


def _end(child: subprocess.Popen[str]) -> None:
    """Let the child cancel its build; a builder that does not answer is killed."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _rebuilt(facts: dict[str, Any]) -> TrtDeployError:
    kind = getattr(errors, facts["type"], BuildError)
    rebuilt = kind(facts["message"], hint=facts["hint"], log_lines=facts["log_lines"])
    if not isinstance(rebuilt, TrtDeployError):
        return BuildError(facts["message"])
    return rebuilt


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
