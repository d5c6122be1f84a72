"""How one model is made of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moekit.config.base import check, choice, positive
from moekit.config.moe import Activation, CapacityConfig, MoEConfig
from moekit.config.routers import RouterOptions

__all__ = ["SurgeryConfig", "UpcycleConfig"]

# Routers whose choice in eval is the K highest logits, of equals the lower number: equal rows go together.
_TAKES_HIGHEST = ("topk", "switch", "sigmoid", "noisy_topk", "gshard", "sinkhorn", "gumbel")


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model's MLPs become experts.

    >>> UpcycleConfig(method="copy").changes_output is None
    True
    >>> UpcycleConfig(method="copy", gate_order="softmax_topk").changes_output
    "a token's weights sum to 0.25 only while all logits are 0 (router_init_scale 0)"
    """

    method: Literal["copy", "noise", "split", "drop"] = "split"
    """copy: every expert is the dense MLP; noise: the same plus noise; split: experts are slices of it; drop: copies
    with a part of their inner units drawn anew."""
    num_experts: int = 8
    top_k: int = 2
    splits: int = 2
    """Slices one dense MLP is cut into (method split); top_k must be a multiple of it to stay exact."""
    noise: float = 0.01
    """Standard deviation added to each copied weight, relative to that matrix's own (method noise)."""
    drop_fraction: float = 0.5
    """Part of each expert's inner units that is drawn anew (method drop)."""
    router: str = "topk"
    """Name in the router registry; one that the family's files cannot express stays in memory."""
    gate_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the selected logits, or over all of them before selecting."""
    norm_topk_prob: bool = False
    """Divide the selected probabilities by their sum; for gate_order softmax_topk and for router sigmoid."""
    router_init_scale: float = 0.1
    """Router rows start as N(0, scale / D)."""
    seed: int = 0

    def __post_init__(self) -> None:
        choice(self, "method", ("copy", "noise", "split", "drop"))
        positive(self, "num_experts", "top_k", "splits")
        check(self.noise >= 0, f"noise must be at least 0, not {self.noise}")
        check(0 <= self.drop_fraction <= 1, f"drop_fraction must lie in [0, 1], not {self.drop_fraction}")
        self.layer(hidden_size=1, intermediate_size=self.slices)  # which checks what is the layer's own
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

    def layer(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        expert: str = "swiglu",
        activation: Activation = "silu",
        bias: bool = False,
    ) -> MoEConfig:
        """The MoE layer made of an MLP of these widths, kind and activation.

        Raises:
            ConfigError: the MLP cannot be cut into `splits` equal slices, or the settings contradict each other.
        """
        check(
            intermediate_size % self.slices == 0,
            f"splits ({self.slices}) must divide the MLP's intermediate_size ({intermediate_size})",
        )
        return MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size // self.slices,
            num_experts=self.num_experts,
            top_k=self.top_k,
            router=self.router,
            gate_order=self.gate_order,
            norm_topk_prob=self.norm_topk_prob,
            router_init_scale=self.router_init_scale,
            expert=expert,
            activation=activation,
            bias=bias,
            **self._more(),
        )

    @property
    def slices(self) -> int:
        """Experts that one MLP is cut into: `splits`, or 1 for the other methods."""
        return self.splits if self.method == "split" else 1

    @property
    def weights_sum(self) -> float:
        """What a token's combine weights add up to: 1 where they are normalised, else the sum under equal logits."""
        if self._normalised:
            return 1.0
        if self.router == "sparsemixer":
            return 1 / self.num_experts + 1 / (self.num_experts - 1)  # the second among those that are left
        return self.top_k * (0.5 if self._unit.options.sigmoid else 1 / self.num_experts)

    @property
    def changes_output(self) -> str | None:
        """Why, or on what condition, the model's output in eval is not the dense one's before any training.

        None when it is the same for every input, up to rounding.
        """
        if self.method == "noise" and self.noise:
            return "every expert is perturbed"
        if self.method == "drop" and self.drop_fraction:
            return f"{self.drop_fraction:.0%} of every expert is drawn anew"
        return self._choice_changes() or self._weights_change() or self._capacity_changes()

    def _choice_changes(self) -> str | None:
        if self.slices == 1:
            return None
        if self.router == "sparsemixer":
            return "router sparsemixer weighs an MLP's slices differently"
        if self.router not in _TAKES_HIGHEST:
            return f"router {self.router} may give a token a part of an MLP's slices"
        groups = getattr(self._unit.options, "groups", None)
        if groups is not None and (self.num_experts // groups.groups) % self.slices:
            return f"{groups.groups} groups of experts part an MLP's slices"
        return None

    def _weights_change(self) -> str | None:
        if self.router == "expert_choice":
            return "expert_choice gives each token weights of another sum"
        if self._normalised:
            return None
        if self.router == "top_p":
            return "top_p gives a token another number of experts, and their weights are not normalised"
        if self.router_init_scale:
            sums = f"a token's weights sum to {self.weights_sum:.4g}"
            return f"{sums} only while all logits are 0 (router_init_scale 0)"
        return None

    def _capacity_changes(self) -> str | None:
        return None if self._unit.capacity is None else "equal only while no expert is over its capacity"

    @property
    def _normalised(self) -> bool:
        options = self._unit.options
        if not options.gated:
            return self.router not in ("expert_choice", "switch", "sparsemixer")
        return self.norm_topk_prob or (self.gate_order == "topk_softmax" and not options.sigmoid)

    @property
    def _unit(self) -> MoEConfig:
        """A layer of the smallest size: all of it that does not depend on the MLP."""
        return self.layer(hidden_size=1, intermediate_size=self.slices)

    def _more(self) -> dict[str, Any]:
        """Fields of `MoEConfig` that a class below adds."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SurgeryConfig(UpcycleConfig):
    """How an MLP inside any PyTorch model becomes a layer of experts.

    >>> SurgeryConfig(num_experts=32, capacity=CapacityConfig(tokens=256)).changes_output
    'equal only while no expert is over its capacity'
    """

    method: Literal["copy", "noise", "split", "drop"] = "copy"
    """As for upcycling, where the default is split."""
    router_options: RouterOptions | None = None
    """Settings of the router; its defaults when not given."""
    capacity: CapacityConfig | None = None
    """How many tokens an expert may take; None is dropless."""

    def _more(self) -> dict[str, Any]:
        return {"router_options": self.router_options, "capacity": self.capacity}
