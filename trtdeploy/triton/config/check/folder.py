"""The files of a model: versions, the model file of each, labels; and nothing that leads out of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtdeploy.triton.config.check.finding import Finding

_MODEL_FILES = {"python": "model.py", "tensorrt": "model.plan", "onnxruntime": "model.onnx"}


def folder_findings(config: Any, folder: Path) -> Iterator[Finding]:
    """Check that all that the config names is there."""
    root = folder.parent.resolve()
    if not folder.resolve().is_relative_to(root):
        yield Finding(str(folder), f"it leads out of the repository, to {folder.resolve()}.", "Copy the files instead.")
        return
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            yield Finding(str(path), f"it leads out of the repository, to {path.resolve()}.", "Copy the file instead.")
    for index, tensor in enumerate(config.output):
        label = tensor.label_filename
        if label and (not (folder / label).is_file() or not (folder / label).resolve().is_relative_to(root)):
            yield Finding(f"output[{index}].label_filename", f"there is no file {label} in {folder}.", "Add it.")
    yield from _versions(config, folder)


def _versions(config: Any, folder: Path) -> Iterator[Finding]:
    there = sorted(
        int(path.name) for path in folder.glob("[1-9]*") if path.is_dir() and re.fullmatch(r"\d+", path.name)
    )
    if not there:
        yield Finding(str(folder), "it holds no version.", "Make one: trtdeploy publish PLAN --name N --repository DIR")
        return
    policy = config.version_policy
    chosen = policy.WhichOneof("policy_choice")
    if chosen == "specific":
        served = list(policy.specific.versions)
        missing = [version for version in served if version not in there]
        if missing:
            yield Finding("version_policy.specific", f"there is no version {missing}; there are {there}.")
    elif chosen == "all":
        served = there
    else:
        served = there[-(policy.latest.num_versions or 1) :]
    name = config.default_model_filename or _MODEL_FILES.get(config.backend, "")
    names = {name, *config.cc_model_filenames.values()} - {""}
    for version in served:
        if config.platform == "ensemble" or version not in there:
            continue
        for wanted in sorted(names):
            if not (folder / str(version) / wanted).is_file():
                yield Finding(f"version {version}", f"there is no file {wanted} in {folder / str(version)}.")
