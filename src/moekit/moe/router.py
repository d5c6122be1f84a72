"""Routers: hidden states in, `Routing` out. Scores, choice and weights are always computed in float32.

A router is four steps: score, decide (choose, then let capacity limit the choice), weigh, and, once an optimizer
step, `after_step`. A kind of router replaces one or two of them. The decision can be replayed; the rest is live.
Shapes: T tokens, D hidden, E experts, K experts a token, A assignments, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit import kernels
from moekit.config import GateOptions, GroupLimit, MoEConfig, SigmoidOptions, TopKOptions
from moekit.moe.capacity import limit, slots_of
from moekit.moe.replay import Decision, decided, next_decision
from moekit.moe.types import Choice, Routing, RoutingTotals
from moekit.registry import Registry

__all__ = [
    "ROUTERS",
    "Noise",
    "Router",
    "Scores",
    "SigmoidRouter",
    "TopKRouter",
    "normalised",
    "only_groups",
    "picked",
    "softmax_by_token",
    "within_groups",
]

ROUTERS: Registry[type[Router]] = Registry("router")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a router computes from the hidden states, with its gradient.

    Attributes:
        logits_TE: float32, without added noise: for the losses.
        gate_TE: float32, what experts are chosen by and weights are made from: the logits, with the noise of training.
        load_TE: as in `Routing`.
    """

    logits_TE: Tensor
    gate_TE: Tensor
    load_TE: Tensor | None = None


class Noise:
    """Random numbers that are a pure function of a seed, so that a replayed decision meets the same noise."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), float32."""
        return torch.randn(*shape, generator=self._generator, device=self._device, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        """U(0, 1), float32."""
        return torch.rand(*shape, generator=self._generator, device=self._device, dtype=torch.float32)

    def gumbel(self, *shape: int) -> Tensor:
        """−log(−log U(0, 1)), float32: added to logits, it makes their largest a draw from their softmax."""
        return -(-self.uniform(*shape).clamp(min=torch.finfo(torch.float32).tiny).log()).log()


class Router(nn.Module):
    """What every router does; a kind overrides `_score`, `_choose`, `_weigh` or `after_step`.

    Parameter `weight` (gate rows, D), and `bias` (gate rows) if the options ask for one, keep their own dtype; the
    product is fp32 even under autocast. Buffers named in
    `fp32_buffers` stay fp32 through `.to(bfloat16)` and are saved with the weights.
    """

    fp32_buffers: tuple[str, ...] = ()

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.options: Any = config.options
        rows = config.options.gate_rows(config.num_experts)
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size)) if rows else None
        self.bias = nn.Parameter(torch.zeros(rows)) if getattr(config.options, "gate_bias", False) else None
        for name, value in self._first_state().items():
            self.register_buffer(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate's rows from N(0, init_scale / D) (2101.03961 §2.4 uses a scale of 0.1); no bias at first, and
        what is learnt without a gradient as it begins."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=(self.config.router_init_scale / self.weight.shape[1]) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for name, value in self._first_state().items():
            if value is not None:
                self.get_buffer(name).copy_(value)

    def _first_state(self) -> dict[str, Tensor | None]:
        """The buffers of this kind of router, as they begin; None for one that the options leave out."""
        return {}

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, input_ids_T: Tensor | None = None, sequences: int = 1
    ) -> Routing:
        """Route (T, D) hidden states of any float dtype.

        Args:
            mask_T: bool, True for real tokens.
            input_ids_T: int64, the tokens' ids in the vocabulary; only the hash router reads them.
            sequences: how many sequences of equal length the tokens are, for a capacity per sequence.
        """
        past = next_decision(x_TD.shape[0], self.config.num_experts, x_TD.device)
        fresh = self._seed()  # also for a replay, so that what draws after this layer draws the same numbers again
        seed = fresh if past is None else past.seed
        with torch.autocast(x_TD.device.type, enabled=False):
            scores = self._score(x_TD, None if seed is None else Noise(seed, x_TD.device))
            decision = decided(past, lambda: self._decide(scores, mask_T, input_ids_T, seed, sequences))
            return self._routing(scores, decision, mask_T)

    def after_step(self, totals: RoutingTotals) -> None:
        """Learn from a whole optimizer step's totals, of all micro-batches and processes; most routers need not."""

    def _seed(self) -> int | None:
        """A new seed where this pass has noise. Drawn from torch's own generator, so that torch.manual_seed rules."""
        noisy = self.training and self._is_noisy()
        return int(torch.randint(1 << 62, (), device="cpu")) if noisy else None

    def _groups(self) -> int | None:
        """Groups of experts, for the losses and measures that look at groups."""
        groups = getattr(self.options, "groups", None)
        return groups.groups if isinstance(groups, GroupLimit) else groups

    def _is_noisy(self) -> bool:
        return isinstance(self.options, GateOptions) and (self.options.jitter > 0 or self.options.noise_std > 0)

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        """The gate's product, with input jitter and Gaussian noise where there is any."""
        logits_TE = self._product(x_TD, noise)
        if noise is None or not self.options.noise_std:
            return Scores(logits_TE, logits_TE)
        return Scores(logits_TE, logits_TE + self.options.noise_std * noise.normal(*logits_TE.shape))

    def _product(self, x_TD: Tensor, noise: Noise | None) -> Tensor:
        """x · Wᵀ + b in fp32 (fp64 for fp64)."""
        assert self.weight is not None
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        jitter = getattr(self.options, "jitter", 0.0)
        if noise is not None and jitter:
            x_TD = x_TD * (1 + jitter * (2 * noise.uniform(*x_TD.shape) - 1))
        logits_TE = x_TD @ self.weight.to(wide).T
        return logits_TE if self.bias is None else logits_TE + self.bias.to(wide)

    def _selection(self, gate_TE: Tensor) -> Tensor:
        """What the experts of a token are ranked by; −inf puts one out of the question."""
        return gate_TE

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        """The experts of each token, from detached gates."""
        return Choice.regular(kernels.top_k(self._selection(gate_TE), self.config.top_k))

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        """(A,): the weight of each assignment, as if the choice were all there is."""
        if self.config.gate_order == "topk_softmax":
            return softmax_by_token(picked(gate_TE, choice), choice, gate_TE.shape[0])
        probs_A = picked(gate_TE.softmax(dim=-1), choice)
        return normalised(probs_A, choice, gate_TE.shape[0]) if self.config.norm_topk_prob else probs_A

    def _affinity(self, gate_TE: Tensor) -> Tensor:
        """What the tokens that want an expert are compared by: its probability."""
        return gate_TE.softmax(dim=-1)

    def _decide(
        self, scores: Scores, mask_T: Tensor | None, input_ids_T: Tensor | None, seed: int | None, sequences: int
    ) -> Decision:
        gate_TE = scores.gate_TE.detach()
        choice = self._choose(gate_TE, mask_T, input_ids_T)
        return self._limited(choice, gate_TE, mask_T, seed, sequences)

    def _limited(
        self,
        choice: Choice,
        gate_TE: Tensor,
        mask_T: Tensor | None,
        seed: int | None,
        sequences: int,
        sent_A: Tensor | None = None,
    ) -> Decision:
        """The choice after capacity. Assignments not in `sent_A` (bool) count for the weights, but go nowhere."""
        tokens, experts = gate_TE.shape
        capacity = self.config.capacity
        if capacity is None:
            return Decision(choice, tokens, experts, sent_A, seed=seed)
        chosen = choice if sent_A is None else choice.where(sent_A)
        sent_A = torch.ones_like(choice.token_ids_A, dtype=torch.bool) if sent_A is None else sent_A
        sequences = sequences if capacity.per == "sequence" else 1
        counted = tokens // sequences if sequences > 1 or mask_T is None else int(mask_T.sum())
        rows = capacity.of(counted, experts, self.config.top_k)
        moved, kept_A = limit(
            choice,
            rows,
            capacity,
            wanted_A=sent_A if mask_T is None else sent_A & mask_T[choice.token_ids_A],
            scores_TE=self._selection(gate_TE),
            probs_TE=self._affinity(gate_TE),
            sequences=sequences,
        )
        lost_A = sent_A & ~kept_A
        if capacity.lost_weight == "renormalise" and lost_A.any():
            moved, kept_A = moved.where(~lost_A), kept_A[~lost_A]
        return Decision(moved, tokens, experts, kept_A, chosen, seed, rows * sequences if capacity.pad else None)

    def _routing(self, scores: Scores, decision: Decision, mask_T: Tensor | None) -> Routing:
        choice = decision.options
        weights_A = self._weigh(scores.gate_TE, choice)
        if decision.kept_A is not None and not decision.kept_A.all():
            choice, weights_A = choice.where(decision.kept_A), weights_A[decision.kept_A]
        scale = self.config.routed_scaling_factor
        return Routing(
            token_ids_A=choice.token_ids_A,
            expert_ids_A=choice.expert_ids_A,
            weights_A=weights_A * scale if scale != 1.0 else weights_A,
            logits_TE=scores.logits_TE,
            top_k=choice.top_k,
            mask_T=mask_T,
            chosen=decision.chosen,
            score_function="sigmoid" if self.options.sigmoid else "softmax",
            load_TE=scores.load_TE,
            rows_per_expert=decision.rows_per_expert,
            groups=self._groups(),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move buffers as any module does, but leave the fp32 ones their dtype, and so every bit of their value."""
        before = {name: self._buffers[name] for name in self.fp32_buffers}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = moved.to(value.dtype) if value.is_meta else value.to(moved.device)
        return self

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"hidden_size={config.hidden_size}, num_experts={config.num_experts}, top_k={config.top_k}, "
            f"{config.gate_order if config.options.gated else config.router}"
        )


@ROUTERS.register("topk")
class TopKRouter(Router):
    """Send each token to the K experts with the highest logits x·W.

    Weights by `gate_order`: `topk_softmax` is softmax over the selected logits (Mixtral, 2401.04088 §2.1;
    1701.06538 eq 3–5, where the others count as −∞); `softmax_topk` keeps the selected entries of the full
    softmax (Switch, 2101.03961 eq 1–2), divided by their sum when `norm_topk_prob` (Qwen3-MoE).
    Ties go to the lower expert number. Groups limit the choice (see `GroupLimit`).

    With a selection bias b the K experts are those with the highest softmax + b, and the weights are as above, without
    b, a sum below 1e-12 counting as 1e-12 (ERNIE 4.5). The bias b has no gradient: after a step
    b_i += rate · sign(mean load − load_i) (2408.15664 algorithm 1).

    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
    >>> TopKRouter(config)(torch.randn(3, 8)).weights_TK.sum(-1).allclose(torch.ones(3))
    True
    """

    options: TopKOptions
    fp32_buffers = ("selection_bias",)
    selection_bias: Tensor | None

    def _first_state(self) -> dict[str, Tensor | None]:
        has_bias = isinstance(self.options, TopKOptions) and self.options.bias
        return {"selection_bias": torch.zeros(self.config.num_experts, dtype=torch.float32) if has_bias else None}

    def after_step(self, totals: RoutingTotals) -> None:
        if self.selection_bias is not None and self.training:
            load_E = totals.chosen_E.to(self.selection_bias.device)
            above_E = load_E * load_E.numel() - load_E.sum()  # whole numbers: an even load moves nothing
            self.selection_bias -= self.options.bias_rate * above_E.sign()

    def _ranked(self, gate_TE: Tensor) -> Tensor:
        """What the bias is added to; logits rank as their softmax does, and cost nothing."""
        return gate_TE if self.selection_bias is None else gate_TE.softmax(dim=-1)

    def _selection(self, gate_TE: Tensor) -> Tensor:
        scores_TE = self._ranked(gate_TE)
        if self.selection_bias is not None:
            scores_TE = scores_TE + self.selection_bias.to(scores_TE.dtype)
        if self.options.groups is None:
            return scores_TE
        return within_groups(scores_TE, self.options.groups, self.config.top_k)

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        if self.selection_bias is None or not self.config.norm_topk_prob:
            return super()._weigh(gate_TE, choice)
        # Experts that the bias alone chose may have no probability at all.
        return normalised(picked(gate_TE.softmax(dim=-1), choice), choice, gate_TE.shape[0], least=1e-12)


@ROUTERS.register("sigmoid")
class SigmoidRouter(TopKRouter):
    """Scores s = sigmoid(x·W); the K experts with the highest s + b; weights s, without b (2412.19437 eq 12–16).

    The weights are divided by their sum when `norm_topk_prob`. The bias b learns as that of `TopKRouter`.

    >>> from moekit.moe import RoutingTotals
    >>> router = SigmoidRouter(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="sigmoid"))
    >>> router.after_step(RoutingTotals.of(router(torch.randn(9, 8))))
    >>> router.to(torch.bfloat16).selection_bias.dtype
    torch.float32
    """

    options: SigmoidOptions

    def _affinity(self, gate_TE: Tensor) -> Tensor:
        return gate_TE.sigmoid()

    def _ranked(self, gate_TE: Tensor) -> Tensor:
        return gate_TE.sigmoid()

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        scores_A = picked(gate_TE, choice).sigmoid()
        return normalised(scores_A, choice, gate_TE.shape[0]) if self.config.norm_topk_prob else scores_A


def within_groups(scores_TE: Tensor, groups: GroupLimit, top_k: int) -> Tensor:
    """The scores, −inf outside each token's `groups.chosen` best groups (2405.04434 §2.2.2, 2412.19437 §2.1.2).

    Not 0 outside, as is often written: biased scores can be negative, and 0 would then win.
    """
    tokens, experts = scores_TE.shape
    scores_TGe = scores_TE.view(tokens, groups.groups, experts // groups.groups)
    best = max(1, top_k // groups.chosen) if groups.score == "sum" else 1
    group_TG = scores_TGe.topk(min(best, scores_TGe.shape[2]), dim=-1).values.sum(dim=-1)
    return only_groups(scores_TGe, kernels.top_k(group_TG, groups.chosen))


def only_groups(scores_TGe: Tensor, groups_Tg: Tensor) -> Tensor:
    """(T, E): the scores, −inf outside each token's groups."""
    shut_TG = torch.ones(scores_TGe.shape[:2], dtype=torch.bool, device=scores_TGe.device)
    return scores_TGe.masked_fill(shut_TG.scatter(1, groups_Tg, False).unsqueeze(-1), -torch.inf).flatten(1)


def picked(values_TE: Tensor, choice: Choice) -> Tensor:
    """(A,): each assignment's own value."""
    if choice.top_k is not None:  # a gather's gradient is cheaper than an index's
        return values_TE.gather(1, choice.expert_ids_A.view(-1, choice.top_k)).flatten()
    return values_TE[choice.token_ids_A, choice.expert_ids_A]


def softmax_by_token(values_A: Tensor, choice: Choice, tokens: int) -> Tensor:
    """(A,): the softmax of each token's values."""
    if choice.top_k is not None:
        return values_A.view(tokens, choice.top_k).softmax(dim=-1).flatten()
    slots_A = slots_of(choice)
    width = int(slots_A.max()) + 1 if slots_A.numel() else 1
    index = (choice.token_ids_A, slots_A)
    values_TK = values_A.new_full((tokens, width), -torch.inf).index_put(index, values_A)
    return values_TK.softmax(dim=-1)[index]


def normalised(values_A: Tensor, choice: Choice, tokens: int, least: float = 0.0) -> Tensor:
    """The values divided by their token's sum, or by `least` where that is more."""
    if choice.top_k is not None:
        values_TK = values_A.view(tokens, choice.top_k)
        return (values_TK / values_TK.sum(dim=-1, keepdim=True).clamp(min=least)).flatten()
    sums_T = values_A.new_zeros(tokens).index_add(0, choice.token_ids_A, values_A).clamp(min=least)
    return values_A / sums_T[choice.token_ids_A]
