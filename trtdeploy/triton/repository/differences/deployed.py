"""What packaging a plan would change in a repository: the config as a unified diff, and the versions."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trtdeploy.files import sha256_file
from trtdeploy.plan import read_plan
from trtdeploy.triton.config import (
    DeviceMemory,
    Finding,
    PackageOptions,
    check_config,
    config_text,
    make_config,
    predicted_memory,
)
from trtdeploy.triton.repository.differences.ensembles import misfits
from trtdeploy.triton.repository.layout import CONFIG_FILE, active_version, check_name, read_config, versions


@dataclass(frozen=True)
class Comparison:
    """A plan and its options against what is deployed.

    Attributes:
        config_diff: Unified diff of the config without its version policy, deployed first; empty if it is the same.
        deployed_as: The versions that hold this very plan.
        active: The version that is served; None if there is none.
        findings: What the checker says of the new config, and what would no longer fit in ensembles that run the model.
        memory: Predicted device memory.
    """

    config_diff: str
    deployed_as: tuple[int, ...]
    active: int | None
    findings: tuple[Finding, ...]
    memory: DeviceMemory

    @property
    def same(self) -> bool:
        """Whether the plan is served with this very config, and Triton will take it."""
        refused = any(finding.severity == "error" for finding in self.findings)
        return not self.config_diff and self.active in self.deployed_as and not refused


def compare(
    plan: str | Path,
    repository: str | Path,
    name: str,
    options: PackageOptions | None = None,
    *,
    replacing: Collection[str] = (),
) -> Comparison:
    """Compare a plan with what is deployed; nothing is written.

    Args:
        plan: A plan with its manifest.
        repository: The model repository.
        name: Model name in Triton.
        options: How it shall be served.
        replacing: Ensembles that need not fit, for they would be replaced too.

    Raises:
        PlanCorruptError: The plan does not match its manifest.
        ModelError: It cannot be served with these options.
        RepositoryError: The name is impossible, or the deployed config is damaged.
    """
    check_name(name, None)
    options = options or PackageOptions()
    folder = Path(repository) / name
    _, manifest = read_plan(plan)
    config = make_config(manifest, name, options)
    findings = (*check_config(config), *misfits(Path(repository), name, config, None, replacing=replacing))
    deployed = ""
    if (folder / CONFIG_FILE).exists():
        there = read_config(folder)
        if options.version_policy is None:
            there.ClearField("version_policy")
        deployed = config_text(there)
    lines = difflib.unified_diff(
        deployed.splitlines(), config_text(config).splitlines(), f"deployed/{name}", f"new/{name}", lineterm=""
    )
    same = [
        number
        for number in versions(folder)
        for file in (folder / str(number)).glob("*.plan")
        if sha256_file(file) == manifest.plan_sha256
    ]
    return Comparison(
        "\n".join(lines), tuple(same), active_version(folder), findings, predicted_memory(manifest, options)
    )
