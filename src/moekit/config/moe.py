"""One Mixture-of-Experts layer: sizes, router, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.config.base import check, choice, positive

__all__ = ["Activation", "MoEConfig"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One Mixture-of-Experts layer: y = Σ_i G(x)_i · E_i(x) over the selected experts.

    >>> MoEConfig(hidden_size=64, intermediate_size=32, num_experts=4, top_k=8)
    Traceback (most recent call last):
    ...
    moekit.errors.ConfigError: top_k must be at most num_experts (4), not 8
    """

    hidden_size: int
    """Width D of a token going in and coming out."""
    intermediate_size: int
    """Inner width F of each expert."""
    num_experts: int
    """Number of routed experts E."""
    top_k: int
    """Experts a token is sent to, K. K = E is the dense softmax gate."""
    router: str = "topk"
    """Name in the router registry."""
    gate_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the selected logits (Mixtral) or over all of them before selecting (Switch, Qwen, DeepSeek)."""
    norm_topk_prob: bool = False
    """Divide the K selected probabilities by their sum; only for gate_order softmax_topk."""
    routed_scaling_factor: float = 1.0
    """Multiplies the combine weights after everything else (DeepSeek)."""
    router_init_scale: float = 1.0
    """Router rows start as N(0, scale / D); Switch Transformer uses 0.1."""
    expert: str = "swiglu"
    """Name in the expert registry: swiglu (gate, up, down) or mlp (up, down)."""
    activation: Activation = "silu"
    """Non-linearity of the experts and of the shared experts."""
    bias: bool = False
    """Give every expert projection a bias."""
    num_shared_experts: int = 0
    """Experts that see every token, beside the routed ones."""
    shared_intermediate_size: int | None = None
    """Width of one shared expert; intermediate_size when not given."""
    shared_gate: bool = False
    """Multiply the shared experts' output by sigmoid(w·x) (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        positive(self, "hidden_size", "intermediate_size", "num_experts", "top_k")
        check(
            self.top_k <= self.num_experts,
            f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}",
        )
        choice(self, "gate_order", ("topk_softmax", "softmax_topk"))
        choice(self, "activation", ("silu", "gelu", "gelu_tanh", "relu"))
        check(
            not (self.norm_topk_prob and self.gate_order == "topk_softmax"),
            "norm_topk_prob belongs to gate_order softmax_topk; weights of topk_softmax already sum to 1",
        )
        renormalised = self.norm_topk_prob or self.gate_order == "topk_softmax"
        check(
            not (renormalised and self.top_k == 1 < self.num_experts),
            "top_k 1 with renormalised weights makes every weight 1, so the router never learns; "
            "set gate_order softmax_topk and norm_topk_prob False",
        )
        check(
            self.routed_scaling_factor > 0, f"routed_scaling_factor must be above 0, not {self.routed_scaling_factor}"
        )
        check(self.router_init_scale >= 0, f"router_init_scale must be at least 0, not {self.router_init_scale}")
        check(self.num_shared_experts >= 0, f"num_shared_experts must be at least 0, not {self.num_shared_experts}")
        if self.shared_intermediate_size is not None:
            positive(self, "shared_intermediate_size")
        check(
            self.num_shared_experts > 0 or not (self.shared_gate or self.shared_intermediate_size),
            "shared_gate and shared_intermediate_size need num_shared_experts of at least 1",
        )

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together; 0 without any."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)
