"""What a check has to say about one place in a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One rule that a config breaks.

    Attributes:
        where: The field, as a path: ``input[0].dims``.
        message: What is there and what Triton expects.
        hint: How to mend it.
        severity: "error" if Triton refuses the config, or requests would fail; "warning" if it only disappoints.
    """

    where: str
    message: str
    hint: str = ""
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}" + (f" {self.hint}" if self.hint else "")
