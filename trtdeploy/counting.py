"""Numbers of things as people write them."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return ``1 finding`` or ``2 findings``, for a noun whose plural takes an s."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
