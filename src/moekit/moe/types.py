"""What the stages hand over: `Routing` (router → dispatcher, losses, monitors) and `Plan` (dispatch → combine).

Shapes: T tokens, E experts, K experts a token, A assignments, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.errors import UnsupportedError

__all__ = ["Choice", "Plan", "Routing", "RoutingTotals"]


@dataclass(frozen=True, eq=False)
class Choice:
    """Which tokens go to which experts, without weights: the rows of `Routing`, in token order.

    Attributes:
        token_ids_A: int64.
        expert_ids_A: int64.
        top_k: K where every token has exactly K assignments, else None.
    """

    token_ids_A: Tensor
    expert_ids_A: Tensor
    top_k: int | None

    @classmethod
    def regular(cls, expert_ids_TK: Tensor) -> Choice:
        """K experts for each token."""
        tokens, top_k = expert_ids_TK.shape
        tokens_T = torch.arange(tokens, device=expert_ids_TK.device)
        return cls(tokens_T.repeat_interleave(top_k), expert_ids_TK.flatten(), top_k)

    def to(self, device: torch.device) -> Choice:
        """The same on this device."""
        return Choice(self.token_ids_A.to(device), self.expert_ids_A.to(device), self.top_k)

    def where(self, kept_A: Tensor) -> Choice:
        """The assignments for which `kept_A` (bool) is True."""
        return Choice(self.token_ids_A[kept_A], self.expert_ids_A[kept_A], None)

    def counts(self, num_experts: int, mask_T: Tensor | None) -> Tensor:
        """(E,) int64: assignments of real tokens to each expert."""
        ids_A = self.expert_ids_A if mask_T is None else self.expert_ids_A[mask_T[self.token_ids_A]]
        return torch.bincount(ids_A, minlength=num_experts)


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert serves which token, and with what weight: one row for each (token, expert) assignment.

    The list is flat, so that a dropped assignment or an expert that picks its tokens fits. Where every
    token has exactly `top_k` assignments in token order (`top_k` is then set), `expert_ids_TK` and
    `weights_TK` are views of it.

    Attributes:
        token_ids_A: int64, the row of x each assignment serves, ascending.
        expert_ids_A: int64.
        weights_A: float32, the combine weight; carries the router's gradient.
        logits_TE: float32, the router's raw scores without added noise; carries the router's gradient.
        top_k: K when the assignments are regular, else None.
        mask_T: bool, True for real tokens; None when all are. Losses and monitors count real tokens only.
        chosen: what the router chose before capacity dropped or moved any of it; None when nothing was limited.
        score_function: how logits become `probs_TE`.
        load_TE: float32, the probability that each expert is among a token's K under fresh noise, with the
            router's gradient; None for routers without learned noise, and in eval.
        rows_per_expert: fill each expert up to this many rows (`CapacityConfig.pad`); None for no padding.
        groups: how many groups of equal size the router cuts its experts into; None for a router without groups.
    """

    token_ids_A: Tensor
    expert_ids_A: Tensor
    weights_A: Tensor
    logits_TE: Tensor
    top_k: int | None
    mask_T: Tensor | None = None
    chosen: Choice | None = None
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    load_TE: Tensor | None = None
    rows_per_expert: int | None = None
    groups: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @cached_property
    def probs_TE(self) -> Tensor:
        """Softmax of the logits over all experts; or their sigmoids divided by the sum of all (2412.19437 eq 19)."""
        if self.score_function == "softmax":
            return self.logits_TE.softmax(dim=-1)
        return F.logsigmoid(self.logits_TE).softmax(dim=-1)  # s / Σ s, also where every sigmoid underflows

    @cached_property
    def counts_E(self) -> Tensor:
        """int64: how many assignments of real tokens each expert got; all E counted, chosen or not."""
        return Choice(self.token_ids_A, self.expert_ids_A, self.top_k).counts(self.num_experts, self.mask_T)

    @cached_property
    def chosen_counts_E(self) -> Tensor:
        """The same before capacity dropped or moved any."""
        return self.counts_E if self.chosen is None else self.chosen.counts(self.num_experts, self.mask_T)

    @property
    def real_tokens(self) -> int:
        """How many tokens are no padding."""
        return self.num_tokens if self.mask_T is None else int(self.mask_T.sum())

    @property
    def dropped(self) -> int:
        """Assignments of real tokens that found no room."""
        return int(self.chosen_counts_E.sum() - self.counts_E.sum())

    @property
    def expert_ids_TK(self) -> Tensor:
        """The regular (T, K) view of the expert ids."""
        return self.expert_ids_A.view(self.num_tokens, self._regular())

    @property
    def weights_TK(self) -> Tensor:
        """The regular (T, K) view of the combine weights."""
        return self.weights_A.view(self.num_tokens, self._regular())

    def _regular(self) -> int:
        if self.top_k is None:
            raise UnsupportedError("this routing has no (T, K) view: its tokens have different numbers of experts")
        return self.top_k


@dataclass(frozen=True, eq=False)
class RoutingTotals:
    """What routings of one layer add up to, over micro-batches or processes: what routers and monitors need of them.

    Attributes:
        chosen_E: int64, assignments of real tokens that the router chose.
        kept_E: int64, those that capacity left, where it left them.
        tokens: real tokens.

    >>> one = RoutingTotals(torch.tensor([3, 1]), torch.tensor([2, 1]), tokens=2)
    >>> (one + one).chosen_E.tolist(), (one + one).dropped, one.mean_k
    ([6, 2], 2, 2.0)
    """

    chosen_E: Tensor
    kept_E: Tensor
    tokens: int

    @classmethod
    def of(cls, routing: Routing) -> RoutingTotals:
        """The totals of one forward pass."""
        return cls(routing.chosen_counts_E, routing.counts_E, routing.real_tokens)

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(self.chosen_E + other.chosen_E, self.kept_E + other.kept_E, self.tokens + other.tokens)

    @property
    def dropped(self) -> int:
        """Assignments that found no room."""
        return int(self.chosen_E.sum() - self.kept_E.sum())

    @property
    def mean_k(self) -> float:
        """Experts that a token chose on average; 0 without tokens."""
        return self.chosen_E.sum().item() / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, eq=False)
class Plan:
    """How `dispatch` laid the rows out, so that `combine` can put them back.

    Attributes:
        routing: the routing that was dispatched.
        order_R: int64, the assignment that each row holds, A for a row of padding; rows of one expert are contiguous.
        back_A: int64, the row that holds each assignment.
        counts_E: int64, rows of each expert, in expert order.
        input_dtype: dtype that `combine` returns.
    """

    routing: Routing
    order_R: Tensor
    back_A: Tensor
    counts_E: Tensor
    input_dtype: torch.dtype
