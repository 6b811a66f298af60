"""Read tensors from other people's files without ever running code that is in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtdeploy.errors import CheckpointError

_SHOWN_KEYS = 4


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from error


def read_metadata(path: Path, key: str) -> str | None:
    """Return one entry of a safetensors file's metadata, None if it is not there.

    Raises:
        CheckpointError: The file is corrupt.
    """
    with _safetensors(path) as stream:
        text: str | None = (stream.metadata() or {}).get(key)
        return text


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: The file is corrupt.
    """
    with _safetensors(path) as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a mapping


def read_torch(path: Path) -> dict[str, Tensor]:
    """Return the state dict in what ``torch.save`` wrote: bare, or under ``state_dict`` or ``model``.

    Raises:
        CheckpointError: There is none, or the file is corrupt or holds more than tensors and primitives.
    """
    content = load_weights_only(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds {type(content).__name__}; expected a state dict, bare or under 'state_dict' or 'model'."
        )
    strangers = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers:
        raise CheckpointError(f"{path} is not a state dict: {shown(strangers)} hold no tensor.")
    prefix = "module."  # left by DataParallel
    if all(key.startswith(prefix) for key in content):
        return {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def load_weights_only(path: Path) -> Any:
    """Read what ``torch.save`` wrote, if it is made of tensors and primitives; no code in the file is ever run.

    Raises:
        CheckpointError: It is corrupt, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file makes the reader fail in many ways; all of them mean the same
        # before its reason, torch advises to load the file unsafely
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{path} cannot be loaded as tensors only: {reason}",
            hint="It is damaged, or a pickle that could run code, which is never done here. "
            "Save the state dict alone: torch.save(model.state_dict(), ...), or use safetensors.",
        ) from error


def refuse_non_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ``CheckpointError`` if a weight is NaN or infinite; ``path`` is for the message."""
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{path}: {len(broken)} tensors hold NaN or infinity: {shown(broken)}.")


def shown(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f", and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return ", ".join(names[:_SHOWN_KEYS]) + more
