"""Routers whose tokens get experts in another number or in another order of decisions. Shapes as in router.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import kernels
from moekit.config import HierarchicalOptions, TopPOptions
from moekit.moe.router import ROUTERS, Noise, Router, Scores, only_groups
from moekit.moe.types import Choice, RoutingTotals

__all__ = ["HierarchicalRouter", "TopPRouter"]


@ROUTERS.register("top_p")
class TopPRouter(Router):
    """The smallest set of experts whose probabilities add up to p, of `min_k` to `top_k` of them (2403.07652 eq 3–5).

    With `target_k` the threshold p is a buffer that follows: after each step p moves by
    rate · (target_k − mean k) / top_k, within (0.01, 0.99).

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=3, router="top_p",
    ...     gate_order="softmax_topk")
    >>> sorted(set(torch.bincount(TopPRouter(config)(torch.randn(90, 8)).token_ids_A).tolist())) in ([1, 2], [1, 2, 3])
    True
    """

    options: TopPOptions
    fp32_buffers = ("threshold",)
    threshold: Tensor

    def _first_state(self) -> dict[str, Tensor | None]:
        return {"threshold": torch.tensor(self.options.p, dtype=torch.float32)}

    def after_step(self, totals: RoutingTotals) -> None:
        if self.training and self.options.target_k is not None and totals.tokens:
            distance = (self.options.target_k - totals.mean_k) / self.config.top_k
            self.threshold.add_(self.options.rate * distance).clamp_(0.01, 0.99)

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        regular = Choice.regular(kernels.top_k(gate_TE, self.config.top_k))
        probs_TK = gate_TE.softmax(dim=-1).gather(1, regular.expert_ids_A.view(-1, self.config.top_k))
        # An expert is needed while those before it have not reached p.
        before_TK = probs_TK.cumsum(dim=-1) - probs_TK
        needed_TK = before_TK < self.threshold
        needed_TK[:, : self.options.min_k] = True
        return regular if needed_TK.all() else regular.where(needed_TK.flatten())


@ROUTERS.register("hierarchical")
class HierarchicalRouter(Router):
    """p(expert) = p(group) · p(expert | group); the best groups first, then the best experts in each.

    The gate's first `groups` rows score the groups, the others the experts. `Routing.logits_TE` is log p, whose
    softmax is p itself, so that every loss reads it as any router's; `losses.group_balancing` is the upper level's.
    1701.06538 appendix B, with the full distribution where the paper has noisy top-k at both levels.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2, router="hierarchical",
    ...     router_options={"groups": 3, "groups_per_token": 2})
    >>> HierarchicalRouter(config)(torch.randn(5, 8)).expert_ids_TK.shape
    torch.Size([5, 2])
    """

    options: HierarchicalOptions

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        groups = self.options.groups
        scores = super()._score(x_TD, noise)
        return Scores(_log_product(scores.logits_TE, groups), _log_product(scores.gate_TE, groups))

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        tokens, each = gate_TE.shape[0], self.config.top_k // self.options.groups_per_token
        gate_TGe = self._by_group(gate_TE)
        groups_Tg = self._best_groups(gate_TGe)
        inside_Tgk = kernels.top_k(gate_TGe.flatten(0, 1), each).view(tokens, self.options.groups, each)
        chosen_Tgk = inside_Tgk.gather(1, groups_Tg.unsqueeze(-1).expand(-1, -1, each))
        return Choice.regular((chosen_Tgk + groups_Tg.unsqueeze(-1) * gate_TGe.shape[2]).flatten(1))

    def _selection(self, gate_TE: Tensor) -> Tensor:
        gate_TGe = self._by_group(gate_TE)
        return only_groups(gate_TGe, self._best_groups(gate_TGe))

    def _by_group(self, gate_TE: Tensor) -> Tensor:
        tokens, experts = gate_TE.shape
        return gate_TE.view(tokens, self.options.groups, experts // self.options.groups)

    def _best_groups(self, gate_TGe: Tensor) -> Tensor:
        """(T, g): the groups that a token goes to, by log p(group)."""
        return kernels.top_k(gate_TGe.logsumexp(dim=-1), self.options.groups_per_token)


def _log_product(logits: Tensor, groups: int) -> Tensor:
    """(T, G + E) logits of groups and of experts to (T, E) log p(group) + log p(expert | group)."""
    group_TG = logits[:, :groups].log_softmax(dim=-1)
    inside_TGe = logits[:, groups:].reshape(len(logits), groups, logits.shape[1] // groups - 1).log_softmax(dim=-1)
    return (group_TG.unsqueeze(-1) + inside_TGe).flatten(1)
