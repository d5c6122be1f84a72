"""One Mixture-of-Experts layer: sizes, router, capacity, experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moekit.config.base import check, choice, from_dict, positive
from moekit.config.routers import ROUTER_OPTIONS, HashOptions, RouterOptions
from moekit.errors import ConfigError

__all__ = ["Activation", "CapacityConfig", "ExpertGroup", "ExpertKind", "MoEConfig"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ExpertKind = Literal["swiglu", "mlp", "zero", "identity"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many tokens an expert may take, and what becomes of the others.

    With `factor` f an expert takes max(1, ⌈f·K·T/E⌉) of the T real tokens, and never more than T
    (2101.03961 eq 3; K and the lower bound are ours, see docs/mistakes.md).

    >>> CapacityConfig(factor=1.25).of(tokens=10, num_experts=4, top_k=2)
    7
    """

    factor: float | None = None
    """Room relative to an even share; 1.0 leaves none to spare."""
    tokens: int | None = None
    """Room as a number of tokens, instead of a factor."""
    per: Literal["batch", "sequence"] = "batch"
    """Where the room is counted: over all tokens of a call, or in each sequence of x (batch, length, hidden) alone,
    whose whole length is T then (transformers' Switch; the groups of 2006.16668 §3.1)."""
    order: Literal["position", "probability"] = "position"
    """Who comes first: all first choices, then all second ones, each in token order (2006.16668 algorithm 1); or the
    assignments with the highest probability (2106.05974 §3.3 ranks whole tokens so). Except for position with K = 1 and
    overflow drop, a later token can take the room of an earlier one."""
    overflow: Literal["drop", "next"] = "drop"
    """Drop an assignment that finds no room, or give it to the token's next best expert that has some."""
    lost_weight: Literal["lose", "renormalise"] = "lose"
    """After a drop, the token's other experts keep the weights they had; or the gate is computed over the kept ones."""
    pad: bool = False
    """Fill every expert up to its capacity with zero rows, so that shapes depend on T alone."""

    def __post_init__(self) -> None:
        given = [name for name in ("factor", "tokens") if getattr(self, name) is not None]
        check(len(given) == 1, f"capacity needs either factor or tokens, not {' and '.join(given) or 'neither'}")
        if self.tokens is not None:
            positive(self, "tokens")
        check(self.factor is None or 0 < self.factor < math.inf, f"capacity factor must be above 0, not {self.factor}")
        choice(self, "per", ("batch", "sequence"))
        choice(self, "order", ("position", "probability"))
        choice(self, "overflow", ("drop", "next"))
        choice(self, "lost_weight", ("lose", "renormalise"))

    def of(self, tokens: int, num_experts: int, top_k: int) -> int:
        """Tokens one expert may take when there are `tokens` real ones."""
        if self.tokens is not None:
            return min(self.tokens, max(tokens, 1))
        assert self.factor is not None
        # Integer arithmetic on the numerator: 1.1 · 30 must not become 33.000000000000004 and then 34.
        share = round(self.factor * top_k * tokens, 6)
        return max(1, min(-int(-share // num_experts), tokens))


@dataclass(frozen=True, kw_only=True)
class ExpertGroup:
    """Some equal experts of a layer whose experts differ (`MoEConfig.expert_groups`)."""

    count: int
    """How many experts of this kind."""
    kind: ExpertKind = "swiglu"
    """swiglu, mlp, zero (returns 0: the token may skip) or identity (returns its input), the last two 2410.07348."""
    intermediate_size: int | None = None
    """Inner width; the layer's own when not given."""
    activation: Activation | None = None
    """Non-linearity; the layer's own when not given."""

    def __post_init__(self) -> None:
        positive(self, "count")
        choice(self, "kind", ("swiglu", "mlp", "zero", "identity"))
        if self.intermediate_size is not None:
            positive(self, "intermediate_size")
        if self.activation is not None:
            choice(self, "activation", ACTIVATIONS)
        plain = self.intermediate_size is None and self.activation is None
        check(plain or self.kind in ("swiglu", "mlp"), f"an expert of kind {self.kind} has no width and no activation")


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
    """Experts a token is sent to, K (at most for top_p, on average for expert_choice). K = E is the dense gate."""
    router: str = "topk"
    """Name in the router registry; docs/routers.md lists them."""
    router_options: RouterOptions | Mapping[str, Any] | None = None
    """Settings of that router (a mapping will do); its defaults when not given."""
    gate_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the selected logits (Mixtral) or over all of them before selecting (Switch, Qwen, DeepSeek)."""
    norm_topk_prob: bool = False
    """Divide the K selected probabilities by their sum; only for gate_order softmax_topk."""
    routed_scaling_factor: float = 1.0
    """Multiplies the combine weights after everything else (DeepSeek)."""
    router_init_scale: float = 1.0
    """Router rows start as N(0, scale / D); Switch Transformer uses 0.1."""
    capacity: CapacityConfig | None = None
    """How many tokens an expert may take; None, the default, is dropless."""
    input_jitter: float = 0.0
    """Multiply what router and experts read by U(1 − j, 1 + j) while training (DBRX, Phi-3.5-MoE); the router option
    `jitter` is for the router's input alone."""
    expert: str = "swiglu"
    """Name in the expert registry: swiglu (gate, up, down), mlp (up, down), clamped_swiglu (gpt-oss) or mixed (see
    expert_groups)."""
    expert_groups: tuple[ExpertGroup, ...] = ()
    """The layer's experts in order, where they differ; their counts add up to num_experts. Only for expert mixed."""
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
            self.top_k <= self.num_experts, f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}"
        )
        choice(self, "gate_order", ("topk_softmax", "softmax_topk"))
        choice(self, "activation", ACTIVATIONS)
        object.__setattr__(self, "router_options", _options(self.router, self.router_options))
        self.options.check(self.num_experts, self.top_k)
        self._check_gate()
        check(self.router_init_scale >= 0, f"router_init_scale must be at least 0, not {self.router_init_scale}")
        check(0 <= self.input_jitter < 1, f"input_jitter must lie in [0, 1), not {self.input_jitter}")
        if self.capacity is not None:
            check(self.router != "expert_choice", "expert_choice fills every expert exactly: it takes no capacity")
            check(self.router != "sparsemixer", "sparsemixer weighs a second expert without the first: no capacity")
        self._check_experts()

    def _check_gate(self) -> None:
        check(
            not (self.norm_topk_prob and self.gate_order == "topk_softmax" and not self.options.sigmoid),
            "norm_topk_prob belongs to gate_order softmax_topk; weights of topk_softmax already sum to 1",
        )
        renormalised = self.norm_topk_prob or (self.gate_order == "topk_softmax" and not self.options.sigmoid)
        what, fewest = self.options.fewest(self.top_k)
        check(
            not (self.options.gated and renormalised and fewest == 1 < self.num_experts),
            f"{what} 1 with renormalised weights makes every weight 1, so the router never learns; "
            "set gate_order softmax_topk and norm_topk_prob False",
        )
        check(
            self.routed_scaling_factor > 0, f"routed_scaling_factor must be above 0, not {self.routed_scaling_factor}"
        )

    def _check_experts(self) -> None:
        total = sum(group.count for group in self.expert_groups)
        check(
            bool(self.expert_groups) == (self.expert == "mixed"),
            "expert mixed and expert_groups belong together: give both or neither",
        )
        check(
            total in (0, self.num_experts),
            f"the counts of expert_groups add up to {total}, but num_experts is {self.num_experts}",
        )
        check(self.num_shared_experts >= 0, f"num_shared_experts must be at least 0, not {self.num_shared_experts}")
        if self.shared_intermediate_size is not None:
            positive(self, "shared_intermediate_size")
        check(
            self.expert != "clamped_swiglu" or (self.num_shared_experts == 0 and self.activation == "silu"),
            "expert clamped_swiglu has an activation of its own, and no shared experts",
        )
        check(
            self.num_shared_experts > 0 or not (self.shared_gate or self.shared_intermediate_size),
            "shared_gate and shared_intermediate_size need num_shared_experts of at least 1",
        )

    @property
    def options(self) -> RouterOptions:
        """`router_options`, which are never None once the configuration is made."""
        assert isinstance(self.router_options, RouterOptions)
        return self.router_options

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together; 0 without any."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)

    def for_layer(self, layer: int) -> MoEConfig:
        """The configuration of layer number `layer` of a model: a hash router gets a seed of its own."""
        if not isinstance(self.router_options, HashOptions):
            return self
        options = dataclasses.replace(self.router_options, seed=self.router_options.seed + layer)
        return dataclasses.replace(self, router_options=options)

    def group_config(self, group: ExpertGroup) -> MoEConfig:
        """The layer that holds this group's experts alone, for building and counting them."""
        return dataclasses.replace(
            self,
            num_experts=group.count,
            top_k=group.count,
            router="topk",
            router_options=None,
            gate_order="softmax_topk",
            norm_topk_prob=False,
            expert=group.kind,
            expert_groups=(),
            intermediate_size=group.intermediate_size or self.intermediate_size,
            activation=group.activation or self.activation,
        )


def _options(router: str, given: RouterOptions | Mapping[str, Any] | None) -> RouterOptions:
    """The options of this router, whatever form they came in."""
    cls = ROUTER_OPTIONS[router]
    if given is None:
        return cls()
    if isinstance(given, Mapping):
        return from_dict(cls, given, source=f"router_options of {router}")
    if type(given) is not cls:
        raise ConfigError(f"router {router} takes {cls.__name__}, not {type(given).__name__}")
    return given
