"""Options that users write as YAML (or JSON)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trtdeploy.errors import UsageError


def read_yaml(path: str | Path, *, what: str = "options", example: str) -> dict[str, Any]:
    """Return the options in a file by name; an empty file has none.

    Args:
        path: The file, UTF-8.
        what: What the file shall hold, for the message.
        example: A line of it, likewise.

    Raises:
        UsageError: The file cannot be read, is not YAML, or holds no names with values.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, no {what}; expected for example: {example}")
    return {str(key): value for key, value in content.items()}
