"""Router losses: pure functions of a `Routing`. Nothing is collected globally, nothing is added twice.

Each takes one layer's routing or a sequence of them; a sequence gives the mean over layers, never a
pool of their tokens (two layers that collapse on different experts must not look balanced together).
Shapes: T real tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moekit.errors import ConfigError
from moekit.moe.types import Routing

__all__ = ["load_balancing", "z_loss"]


def load_balancing(routing: Routing | Sequence[Routing]) -> Tensor:
    """Switch Transformer's balance loss, normalised by K: L = E / (K·T²) · Σ_i c_i Σ_t p_ti.

    c_i counts the assignments expert i really got from real tokens (no gradient), p is the full softmax.
    Exactly 1.0 when both are uniform, E when everything goes to one expert with K = 1. Source:
    2101.03961 eq 4–6 for K = 1; transformers' version is K times this one.

    Returns a float32 scalar (float64 for float64 logits); 0 when there is no real token.
    Raises `ConfigError` for an empty sequence: a dense model has no routing to balance.

    >>> ids, weights = torch.tensor([0, 1]), torch.ones(2)
    >>> load_balancing(Routing(torch.arange(2), ids, weights, torch.zeros(2, 2), top_k=1)).item()
    1.0
    """
    return _mean_over_layers(routing, _load_balancing)


def z_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    """Router z-loss: mean over real tokens of logsumexp(logits)². Source: 2202.08906 eq 5.

    Returns a float32 scalar (float64 for float64 logits); 0 when there is no real token.

    >>> ids, weights = torch.tensor([0]), torch.ones(1)
    >>> round(z_loss(Routing(ids, ids, weights, torch.zeros(1, 2), top_k=1)).item(), 4)   # (ln 2)²
    0.4805
    """
    return _mean_over_layers(routing, _z_loss)


def _load_balancing(routing: Routing) -> Tensor:
    probs_TE = routing.probs_TE
    if routing.mask_T is not None:
        probs_TE = probs_TE[routing.mask_T]
    tokens = probs_TE.shape[0]
    counts_E = routing.counts_E.to(probs_TE.dtype)
    # K as it happened: A assignments over T tokens. Equal to top_k for a regular routing.
    assigned = counts_E.sum().clamp(min=1)
    return routing.num_experts * (counts_E / assigned) @ (probs_TE.sum(dim=0) / max(tokens, 1))


def _z_loss(routing: Routing) -> Tensor:
    lse_T = routing.logits_TE.logsumexp(dim=-1)
    if routing.mask_T is not None:
        lse_T = lse_T[routing.mask_T]
    return lse_T.square().sum() / max(lse_T.shape[0], 1)


def _mean_over_layers(routing: Routing | Sequence[Routing], loss: Callable[[Routing], Tensor]) -> Tensor:
    if isinstance(routing, Routing):
        return loss(routing)
    if not routing:
        raise ConfigError("no routing to compute a router loss from: the model has no MoE layer")
    return torch.stack([loss(one) for one in routing]).mean()
