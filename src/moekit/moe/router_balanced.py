"""Routers that are balanced by how they choose, not by a loss. Shapes as in router.py; C tokens an expert takes."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import kernels
from moekit.config import HashOptions, SinkhornOptions
from moekit.errors import ConfigError
from moekit.moe.router import ROUTERS, Noise, Router, Scores, picked
from moekit.moe.types import Choice

__all__ = ["ExpertChoiceRouter", "HashRouter", "SinkhornRouter"]


@ROUTERS.register("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes the C = ⌊T·K/E⌋ tokens (at least 1) that score it highest (2202.09368 eq 1–3).

    The weight is the token's softmax over all experts. A token may get none, or all. Which tokens are taken depends
    on all the others, also on later ones: for encoders; a causal model refuses it.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="expert_choice")
    >>> ExpertChoiceRouter(config)(torch.randn(10, 8)).counts_E.tolist()
    [5, 5, 5, 5]
    """

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        probs_TE = gate_TE.softmax(dim=-1)
        real = probs_TE.shape[0]
        if mask_T is not None:
            probs_TE, real = probs_TE.masked_fill(~mask_T.unsqueeze(-1), -torch.inf), int(mask_T.sum())
        takes = min(real, max(1, real * self.config.top_k // self.config.num_experts))
        taken_EC = kernels.top_k(probs_TE.T, takes)
        taken_TE = torch.zeros_like(probs_TE, dtype=torch.bool).T.scatter(1, taken_EC, True).T
        tokens_A, experts_A = taken_TE.nonzero(as_tuple=True)  # in token order
        return Choice(tokens_A, experts_A, None)

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        return picked(gate_TE.softmax(dim=-1), choice)


@ROUTERS.register("hash")
class HashRouter(Router):
    """The K experts whose number hashes highest together with the token's id; weights 1/K (2106.04426 §3).

    It has no parameters and needs `input_ids`. The hash is plain 64-bit arithmetic (a splitmix64 finaliser), the
    same in every process and on every machine. `Routing.logits_TE` is 0: no loss can move this router.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=1, router="hash")
    >>> HashRouter(config)(torch.randn(4, 8), input_ids_T=torch.tensor([5, 6, 5, 7])).expert_ids_A.tolist()
    [0, 2, 0, 0]
    """

    options: HashOptions

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        zeros_TE = torch.zeros(x_TD.shape[0], self.config.num_experts, device=x_TD.device, dtype=wide)
        return Scores(zeros_TE, zeros_TE)

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        if input_ids_T is None:
            raise ConfigError("router hash needs the tokens' ids: call the layer with input_ids")
        if len(input_ids_T) != len(gate_TE):
            raise ConfigError(f"router hash got {len(input_ids_T)} input_ids for {len(gate_TE)} tokens")
        experts_E = torch.arange(self.config.num_experts, device=input_ids_T.device)
        seeded_T = _mix(input_ids_T.long() + _mix(torch.tensor(self.options.seed, device=input_ids_T.device)))
        return Choice.regular(kernels.top_k(_mix(seeded_T.unsqueeze(-1) + _mix(experts_E + 1)), self.config.top_k))

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        held_T = torch.bincount(choice.token_ids_A, minlength=gate_TE.shape[0])
        return held_T[choice.token_ids_A].to(gate_TE.dtype).reciprocal()


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap."""
    value = value + (0x9E3779B97F4A7C15 - (1 << 64))
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - (1 << 64))
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros, as unsigned numbers have it."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@ROUTERS.register("sinkhorn")
class SinkhornRouter(Router):
    """Training: the top K of a matrix whose rows and columns were scaled towards equal sums; eval: of the logits.

    The scaling only chooses and has no gradient; the weights are those of top-k routing (2202.01169 §3.1).

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="sinkhorn")
    >>> SinkhornRouter(config)(torch.randn(6, 8)).expert_ids_TK.shape
    torch.Size([6, 2])
    """

    options: SinkhornOptions

    def _choose(self, gate_TE: Tensor, mask_T: Tensor | None, input_ids_T: Tensor | None) -> Choice:
        scores_TE = gate_TE
        if self.training:
            scores_TE = gate_TE.clone()
            real_T = slice(None) if mask_T is None else mask_T
            scores_TE[real_T] = balanced(gate_TE[real_T], self.options.iterations)
        return Choice.regular(kernels.top_k(scores_TE, self.config.top_k))


def balanced(logits_TE: Tensor, iterations: int) -> Tensor:
    """log of exp(logits) scaled so that rows sum to 1 and columns to T/E, by `iterations` rounds of Sinkhorn's.

    >>> balanced(torch.randn(8, 4), 50).exp().sum(0).allclose(torch.full((4,), 2.0))
    True
    """
    tokens, experts = logits_TE.shape
    share = torch.tensor(max(tokens, 1) / experts, dtype=logits_TE.dtype, device=logits_TE.device).log()
    for _ in range(iterations):
        logits_TE = logits_TE - logits_TE.logsumexp(dim=1, keepdim=True)
        logits_TE = logits_TE + share - logits_TE.logsumexp(dim=0, keepdim=True)
    return logits_TE
