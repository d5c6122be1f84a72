"""How one model is made of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.config.base import check, choice, positive

__all__ = ["UpcycleConfig"]


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model's MLPs become experts."""

    method: Literal["copy", "noise", "split"] = "split"
    """copy: every expert is the dense MLP; noise: the same plus noise; split: experts are slices of it."""
    num_experts: int = 8
    top_k: int = 2
    splits: int = 2
    """Slices one dense MLP is cut into (method split); top_k must be a multiple of it to stay exact."""
    noise: float = 0.01
    """Standard deviation added to each copied weight, relative to that matrix's own (method noise)."""
    router_init_scale: float = 0.1
    """Router rows start as N(0, scale / D)."""
    seed: int = 0

    def __post_init__(self) -> None:
        choice(self, "method", ("copy", "noise", "split"))
        positive(self, "num_experts", "top_k", "splits")
        check(
            self.top_k <= self.num_experts, f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}"
        )
        check(self.noise >= 0, f"noise must be at least 0, not {self.noise}")
        check(self.router_init_scale >= 0, f"router_init_scale must be at least 0, not {self.router_init_scale}")
        if self.method == "split":
            check(
                self.num_experts % self.splits == 0,
                f"num_experts ({self.num_experts}) must be a multiple of splits ({self.splits})",
            )
            check(
                self.top_k % self.splits == 0,
                f"top_k ({self.top_k}) must be a multiple of splits ({self.splits}): "
                "a token must meet every slice of the MLP to keep its output",
            )
