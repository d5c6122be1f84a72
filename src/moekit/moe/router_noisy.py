"""Routers that explore by chance while training, and are silent in eval. Shapes as in router.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit import kernels
from moekit.config import GShardOptions, GumbelOptions
from moekit.moe.replay import Decision
from moekit.moe.router import ROUTERS, Noise, Router, Scores, picked, softmax_by_token
from moekit.moe.types import Choice, RoutingTotals

__all__ = ["GShardRouter", "GumbelRouter", "NoisyTopKRouter"]


@ROUTERS.register("noisy_topk")
class NoisyTopKRouter(Router):
    """H(x)_i = (x·W)_i + N(0, 1) · softplus((x·W_noise)_i), then top-k of H (1701.06538 eq 3–5).

    The noise rows start at 0, so that every logit begins with noise of the same size, softplus(0) = 0.69.
    In training `Routing.load_TE` holds P(x, i), the probability that expert i would be chosen if its own noise alone
    were drawn again (eq 8–9); `losses.load` makes the load loss of it.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="noisy_topk")
    >>> routing = NoisyTopKRouter(config)(torch.randn(3, 8))
    >>> bool(((routing.load_TE >= 0) & (routing.load_TE <= 1)).all())
    True
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        assert self.weight is not None
        with torch.no_grad():
            self.weight[self.config.num_experts :].zero_()

    def _is_noisy(self) -> bool:
        return True

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        logits_TE, raw_TE = self._product(x_TD, noise).split(self.config.num_experts, dim=-1)
        if noise is None:
            return Scores(logits_TE, logits_TE)
        std_TE = F.softplus(raw_TE)
        noisy_TE = logits_TE + std_TE * noise.normal(*logits_TE.shape)
        return Scores(logits_TE, noisy_TE, load_probability(logits_TE, noisy_TE, std_TE, self.config.top_k))


def load_probability(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """P(x, i) = Φ((logit_i − kth_excluding(H, k, i)) / std_i) (1701.06538 eq 9); 1 where k = E leaves no rival."""
    if top_k == noisy_TE.shape[1]:
        return torch.ones_like(noisy_TE)
    best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    kth_T1, next_T1 = best_TK[:, top_k - 1 : top_k], best_TK[:, top_k : top_k + 1]
    # Without expert i, the k-th best is the k-th of all, or the next one if i is among the first k itself.
    rival_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
    result: Tensor = torch.special.ndtr(
        (logits_TE - rival_TE) / std_TE.clamp(min=torch.finfo(std_TE.dtype).tiny ** 0.5)
    )
    return result


@ROUTERS.register("gshard")
class GShardRouter(Router):
    """Top-2; while training the second expert is taken with probability min(1, 2·g₂) (2006.16668 algorithm 1).

    g₂ is its share of the two weights. A first expert whose second was skipped keeps the weight it had beside it.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="gshard")
    >>> router = GShardRouter(config).eval()
    >>> router(torch.randn(3, 8)).expert_ids_TK.shape
    torch.Size([3, 2])
    """

    options: GShardOptions

    def _is_noisy(self) -> bool:
        return True

    def _decide(
        self, scores: Scores, mask_T: Tensor | None, input_ids_T: Tensor | None, seed: int | None, sequences: int
    ) -> Decision:
        gate_TE = scores.gate_TE.detach()
        pairs = Choice.regular(kernels.top_k(gate_TE, 2))
        if seed is None:
            return self._limited(pairs, gate_TE, mask_T, seed, sequences)
        tokens = gate_TE.shape[0]
        second_T = softmax_by_token(picked(gate_TE, pairs), pairs, tokens).view(tokens, 2)[:, 1]
        # A stream of its own: the seed's own has drawn the noise of the logits.
        taken_T = 2 * second_T > Noise(seed + 1, gate_TE.device).uniform(tokens)
        taken_A = torch.stack([torch.ones_like(taken_T), taken_T], dim=1).flatten()
        return self._limited(pairs, gate_TE, mask_T, seed, sequences, taken_A)


@ROUTERS.register("gumbel")
class GumbelRouter(Router):
    """Gumbel top-k: the K highest of (logits + Gumbel noise) / τ while training, of the logits in eval.

    With `straight_through` the chosen experts weigh 1/K each and the gradient is that of the soft weights
    softmax((l + g) / τ) (1611.01144 §2.2); without, the soft weights are used, divided by the sum of the chosen
    ones. τ falls from `start` to `end` by a constant factor a step over `anneal_steps` steps.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="gumbel")
    >>> GumbelRouter(config)(torch.randn(3, 8)).weights_TK[0].tolist()
    [0.5, 0.5]
    """

    options: GumbelOptions
    steps: Tensor

    def _first_state(self) -> dict[str, Tensor | None]:
        return {"steps": torch.zeros((), dtype=torch.int64)}

    @property
    def temperature(self) -> float:
        """τ now."""
        options, done = self.options, min(1.0, int(self.steps) / self.options.anneal_steps)
        return float(options.start * math.pow(options.end / options.start, done))

    def after_step(self, totals: RoutingTotals) -> None:
        if self.training:
            self.steps += 1

    def _is_noisy(self) -> bool:
        return True

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        logits_TE = self._product(x_TD, noise)
        gate_TE = logits_TE
        if noise is not None:
            gate_TE = logits_TE + noise.gumbel(*logits_TE.shape)
        return Scores(logits_TE, gate_TE / self.temperature)

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        tokens = gate_TE.shape[0]
        if not self.options.straight_through:
            return softmax_by_token(picked(gate_TE, choice), choice, tokens)
        soft_A = picked(gate_TE.softmax(dim=-1), choice)
        held_T = torch.bincount(choice.token_ids_A, minlength=tokens)
        hard_A = held_T[choice.token_ids_A].to(soft_A.dtype).reciprocal()
        return hard_A + (soft_A - soft_A.detach())
