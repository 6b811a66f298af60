"""What packaging a plan with its pipeline would change in a repository: each of the models as a unified diff."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from trtdeploy.plan import read_manifest
from trtdeploy.triton.config import PackageOptions, config_text, make_config
from trtdeploy.triton.pipeline.package import DEFAULT_TOP_K, SOURCES, make_pipeline
from trtdeploy.triton.repository.differences.deployed import Comparison, compare
from trtdeploy.triton.repository.layout import CONFIG_FILE, read_config


@dataclass(frozen=True)
class PipelineComparison:
    """A plan and the pipeline around it against what is deployed.

    Attributes:
        model: The model itself.
        parts: Unified diff of the config and the code of every other model of the pipeline, deployed first; empty where
            it is the same.
    """

    model: Comparison
    parts: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether all is deployed as it would be packaged, and Triton will take it."""
        return self.model.same and not any(self.parts.values())


def compare_pipeline(
    plan: str | Path,
    repository: str | Path,
    name: str,
    options: PackageOptions | None = None,
    *,
    top_k: int = DEFAULT_TOP_K,
) -> PipelineComparison:
    """Compare a plan and its pipeline with what is deployed; nothing is written. See ``package_pipeline``.

    Raises:
        ModelError: The plan cannot be served with these options, or is no classifier of images.
        TrtDeployError: What ``compare`` raises.
    """
    root, options = Path(repository), options or PackageOptions()
    manifest = read_manifest(plan)
    configs = make_pipeline(manifest, name, make_config(manifest, name, options), top_k)
    model = compare(plan, root, name, options, replacing=[config.name for config in configs])
    parts = {}
    for config, source in zip(configs, SOURCES, strict=True):
        folder = root / config.name
        deployed = config_text(read_config(folder)) if (folder / CONFIG_FILE).exists() else ""
        diff = _diff(deployed, config_text(config), f"{config.name}/{CONFIG_FILE}")
        if source is not None:
            code = folder / "1" / "model.py"
            there = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
            diff += _diff(there, source.read_text(encoding="utf-8"), f"{config.name}/1/model.py")
        parts[config.name] = "\n".join(diff)
    return PipelineComparison(model, parts)


def _diff(deployed: str, new: str, what: str) -> list[str]:
    lines = (deployed.splitlines(), new.splitlines())
    return list(difflib.unified_diff(*lines, f"deployed/{what}", f"new/{what}", lineterm=""))
