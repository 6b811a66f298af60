"""Patterns of the names of layers, as ``--skip`` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from trtdeploy.errors import UsageError


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns (``fnmatch``, case counts) matches the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(patterns: Sequence[str], names: Iterable[str], *, kind: str) -> None:
    """Refuse a pattern of ``--skip`` that matches nothing.

    Args:
        patterns: What was given.
        names: What they may match.
        kind: What these are the names of, for example ``layer that could be quantized``.

    Raises:
        UsageError: A pattern matches no name; the message has the nearest ones.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise UsageError(f"--skip {pattern} matches no {kind}. Near names: {', '.join(near) or 'none'}.")
