"""Published models: their configurations, shipped with moekit, and the sizes that their publishers state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moekit.config import ModelConfig
from moekit.config.base import from_dict
from moekit.errors import UnknownNameError, shown
from moekit.files import read_json
from moekit.models.archs import config_from_hf, read_config
from moekit.plan.count import parameters
from moekit.plan.switch import SwitchConfig
from moekit.plan.tensors import AnyConfig

__all__ = ["Published", "find", "published"]

_FOLDER = Path(__file__).parent / "configs"
Convention = Literal["all", "without input embeddings"]


@dataclass(frozen=True)
class Published:
    """A model as published.

    Attributes:
        name: what `find` and `moekit plan` call it.
        repository: on the Hugging Face Hub; None where there is none.
        config: from there, or from the paper.
        total, active: parameters as stated; active None where no number is.
        total_counts, active_counts: what the publisher counts.
        source: of the figures.
        note: what else one should know.
    """

    name: str
    repository: str | None
    config: AnyConfig
    total: float
    active: float | None
    total_counts: Convention
    active_counts: Convention
    source: str
    note: str

    @property
    def differences(self) -> tuple[float, float | None]:
        """Our count over the published one, less 1, for total and active, counted as the publisher does."""
        count = parameters(self.config)
        total = count.total if self.total_counts == "all" else count.total_without_embeddings
        active = count.active if self.active_counts == "all" else count.active_without_embeddings
        return total / self.total - 1, None if self.active is None else active / self.active - 1


@cache
def published() -> Mapping[str, Published]:
    """All of them, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.json"))}


def find(name: str | os.PathLike[str]) -> tuple[AnyConfig, Published | None]:
    """The configuration that `name` means, and what was published of it if moekit ships that.

    Args:
        name: a path (folder, config.json or .gguf); else the name, or the Hub's, of a shipped one; else a
            repository whose config.json is in the local Hugging Face cache. Nothing is downloaded.
    Raises:
        UnknownNameError: it is none of these.
        FileError, FormatError, UnsupportedError: as `read_config`.
    """
    if Path(name).exists():
        return _read_path(Path(name)), None
    wanted = os.fspath(name)
    for each in published().values():
        if wanted.lower() in (each.name, (each.repository or "").lower()):
            return each.config, each
    cached = _cached(wanted)
    if cached is None:
        raise UnknownNameError(
            f"{shown(wanted)} is no file, no configuration that moekit ships ({', '.join(published())}), and not in "
            "the Hugging Face cache: `moekit pull` downloads a model"
        )
    return _read_path(cached), None


def _read(path: Path) -> Published:
    values = read_json(path)
    config: AnyConfig
    if "config" in values:
        config = _from_hf(values.pop("config"), str(path))
    else:  # no transformers class describes it
        config = from_dict(ModelConfig, values.pop("model"), source=str(path))
    return from_dict(Published, {**values, "name": path.stem, "config": config}, source=str(path))


def _read_path(path: Path) -> AnyConfig:
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.exists():
        return _from_hf(read_json(file), str(file))
    return read_config(path)


def _from_hf(values: Mapping[str, Any], source: str) -> AnyConfig:
    if values.get("model_type") == "switch_transformers":
        return SwitchConfig.from_hf(values, source)
    return config_from_hf(values, source)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
