"""A model's ``config.pbtxt``: how it is asked for, derived from a plan, and checked before a server sees it."""

from trtdeploy.triton.config.check import Finding, Severity, check_config
from trtdeploy.triton.config.memory import DeviceMemory, predicted_memory
from trtdeploy.triton.config.options import CONTEXTS_KEY, DEFAULT_MAX_BATCH_SIZE, PackageOptions, read_options
from trtdeploy.triton.config.render import LABELS_FILE, config_text, make_config, render_config
from trtdeploy.triton.config.schema import schema

__all__ = [
    "CONTEXTS_KEY",
    "DEFAULT_MAX_BATCH_SIZE",
    "LABELS_FILE",
    "DeviceMemory",
    "Finding",
    "PackageOptions",
    "Severity",
    "check_config",
    "config_text",
    "make_config",
    "predicted_memory",
    "read_options",
    "render_config",
    "schema",
]
