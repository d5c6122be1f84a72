"""`Finding`: one mistake, or one thing worth knowing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level"]

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One mistake, or one thing worth knowing.

    Attributes:
        level: error: the run would learn nothing or fail; warning: it would learn something else than was meant;
            note: it depends.
        name: the same for the same mistake everywhere.
        seen: what the configuration says.
        cause: what comes of it.
        remedy: what to set instead.
    """

    level: Level
    name: str
    seen: str
    cause: str
    remedy: str
