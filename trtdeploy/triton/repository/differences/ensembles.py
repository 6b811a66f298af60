"""Whether a model still fits the ensembles of its repository that run it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from trtdeploy.errors import RepositoryError
from trtdeploy.onnxgraph.reading.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.triton.config import Finding
from trtdeploy.triton.config.check.ensembles import edge_findings
from trtdeploy.triton.repository.differences.facts import label_difference, parameter, preprocessing_difference
from trtdeploy.triton.repository.layout import CONFIG_FILE, read_config


def ensembles_over(root: Path, name: str) -> dict[str, Any]:
    """Return the configs of the ensembles in a repository that run a model, by name.

    Raises:
        RepositoryError: A config in the repository is damaged.
    """
    found = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.name != name and (path / CONFIG_FILE).is_file():
            config = read_config(path)
            if any(step.model_name == name for step in config.ensemble_scheduling.step):
                found[path.name] = config
    return found


def misfits(
    root: Path, name: str, config: Any, version: int | None, *, replacing: Collection[str] = ()
) -> list[Finding]:
    """Say what would break in the ensembles that run a model if it were served so.

    Triton checks shapes when it loads an ensemble; that the images are still prepared as the model was trained, and its
    classes still called by their names, it cannot know.

    Args:
        root: The repository.
        name: The model.
        config: The ``ModelConfig`` that it would be served with.
        version: The version that would be served; None if that is not known yet.
        replacing: Ensembles that are about to be replaced, and so need not fit.

    Raises:
        RepositoryError: A config in the repository is damaged.
    """
    found = []
    for ensemble, its in ensembles_over(root, name).items():
        if ensemble in replacing:
            continue
        edges = edge_findings(its, root / ensemble, instead={name: config})
        found += [Finding(f"{ensemble}.{edge.where}", edge.message, edge.hint) for edge in edges]
        for index, step in enumerate(its.ensemble_scheduling.step):
            if step.model_name != name:
                continue
            where = f"{ensemble}.ensemble_scheduling.step[{index}]"
            if version is not None and step.model_version > 0 and step.model_version != version:
                message = f"it runs version {step.model_version} of {name}, which would not be served."
                found.append(Finding(f"{where}.model_version", message, "Let it run the newest: model_version: -1"))
            found += [Finding(where, message) for message in _facts(root, its, step, config)]
    return found


def check_fit(root: Path, name: str, config: Any, version: int | None, *, replacing: Collection[str] = ()) -> None:
    """Refuse what ``misfits`` finds.

    Raises:
        RepositoryError: It found something; the message says what.
    """
    found = misfits(root, name, config, version, replacing=replacing)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RepositoryError(
            f"An ensemble in {root} would no longer fit {name}: {found[0].where}: {found[0].message}{more}",
            hint=f"{found[0].hint} Or package the plan with --ensemble under another name.".strip(),
        )


def _facts(root: Path, ensemble: Any, ours: Any, config: Any) -> Iterator[str]:
    """Compare what the steps next to ours were made with to what our model was made with."""
    read, written = set(ours.input_map.values()), set(ours.output_map.values())
    for step in ensemble.ensemble_scheduling.step:
        if step == ours or not (root / step.model_name / CONFIG_FILE).is_file():
            continue
        other = read_config(root / step.model_name)
        if read & set(step.output_map.values()) and parameter(other, PREPROCESSING_KEY) is not None:
            difference = preprocessing_difference(other, config)
            if difference:
                yield f"{step.model_name} prepares images otherwise than this model was made for: {difference}."
        if written & set(step.input_map.values()) and parameter(other, LABELS_KEY) is not None:
            difference = label_difference(other, config)
            if difference and parameter(config, LABELS_KEY) is not None:
                yield f"{step.model_name} has other labels than this model: {difference}."
