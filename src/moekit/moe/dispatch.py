"""The first seam: `dispatch` sorts tokens into rows by expert, `combine` brings the results back.

A dispatcher is anything with these two methods. `LocalDispatcher` keeps every row on this device;
an exchange between processes is another kind, and neither router nor experts notice.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.moe.types import Plan, Routing

__all__ = ["Dispatcher", "LocalDispatcher"]


class Dispatcher(Protocol):
    """The contract: rows come out sorted by expert, and `combine` undoes exactly what `dispatch` did."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Plan]: ...

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor: ...


class LocalDispatcher:
    """Dropless dispatch on one device: every assignment becomes a row, whatever the balance.

    >>> import torch
    >>> routing = Routing(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2), torch.zeros(2, 2), top_k=1)
    >>> dispatcher = LocalDispatcher()
    >>> rows_RD, plan = dispatcher.dispatch(torch.tensor([[1.0], [2.0]]), routing)
    >>> rows_RD.flatten().tolist(), dispatcher.combine(rows_RD, plan).flatten().tolist()
    ([2.0, 1.0], [1.0, 2.0])
    """

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Plan]:
        """Copy each token once for every expert it goes to. Returns rows (R, D) in x's dtype, and the plan.

        With `routing.rows_per_expert` each expert gets that many rows, those nobody sent being zeros.
        """
        order_A = torch.argsort(routing.expert_ids_A, stable=True)
        counts_E = torch.bincount(routing.expert_ids_A, minlength=routing.num_experts)
        order_R, row_A = order_A, torch.arange(order_A.shape[0], device=order_A.device)
        if routing.rows_per_expert is not None:
            row_A = _spaced(row_A, counts_E, routing.rows_per_expert)
            counts_E = torch.full_like(counts_E, routing.rows_per_expert)
            rows = routing.num_experts * routing.rows_per_expert
            order_R = order_A.new_full((rows,), order_A.shape[0]).index_copy(0, row_A, order_A)
        back_A = order_A.scatter(0, order_A, row_A)  # the inverse permutation; every element is replaced
        plan = Plan(routing=routing, order_R=order_R, back_A=back_A, counts_E=counts_E, input_dtype=x_TD.dtype)
        rows_RD: Tensor = _Spread.apply(x_TD, plan)
        return rows_RD, plan

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """y_t = Σ weight · row over the token's assignments, summed in fp32 (fp64 for fp64 rows) in a fixed order.

        Returns (T, D) in the dtype `dispatch` was given. The order of the sum depends on the token's own
        assignments only, so a token gets the same bits alone and in a batch.
        """
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        by_assignment_AD: Tensor = _Reorder.apply(rows_RD, plan)
        weighted_AD = by_assignment_AD.to(wide) * plan.routing.weights_A.to(wide).unsqueeze(-1)
        return _sum_by_token(weighted_AD, plan.routing).to(plan.input_dtype)


def _sum_by_token(values_AD: Tensor, routing: Routing) -> Tensor:
    """(A, D) → (T, D): the sum over each token's assignments, in their order."""
    width = values_AD.shape[-1]
    if routing.top_k is not None:
        return values_AD.view(routing.num_tokens, routing.top_k, width).sum(dim=1)
    return values_AD.new_zeros(routing.num_tokens, width).index_add(0, routing.token_ids_A, values_AD)


def _spaced(row_A: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """(A,): where each of the sorted rows lies once every expert has `rows` of them."""
    shift_E = torch.arange(counts_E.shape[0], device=row_A.device) * rows - (counts_E.cumsum(0) - counts_E)
    return row_A + shift_E.repeat_interleave(counts_E)


def _rows(values_AD: Tensor, plan: Plan) -> Tensor:
    """(A, D) by assignment to (R, D) by row; rows of padding are zeros."""
    if plan.routing.rows_per_expert is not None:
        values_AD = torch.cat([values_AD, values_AD.new_zeros(1, values_AD.shape[1])])
    return values_AD.index_select(0, plan.order_R)


class _Spread(torch.autograd.Function):
    """One row of x for each assignment, in expert order. Its gradient is a sum of K gathered rows, where autograd,
    which cannot know that every token comes K times, would scatter them one by one."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        tokens_A, order_R = plan.routing.token_ids_A, plan.order_R
        if plan.routing.rows_per_expert is None:
            return x_TD.index_select(0, tokens_A[order_R])
        return _rows(x_TD.index_select(0, tokens_A), plan)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_by_token(grad_RD.index_select(0, ctx.plan.back_A), ctx.plan.routing), None


class _Reorder(torch.autograd.Function):
    """Rows back by assignment; the gradient takes the inverse order instead of scattering."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return rows_RD.index_select(0, plan.back_A)

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        return _rows(grad_AD, ctx.plan), None
