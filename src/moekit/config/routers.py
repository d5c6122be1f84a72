"""The settings of every router, and what a reader should know before choosing one: docs/routers.md is made of this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.config.base import check, choice, positive
from moekit.registry import Registry

__all__ = [
    "ROUTER_OPTIONS",
    "ExpertChoiceOptions",
    "GShardOptions",
    "GateOptions",
    "GroupLimit",
    "GumbelOptions",
    "HashOptions",
    "HierarchicalOptions",
    "NoisyTopKOptions",
    "RouterOptions",
    "SigmoidOptions",
    "SinkhornOptions",
    "SparseMixerOptions",
    "SwitchOptions",
    "TopKOptions",
    "TopPOptions",
]


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """Choose groups of experts first, then experts inside the chosen groups only (2405.04434 §2.2.2)."""

    groups: int
    """Groups of equal size that the experts are cut into, in order."""
    chosen: int
    """Groups a token may use."""
    score: Literal["sum", "max"] = "sum"
    """A group's score: the sum of its K / chosen best experts (DeepSeek-V3), or its best one (DeepSeek-V2)."""

    def __post_init__(self) -> None:
        positive(self, "groups", "chosen")
        check(self.chosen <= self.groups, f"chosen must be at most groups ({self.groups}), not {self.chosen}")
        choice(self, "score", ("sum", "max"))

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `ConfigError` if a layer of this size cannot be limited so."""
        check(num_experts % self.groups == 0, f"groups ({self.groups}) must divide num_experts ({num_experts})")
        room = self.chosen * (num_experts // self.groups)
        check(top_k <= room, f"{self.chosen} of {self.groups} groups hold {room} experts: too few for top_k {top_k}")


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """What all routers have in common."""

    source: ClassVar[str]
    """The paper."""
    causal: ClassVar[bool] = True
    """Whether a token's experts depend on that token (and earlier ones) alone, as a language model needs."""
    active: ClassVar[str] = "K"
    """Experts a token pays for."""
    gated: ClassVar[bool] = True
    """Whether `gate_order` and `norm_topk_prob` make the weights (else the router does so in its own way)."""
    sigmoid: ClassVar[bool] = False
    """Whether scores are sigmoids of the logits instead of their softmax."""

    @property
    def balanced(self) -> bool:
        """Whether the router keeps its experts busy without a loss."""
        return False

    def gate_rows(self, num_experts: int) -> int:
        """Rows of width hidden_size that the router multiplies with each token: its parameters and its work."""
        return num_experts

    def mean_k(self, top_k: int) -> float:
        """Experts that a token pays for on average outside training; the most, where only text could tell."""
        return float(top_k)

    def fewest(self, top_k: int) -> tuple[str, int]:
        """The setting that says over how few alternatives weights may be normalised, and its value."""
        return "top_k", top_k

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `ConfigError` if a layer of this size cannot be routed so."""


@dataclass(frozen=True, kw_only=True)
class GateOptions(RouterOptions):
    """Routers with a linear gate: noise for exploration, in training only."""

    source: ClassVar[str] = ""
    jitter: float = 0.0
    """Multiply the gate's input by U(1 − jitter, 1 + jitter) while training (2101.03961 §2.4 uses 0.01)."""
    noise_std: float = 0.0
    """Add N(0, noise_std²) to the logits while training."""

    def __post_init__(self) -> None:
        check(0 <= self.jitter < 1, f"jitter must lie in [0, 1), not {self.jitter}")
        check(self.noise_std >= 0, f"noise_std must be at least 0, not {self.noise_std}")


ROUTER_OPTIONS: Registry[type[RouterOptions]] = Registry("router")


@ROUTER_OPTIONS.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopKOptions(GateOptions):
    """The K experts with the highest logits: the default, and what most published models use."""

    source: ClassVar[str] = "1701.06538 eq 3–5, 2101.03961, 2401.04088"
    groups: GroupLimit | None = None
    """Limit the choice to some groups of experts, so that a token meets few devices."""
    gate_bias: bool = False
    """Add a learned bias to the logits (gpt-oss)."""
    bias: bool = False
    """Keep the selection bias; its values are a buffer, always fp32, without gradient."""
    bias_rate: float = 0.001
    """How far the bias moves a step: up for experts below the mean, down for those above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bias_rate >= 0, f"bias_rate must be at least 0, not {self.bias_rate}")

    @property
    def balanced(self) -> bool:
        return self.bias and self.bias_rate > 0

    def check(self, num_experts: int, top_k: int) -> None:
        if self.groups is not None:
            self.groups.check(num_experts, top_k)


@ROUTER_OPTIONS.register("sigmoid")
@dataclass(frozen=True, kw_only=True)
class SigmoidOptions(TopKOptions):
    """Independent sigmoid scores, balanced by a bias that only the selection sees: no loss pulls at the gate."""

    source: ClassVar[str] = "2412.19437 eq 12–16, 2408.15664"
    sigmoid: ClassVar[bool] = True
    bias: bool = True
    """Keep the selection bias; its values are a buffer, always fp32, without gradient."""


@ROUTER_OPTIONS.register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchOptions(GateOptions):
    """The most probable experts as transformers' Switch finds them: by probabilities in the tokens' dtype."""

    source: ClassVar[str] = "2101.03961 eq 1–2; transformers 5.23, modeling_switch_transformers.py"
    gated: ClassVar[bool] = False
    gate_bias: bool = False
    """Add a learned bias to the logits."""


@ROUTER_OPTIONS.register("sparsemixer")
@dataclass(frozen=True, kw_only=True)
class SparseMixerOptions(RouterOptions):
    """Two experts one after the other, each by a softmax over the near best; sampled while training (Phi-3.5-MoE)."""

    source: ClassVar[str] = "2409.12136; transformers 5.23, modeling_phimoe.py"
    gated: ClassVar[bool] = False
    eps: float = 0.01
    """An expert is left out when (best − s) / max(|s|, best) is above 2·eps for its score s, also in eval."""

    def __post_init__(self) -> None:
        check(self.eps > 0, f"eps must be above 0, not {self.eps}")

    def check(self, num_experts: int, top_k: int) -> None:
        check(top_k == 2, f"router sparsemixer takes top_k 2, not {top_k}")


@ROUTER_OPTIONS.register("noisy_topk")
@dataclass(frozen=True, kw_only=True)
class NoisyTopKOptions(RouterOptions):
    """Top-k with noise of a learned size on every logit: explores, and gives a load that has a gradient."""

    source: ClassVar[str] = "1701.06538 eq 3–5 and appendix A"

    def gate_rows(self, num_experts: int) -> int:
        return 2 * num_experts


@ROUTER_OPTIONS.register("gshard")
@dataclass(frozen=True, kw_only=True)
class GShardOptions(GateOptions):
    """Top-2 whose second expert is taken at random, more likely the higher its weight: saves work on sure tokens."""

    source: ClassVar[str] = "2006.16668 algorithm 1"
    active: ClassVar[str] = "1 to 2 in training, 2 in eval"

    def check(self, num_experts: int, top_k: int) -> None:
        check(top_k == 2, f"router gshard takes top_k 2, not {top_k}")


@ROUTER_OPTIONS.register("gumbel")
@dataclass(frozen=True, kw_only=True)
class GumbelOptions(RouterOptions):
    """Samples experts while training, ever more surely as its temperature falls; eval takes the most likely."""

    source: ClassVar[str] = "1611.01144 eq 1–2 and §2.2"
    gated: ClassVar[bool] = False
    start: float = 0.5
    """Temperature at first."""
    end: float = 0.1
    """Temperature after anneal_steps, falling by a constant factor a step."""
    anneal_steps: int = 1000
    """Optimizer steps until `end`."""
    straight_through: bool = True
    """Weigh the chosen experts equally and send the soft weights' gradient (straight-through); or use the soft ones."""

    def __post_init__(self) -> None:
        check(0 < self.end <= self.start, f"end must lie in (0, start = {self.start}], not {self.end}")
        positive(self, "anneal_steps")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            self.straight_through or top_k > 1 or num_experts == 1,
            "top_k 1 without straight_through makes every weight 1, so the router never learns",
        )


@ROUTER_OPTIONS.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopPOptions(GateOptions):
    """As many experts as it takes to reach probability p: few for sure tokens, up to top_k for hard ones."""

    source: ClassVar[str] = "2403.07652 eq 3–5"
    active: ClassVar[str] = "min_k to K; target_k on average if set"
    p: float = 0.5
    """Probability that the chosen experts must reach together; where it starts, with target_k."""
    min_k: int = 1
    """Experts every token gets."""
    target_k: float | None = None
    """Move p after each step so that tokens get this many experts on average."""
    rate: float = 0.05
    """How far p moves a step, times the relative distance from target_k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.p < 1, f"p must lie between 0 and 1, not {self.p}")
        positive(self, "min_k")
        check(self.rate > 0, f"rate must be above 0, not {self.rate}")

    def mean_k(self, top_k: int) -> float:
        return top_k if self.target_k is None else self.target_k

    def fewest(self, top_k: int) -> tuple[str, int]:
        return "min_k", self.min_k

    def check(self, num_experts: int, top_k: int) -> None:
        check(self.min_k <= top_k, f"min_k ({self.min_k}) must be at most top_k ({top_k})")
        if self.target_k is not None:
            inside = self.min_k <= self.target_k <= top_k
            check(inside, f"target_k must lie from min_k ({self.min_k}) to top_k ({top_k}), not {self.target_k}")


@ROUTER_OPTIONS.register("expert_choice")
@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions(GateOptions):
    """Each expert takes its T·K/E best tokens: perfect balance; for encoders, since later tokens displace earlier."""

    source: ClassVar[str] = "2202.09368 eq 1–3"
    causal: ClassVar[bool] = False
    active: ClassVar[str] = "K on average, 0 to E"
    gated: ClassVar[bool] = False

    @property
    def balanced(self) -> bool:
        return True


@ROUTER_OPTIONS.register("hash")
@dataclass(frozen=True, kw_only=True)
class HashOptions(RouterOptions):
    """Experts by a hash of the token's id: nothing to learn, nothing to collapse; a baseline that is hard to beat."""

    source: ClassVar[str] = "2106.04426 §3"
    gated: ClassVar[bool] = False
    seed: int = 0
    """Another seed gives another assignment. A `Decoder` adds the layer's number to it."""

    @property
    def balanced(self) -> bool:
        return True

    def gate_rows(self, num_experts: int) -> int:
        return 0


@ROUTER_OPTIONS.register("sinkhorn")
@dataclass(frozen=True, kw_only=True)
class SinkhornOptions(GateOptions):
    """Chooses by a balanced transport plan of the batch while training; eval chooses by the logits alone."""

    source: ClassVar[str] = "2202.01169 §3.1 (S-BASE)"
    iterations: int = 8
    """Rounds of scaling rows and columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "iterations")

    @property
    def balanced(self) -> bool:
        return True


@ROUTER_OPTIONS.register("hierarchical")
@dataclass(frozen=True, kw_only=True)
class HierarchicalOptions(GateOptions):
    """A tree of two levels: the token chooses groups, then experts inside them; for very many experts."""

    source: ClassVar[str] = "1701.06538 appendix B"
    groups: int = 2
    """Groups of equal size that the experts are cut into, in order."""
    groups_per_token: int = 1
    """Groups a token goes to; each gives top_k / groups_per_token of its experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "groups", "groups_per_token")

    def gate_rows(self, num_experts: int) -> int:
        return num_experts + self.groups

    def fewest(self, top_k: int) -> tuple[str, int]:
        return "groups_per_token", self.groups_per_token if self.groups > 1 else top_k

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            top_k % self.groups_per_token == 0,
            f"groups_per_token ({self.groups_per_token}) must divide top_k ({top_k})",
        )
        check(
            self.groups_per_token <= self.groups,
            f"groups_per_token must be at most groups ({self.groups}), not {self.groups_per_token}",
        )
        GroupLimit(groups=self.groups, chosen=self.groups_per_token).check(num_experts, top_k)
