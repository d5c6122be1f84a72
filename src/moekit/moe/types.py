"""What the stages hand over: `Routing` (router → dispatcher, losses, monitors) and `Plan` (dispatch → combine).

Shapes: T tokens, E experts, K experts a token, A assignments, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moekit.errors import UnsupportedError

__all__ = ["Plan", "Routing"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert serves which token, and with what weight: one row for each (token, expert) assignment.

    The list is flat, so that a dropped assignment or an expert that picks its tokens fits. Where every
    token has exactly `top_k` assignments in token order (`top_k` is then set), `expert_ids_TK` and
    `weights_TK` are views of it.

    Attributes:
        token_ids_A: int64, the row of x each assignment serves.
        expert_ids_A: int64.
        weights_A: float32, the combine weight; carries the router's gradient.
        logits_TE: float32, the router's raw scores; carries the router's gradient.
        top_k: K when the assignments are regular, else None.
        mask_T: bool, True for real tokens; None when all are. Losses and monitors count real tokens only.
    """

    token_ids_A: Tensor
    expert_ids_A: Tensor
    weights_A: Tensor
    logits_TE: Tensor
    top_k: int | None
    mask_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @cached_property
    def probs_TE(self) -> Tensor:
        """Softmax of the logits over all experts, float32."""
        return self.logits_TE.softmax(dim=-1)

    @cached_property
    def counts_E(self) -> Tensor:
        """int64: how many assignments of real tokens each expert got; all E counted, chosen or not."""
        ids_A = self.expert_ids_A
        if self.mask_T is not None:
            ids_A = ids_A[self.mask_T[self.token_ids_A]]
        return torch.bincount(ids_A, minlength=self.num_experts)

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
class Plan:
    """How `dispatch` laid the rows out, so that `combine` can put them back.

    Attributes:
        routing: the routing that was dispatched.
        order_A: int64, the assignment that each row holds; rows of one expert are contiguous.
        back_A: int64, the row that holds each assignment: the inverse of order_A.
        counts_E: int64, rows of each expert, in expert order.
        input_dtype: dtype that `combine` returns.
    """

    routing: Routing
    order_A: Tensor
    back_A: Tensor
    counts_E: Tensor
    input_dtype: torch.dtype
