"""`DropIn`: an MoE layer behind the interface of an MLP, one tensor in and one out, inside a model that is not ours.

The model that it sits in knows no routings, so the layer keeps those of the model's last forward pass, on itself.
Gradient checkpointing runs that forward pass again in backward:
- a recomputation is a forward inside a backward; it is never kept, so what is counted is counted once;
- without reentrant autograd, the first pass had a graph, and the kept routing carries the router's gradient;
- with it, the first pass had no graph. What is kept then are leaves that stand for the routing's tensors; the
  gradient that a loss leaves on them is paid out in the recomputation, where the router's graph exists at last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UnsupportedError
from moekit.moe import MoE, Routing, RoutingTotals

__all__ = ["DropIn", "ModelPass"]


class ModelPass:
    """When the model's forward passes begin and end; its drop-ins share one. Hooks of the model report to it."""

    def __init__(self) -> None:
        self.number = 0
        self.running = False

    def watch(self, model: nn.Module) -> None:
        """From now on, follow the forward passes of `model`."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, model: nn.Module, args: Any) -> None:
        self.number += 1
        self.running = True

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.running = False


@dataclass(eq=False)
class _Debt:
    """Gradients that a loss left on the routing of a pass without graph, until its recomputation takes them over."""

    logits_TE: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)


class DropIn(nn.Module):
    """Calls its MoE, returns the tensor alone, and keeps the routing.

    Args:
        moe: the layer.
        dropout: probability of the dropout that followed the MLP.
        model_pass: the passes of the model around it.
    """

    _routings: list[Routing]
    _debts: list[_Debt]
    _totals: RoutingTotals | None
    _kept_in: int

    def __init__(self, moe: MoE, dropout: float, model_pass: ModelPass) -> None:
        super().__init__()
        self.moe = moe
        self.dropout = nn.Dropout(dropout)
        self._pass = model_pass
        self.__dict__ |= _nothing_kept()

    @property
    def routings(self) -> tuple[Routing, ...]:
        """Those of the model's last forward pass: one, or several if the pass used this layer several times.

        Outside a pass of the model (a part of it called alone), that of the last call.
        """
        return tuple(self._routings)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        y, routing = self._run(x)
        if not _recomputing():
            self._keep(routing)
        elif self._debts and torch.is_grad_enabled():
            y = self._pay(y, routing)
        dropped: Tensor = self.dropout(y)
        return dropped

    def after_step(self) -> None:
        """Give the router what it was used for in training since the last call; once an optimizer step."""
        if self._totals is not None:
            self.moe.router.after_step(self._totals)
            self._totals = None

    def _run(self, x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = self.moe(x)
        return y, routing

    def _keep(self, routing: Routing) -> None:
        if self._debts:
            self._debts.clear()
            raise UnsupportedError(
                "a router loss was backpropagated when the recomputation it belongs to was over: with reentrant "
                "checkpointing, add it to the model's loss and call backward once; or set use_reentrant=False"
            )
        if not self._pass.running or self._kept_in != self._pass.number:
            self._routings.clear()
        self._kept_in = self._pass.number
        if self.training:
            totals = RoutingTotals.of(routing)
            self._totals = totals if self._totals is None else self._totals + totals
        graphless = self.training and not torch.is_grad_enabled()
        self._routings.append(self._with_leaves(routing) if graphless else routing)

    def _with_leaves(self, routing: Routing) -> Routing:
        """The routing with leaves for its tensors, which report the gradient they get."""
        debt = _Debt(routing.logits_TE)
        leaves: dict[str, Any] = {}
        for name in _DIFFERENTIABLE:
            value: Tensor | None = getattr(routing, name)
            if value is not None:
                leaves[name] = value.detach().requires_grad_()
                leaves[name].register_hook(partial(self._owe, debt, name))
        return dataclasses.replace(routing, **leaves)

    def _owe(self, debt: _Debt, name: str, grad: Tensor) -> None:
        debt.grads[name] = grad
        if debt not in self._debts:
            self._debts.append(debt)

    def _pay(self, y: Tensor, routing: Routing) -> Tensor:
        """y, with the gradients of the debt of this very call added to its graph."""
        logits_TE = routing.logits_TE.detach()
        same = [debt for debt in self._debts if debt.logits_TE.shape == logits_TE.shape]
        if not same:
            return y
        debt = min(same, key=lambda debt: float((debt.logits_TE - logits_TE).abs().max()))
        self._debts.remove(debt)
        values = [getattr(routing, name) for name in debt.grads]
        paid: Tensor = _Pay.apply(y, *values, *debt.grads.values())
        return paid

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no routing: its tensors belong to a graph."""
        return self.__dict__ | _nothing_kept()


def _nothing_kept() -> dict[str, Any]:
    return {"_routings": [], "_debts": [], "_totals": None, "_kept_in": -1}


# The tensors of a routing that a loss may be made of.
_DIFFERENTIABLE = ("logits_TE", "weights_A", "load_TE")


class _Pay(torch.autograd.Function):
    """y unchanged; in backward, `grads` become the gradients of `values`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *values_and_grads: Tensor) -> Tensor:
        ctx.grads = values_and_grads[len(values_and_grads) // 2 :]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return grad_y, *ctx.grads, *[None] * len(ctx.grads)


def _recomputing() -> bool:
    # The number of the backward pass that is running in this thread; torch.utils.checkpoint asks the same way.
    return torch._C._current_graph_task_id() != -1
