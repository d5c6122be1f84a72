"""`QuantReport`: what became of each parameter of a model that was quantised, in bytes and in error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["KeptTensor", "PackedTensor", "QuantReport"]


@dataclass(frozen=True)
class PackedTensor:
    """A matrix, or a stack of them, that was packed: sizes in bytes, and the largest ‖W − Ŵ‖ / ‖W‖ of its matrices."""

    name: str
    format: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class KeptTensor:
    """A parameter that was not packed, and why."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    why: str


@dataclass(frozen=True)
class QuantReport:
    """What `quantise` did: every parameter is in one of the two lists."""

    packed: tuple[PackedTensor, ...]
    kept: tuple[KeptTensor, ...]

    @classmethod
    def of(cls, tensors: Iterable[PackedTensor | KeptTensor]) -> QuantReport:
        """Of tensors of both kinds."""
        every = list(tensors)
        packed = tuple(each for each in every if isinstance(each, PackedTensor))
        return cls(packed, tuple(each for each in every if isinstance(each, KeptTensor)))

    @property
    def tensors(self) -> tuple[PackedTensor | KeptTensor, ...]:
        """Both lists."""
        return (*self.packed, *self.kept)

    @property
    def bytes_before(self) -> int:
        return sum(each.bytes_before for each in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(each.bytes_after for each in self.tensors)

    @property
    def expert_bytes(self) -> tuple[int, int]:
        """Bytes of routed experts that were packed, and of all there are."""
        experts = [each for each in self.packed if len(each.shape) == 3]
        covered = sum(each.bytes_before for each in experts)
        return covered, covered + sum(each.bytes_before for each in self.kept if len(each.shape) == 3)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model."""
        weights = sum(math.prod(each.shape) for each in self.tensors)
        return 8 * self.bytes_after / max(weights, 1)

    def worst(self, count: int = 5) -> list[PackedTensor]:
        """Those with the largest relative errors, largest first."""
        return sorted(self.packed, key=lambda each: -each.error)[:count]

    def to_dict(self) -> dict[str, Any]:
        covered, all_experts = self.expert_bytes
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "expert_bytes": all_experts,
            "expert_bytes_packed": covered,
            "packed": [asdict(each) for each in self.packed],
            "kept": [asdict(each) for each in self.kept],
        }
