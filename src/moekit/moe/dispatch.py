"""The first seam: `dispatch` sorts tokens into rows by expert, `combine` brings the results back.

A dispatcher is anything with these two methods. `LocalDispatcher` keeps every row on this device;
an exchange between processes is another kind, and neither router nor experts notice.
"""

from __future__ import annotations

from typing import Protocol

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
        """Copy each token once for every expert it goes to. Returns rows (R, D) in x's dtype, and the plan."""
        order_A = torch.argsort(routing.expert_ids_A, stable=True)
        counts_E = torch.bincount(routing.expert_ids_A, minlength=routing.num_experts)
        plan = Plan(routing=routing, order_A=order_A, counts_E=counts_E, input_dtype=x_TD.dtype)
        return x_TD[routing.token_ids_A[order_A]], plan

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """y_t = Σ weight · row over the token's assignments, summed in fp32 (fp64 for fp64 rows) in a fixed order.

        Returns (T, D) in the dtype `dispatch` was given. The order of the sum depends on the token's own
        assignments only, so a token gets the same bits alone and in a batch.
        """
        routing = plan.routing
        back_A = torch.empty_like(plan.order_A)
        back_A[plan.order_A] = torch.arange(back_A.shape[0], device=back_A.device)
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        weighted_AD = rows_RD[back_A].to(wide) * routing.weights_A.to(wide).unsqueeze(-1)
        if routing.top_k is not None:
            y_TD = weighted_AD.view(routing.num_tokens, routing.top_k, rows_RD.shape[-1]).sum(dim=1)
        else:
            y_TD = weighted_AD.new_zeros(routing.num_tokens, rows_RD.shape[-1])
            y_TD = y_TD.index_add(0, routing.token_ids_A, weighted_AD)
        return y_TD.to(plan.input_dtype)
