"""Routings that tests make up, and every router loss with the arguments it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moekit import losses
from moekit.moe import Choice, Routing

GROUPS = 2
EVERY_LOSS: dict[str, Callable[[Routing, Tensor], Tensor]] = {
    "load_balancing": lambda routing, _: losses.load_balancing(routing),
    "load_balancing kept": lambda routing, _: losses.load_balancing(routing, count="kept"),
    "sequence_balancing": losses.sequence_balancing,
    "sequence_balancing kept": lambda routing, ids_T: losses.sequence_balancing(routing, ids_T, count="kept"),
    "group_balancing": lambda routing, _: losses.group_balancing(routing, GROUPS),
    "group_balancing kept": lambda routing, _: losses.group_balancing(routing, GROUPS, count="kept"),
    "communication_balancing": lambda routing, _: losses.communication_balancing(routing, GROUPS, 1),
    "communication_balancing kept": lambda routing, _: losses.communication_balancing(routing, GROUPS, 1, count="kept"),
    "z_loss": lambda routing, _: losses.z_loss(routing),
    "importance": lambda routing, _: losses.importance(routing),
    "load": lambda routing, _: losses.load(routing),
    "entropy": lambda routing, _: losses.entropy(routing),
}


def routing_of(logits_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None = None) -> Routing:
    """K experts a token, weights 1/K."""
    tokens, top_k = ids_TK.shape
    token_ids_A = torch.arange(tokens).repeat_interleave(top_k)
    weights_A = torch.full((tokens * top_k,), 1 / top_k, dtype=logits_TE.dtype)
    return Routing(token_ids_A, ids_TK.flatten(), weights_A, logits_TE, top_k, mask_T)


def top_k_routing(tokens: int = 13, experts: int = 6, top_k: int = 2, mask_T: Tensor | None = None) -> Routing:
    """Random fp64 logits and the experts they choose."""
    logits_TE = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    return routing_of(logits_TE, logits_TE.topk(top_k).indices, mask_T)


def any_routing(
    tokens: int, experts: int, top_k: int, *, sigmoid: bool = False, drops: bool = False, masked: bool = False
) -> Routing:
    """Everything random, in fp64: the experts are not those of the logits, and with `drops` capacity took some away."""
    logits_TE = (2 * torch.randn(tokens, experts, dtype=torch.float64)).requires_grad_()
    ids_TK = torch.rand(tokens, experts).topk(top_k).indices
    chosen = Choice.regular(ids_TK)
    kept = chosen.where(torch.rand(tokens * top_k) < 0.6) if drops else chosen
    weights_A = (torch.rand(kept.expert_ids_A.numel(), dtype=torch.float64) + 0.1).requires_grad_()
    load_TE = torch.rand(tokens, experts, dtype=torch.float64).requires_grad_()
    return Routing(
        token_ids_A=kept.token_ids_A,
        expert_ids_A=kept.expert_ids_A,
        weights_A=weights_A,
        logits_TE=logits_TE,
        top_k=kept.top_k,
        mask_T=torch.rand(tokens) < 0.7 if masked else None,
        chosen=chosen if drops else None,
        score_function="sigmoid" if sigmoid else "softmax",
        load_TE=load_TE,
    )


def gradients(loss: Tensor, routing: Routing) -> list[Tensor]:
    """With respect to the three things that carry one; zeros where the loss does not depend on it."""
    leaves = [routing.logits_TE, routing.weights_A, routing.load_TE]
    return list(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))


def moved(choice: Choice, place_T: Tensor, experts_E: Tensor | None = None) -> tuple[Choice, Tensor]:
    """The choice with token t at row `place_T[t]` and expert i called `experts_E[i]`; and the order of its old rows."""
    tokens_A = place_T[choice.token_ids_A]
    order_A = tokens_A.argsort(stable=True)
    experts_A = choice.expert_ids_A if experts_E is None else experts_E[choice.expert_ids_A]
    return Choice(tokens_A[order_A], experts_A[order_A], choice.top_k), order_A


def rearranged(routing: Routing, place_T: Tensor, experts_E: Tensor) -> Routing:
    """The routing of the same tokens in another order, with the experts renamed."""
    kept, order_A = moved(Choice(routing.token_ids_A, routing.expert_ids_A, routing.top_k), place_T, experts_E)
    old_T, old_E = place_T.argsort(), experts_E.argsort()
    return dataclasses.replace(
        routing,
        token_ids_A=kept.token_ids_A,
        expert_ids_A=kept.expert_ids_A,
        weights_A=routing.weights_A[order_A],
        logits_TE=routing.logits_TE[old_T][:, old_E],
        mask_T=None if routing.mask_T is None else routing.mask_T[old_T],
        chosen=None if routing.chosen is None else moved(routing.chosen, place_T, experts_E)[0],
        load_TE=routing.load_TE[old_T][:, old_E],
    )
