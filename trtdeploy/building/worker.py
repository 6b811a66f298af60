"""The child's side of ``child_process``: one job from stdin, reports on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from trtdeploy.building.build import BuildConfig, InputSource, build
from trtdeploy.errors import TrtDeployError


def main() -> int:
    """Read a job from stdin, build, report on stdout."""
    # whatever a library prints on stdout, from C too, must not get between the lines
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict[str, Any]) -> None:
        report.write(json.dumps(message) + "\n")
        report.flush()

    job = json.load(sys.stdin)
    try:
        build(
            job["model"],
            job["output"],
            BuildConfig.model_validate(job["config"]),
            inputs=InputSource.model_validate(job["inputs"]),
            ledger=job["ledger"],
            progress=lambda phase, done, total: tell({"progress": [phase, done, total]}),
        )
    except TrtDeployError as error:
        facts = {"type": type(error).__name__, "message": error.message}
        tell({"error": {**facts, "hint": error.hint, "log_lines": list(error.log_lines)}})
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    tell({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
