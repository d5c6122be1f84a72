"""`Arch`, a family of models as one row of data, and `ARCHS`, the table of them.

A row knows names and numbers, no tensors: torch is never imported in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.config import ModelConfig
from moekit.models.keys import Keys
from moekit.models.layout import Layout
from moekit.registry import Registry

__all__ = ["ARCHS", "Arch"]


@dataclass(frozen=True)
class Arch:
    """A family: how its configuration and its tensors are read and written.

    Attributes:
        model_type: in config.json.
        architecture: the transformers class that loads it.
        defaults: values of keys that config.json may leave out.
        read: config.json's keys to the fields of `ModelConfig` that are the family's own; they outdo the common ones.
        write: those fields back to config.json's keys.
        hf: names in safetensors files.
        names: what the family calls common keys: {"hidden_size": "n_embd"}.
        absent: common keys that its config.json does not have.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    hf: Layout
    names: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def register(self) -> None:
        """Put the row into the table, under its model_type."""
        ARCHS.register(self.model_type)(self)


ARCHS: Registry[Arch] = Registry("architecture")
