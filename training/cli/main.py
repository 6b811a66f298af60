"""``trtdeploy train``, also ``python -m training``: from images to a float, PTQ or QAT checkpoint, and to Q/DQ ONNX.

Each command has a module of its name, which parses options, calls the function of the same name and prints. torch is
imported inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from training.cli.auto import auto
from training.cli.calibrate import calibrate
from training.cli.console import log_to_stderr
from training.cli.evaluate import evaluate
from training.cli.export import export
from training.cli.fit import fit
from training.cli.qat import qat
from training.cli.sensitivity import sensitivity
from trtdeploy.errors import RuntimeUnavailableError

_EXTRA_OF = {
    "torch": "training",
    "pytorch_quantization": "training",
    "safetensors": "training",
    "sklearn": "training",
    "modelopt": "modelopt",
}

app = typer.Typer(
    name="training",
    help="Train, quantize and export image classifiers.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (fit, calibrate, qat, export, evaluate, sensitivity, auto):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None, *, name: str = "training") -> None:
    """Run the command line.

    Args:
        arguments: What follows the command's name; by default what this process was started with.
        name: What messages call the command.
    """
    # Read by torch's OpenMP runtime when it is loaded. By default its workers spin for milliseconds between two
    # operations; on a machine whose cores are shared they then keep each other from running, and training gets
    # many times slower. This bounds the spinning to microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    log_to_stderr()
    try:
        app(args=None if arguments is None else list(arguments), prog_name=name)
    except SystemExit as ended:
        if not ended.code and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            _leave()
        raise
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_OF:
            raise
        missing = RuntimeUnavailableError(
            f"This command needs {error.name}, which is not installed.",
            hint=f"pip install 'trtdeploy[{_EXTRA_OF[error.name]}]'",
        )
        typer.echo(f"error: {missing}", err=True)
        sys.exit(missing.exit_code)


def _leave() -> NoReturn:
    """End one of several workers, whose work is done, without taking torch apart.

    On a busy machine a thread of torch's may still be there when the interpreter destroys what it belongs to; then the
    process ends with SIGABRT ("terminate called without an active exception"), and torchrun calls the job failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
