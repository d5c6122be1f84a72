"""Which experts of a store were hot, remembered between runs: what `ExpertCache` gives as heat and takes back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from moekit.adapt.store import Key, Store
from moekit.files import recall, remember

__all__ = ["load_heat", "save_heat"]


def load_heat(store: Store) -> dict[Key, float]:
    """The heat saved for a store with these experts, wherever it lies; empty if there is none."""
    heat = {}
    for name, share in recall(_file(store)).items():
        found = re.fullmatch(r"(\d+)/(\d+)", name)
        if found and isinstance(share, float | int) and math.isfinite(share) and 0 <= share <= 1:
            key = int(found[1]), int(found[2])
            if key in store.extents:
                heat[key] = float(share)
    return heat


def save_heat(store: Store, heat: Mapping[Key, float]) -> None:
    """Keep the heat of `ExpertCache.heat` for the next run, where the user's cache folder can be written."""
    remember(_file(store), {f"{layer}/{expert}": round(share, 6) for (layer, expert), share in heat.items()})


def _file(store: Store) -> str:
    return f"heat/{store.identity}.json"
