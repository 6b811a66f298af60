"""Where a server serves something else than its repository says."""

from __future__ import annotations

from pathlib import Path

from trtdeploy.triton.client import ConnectionOptions
from trtdeploy.triton.client.model_control import ModelControl
from trtdeploy.triton.config import Finding
from trtdeploy.triton.repository.layout import model_names, served_versions
from trtdeploy.triton.repository.live_promotion import candidates


def find_drift(
    repository: str | Path, url: str, *, options: ConnectionOptions | None = None
) -> list[tuple[str, Finding]]:
    """Compare what a server serves with what its repository says; nothing is changed.

    Args:
        repository: The repository that the server serves.
        url: ``http://host:port`` of the server.
        options: Certificates and headers for it.

    Returns:
        Pairs of a model and what is wrong with it: versions that are served and should not be, or the other way round,
        and candidates that a killed promotion has left. A model that nobody has loaded is a warning.

    Raises:
        ServerError: The server does not answer, or gives no list of its models.
        RepositoryError: There is no such repository, or a config in it is damaged.
    """
    root, where = Path(repository), f"server at {url}"
    control = ModelControl(url, options=options)
    loaded, reasons = control.loaded(), control.reasons()
    found = []
    for name in model_names(root):
        ready, wanted = loaded.get(name, []), served_versions(root / name)
        reason = reasons.get(name, "unloaded")
        if not ready:
            failed = reason != "unloaded"
            message = "No version is served" + (f": {reason}" if failed else ".")
            found.append((name, Finding(where, message, severity="error" if failed else "warning")))
        elif ready != wanted:
            message = f"Served is version {_listed(ready)}; the repository names {_listed(wanted)}."
            hint = f"trtdeploy promote --name {name} --repository {root} --version {max(wanted)} --url {url}"
            found.append((name, Finding(where, message, hint if wanted else "")))
    for name, candidate in candidates(loaded):
        message = f"{candidate} is loaded: a promotion was killed, or is still running."
        found.append((name, Finding(where, message, f"The next promote or rollback of {name} there takes it out.")))
    return found


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
