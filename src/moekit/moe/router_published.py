"""Routers that follow one published model to the letter. Shapes as in router.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moekit import kernels
from moekit.config import SparseMixerOptions
from moekit.moe.replay import Decision
from moekit.moe.router import ROUTERS, Noise, Router, Scores, picked
from moekit.moe.types import Choice, Routing

__all__ = ["SparseMixerRouter", "SwitchRouter"]


@ROUTERS.register("switch")
class SwitchRouter(Router):
    """Probabilities softmax(x·W + b), rounded to x's dtype; the K experts with the highest; weights are these.

    As transformers' SwitchTransformersTop1Router does it (2101.03961 eq 1–2 knows no rounding): of experts whose
    probabilities round to the same number in bf16, the lower one is taken. In fp32 it is `topk` with softmax first.

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=1, router="switch")
    >>> routing = SwitchRouter(config)(torch.randn(3, 8).bfloat16())
    >>> torch.equal(routing.weights_A, routing.weights_A.bfloat16().float())
    True
    """

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        scores = super()._score(x_TD, noise)
        probs_TE = scores.gate_TE.softmax(dim=-1)
        return Scores(scores.logits_TE, probs_TE.to(x_TD.dtype).to(probs_TE.dtype))

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        return picked(gate_TE, choice)

    def _affinity(self, gate_TE: Tensor) -> Tensor:
        return gate_TE


@ROUTERS.register("sparsemixer")
class SparseMixerRouter(Router):
    """SparseMixer-v2 (2409.12136), as Phi-3.5-MoE has it: the first expert, and the second among the others.

    Each time, experts whose score is far below the best one left (`SparseMixerOptions.eps`) are out of question, and
    the weight is the expert's share of a softmax over the rest; so the two weights do not sum to 1. Eval takes the
    best; training draws from that softmax (by Gumbel noise), and a drawn expert that is not the best weighs a third of
    its share three times out of four, with the gradient of the whole (Heun's third-order method, §2).

    >>> from moekit import MoEConfig
    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="sparsemixer")
    >>> SparseMixerRouter(config).eval()(torch.randn(3, 8)).expert_ids_TK.shape
    torch.Size([3, 2])
    """

    options: SparseMixerOptions

    def _is_noisy(self) -> bool:
        return True

    def _score(self, x_TD: Tensor, noise: Noise | None) -> Scores:
        logits_TE = self._product(x_TD, None)
        return Scores(logits_TE, logits_TE)

    def _decide(
        self, scores: Scores, mask_T: Tensor | None, input_ids_T: Tensor | None, seed: int | None, sequences: int
    ) -> Decision:
        gate_TE = scores.gate_TE.detach()
        ids_TK = kernels.top_k(gate_TE, 2) if seed is None else self._drawn(gate_TE, seed)[0]
        return self._limited(Choice.regular(ids_TK), gate_TE, mask_T, seed, sequences)

    def _drawn(self, gate_TE: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(T, 2) ids, and bool (T, 2): which of them weigh their whole share though they may not be the best."""
        noise = Noise(seed, gate_TE.device)
        left_TE, ids, whole = gate_TE, [], []
        for _ in range(2):
            near_TE = self._near(gate_TE, left_TE)
            ids.append((near_TE + noise.gumbel(*near_TE.shape)).argmax(dim=-1, keepdim=True))
            whole.append(noise.uniform(len(gate_TE), 1) > 0.75)
            left_TE = left_TE.scatter(1, ids[-1], -torch.inf)
        return torch.cat(ids, dim=1), torch.cat(whole, dim=1)

    def _near(self, gate_TE: Tensor, left_TE: Tensor) -> Tensor:
        """The scores that are left, −inf where they are far below the best of them."""
        best_T1 = left_TE.detach().amax(dim=-1, keepdim=True)
        scale_TE = gate_TE.detach().abs().maximum(best_T1)
        return left_TE.masked_fill((best_T1 - gate_TE.detach()) / scale_TE > 2 * self.options.eps, -torch.inf)

    def _weigh(self, gate_TE: Tensor, choice: Choice) -> Tensor:
        left_TE, weights = gate_TE, []
        for ids_T1 in choice.expert_ids_A.view(-1, 2).split(1, dim=1):
            weights.append(self._near(gate_TE, left_TE).softmax(dim=-1).gather(1, ids_T1))
            left_TE = left_TE.scatter(1, ids_T1, -torch.inf)
        return torch.cat(weights, dim=1).flatten()

    def _routing(self, scores: Scores, decision: Decision, mask_T: Tensor | None) -> Routing:
        routing = super()._routing(scores, decision, mask_T)
        if decision.seed is None:
            return routing
        gate_TE, ids_TK = scores.gate_TE.detach(), routing.expert_ids_TK
        left_TE = gate_TE.scatter(1, ids_TK[:, :1], -torch.inf)
        best_TK = torch.stack([gate_TE.argmax(dim=-1), left_TE.argmax(dim=-1)], dim=1)
        whole_TK = (ids_TK == best_TK) | self._drawn(gate_TE, decision.seed)[1]
        lost_A = 0.6667 * (~whole_TK).to(routing.weights_A.dtype).flatten()
        return replace(routing, weights_A=routing.weights_A - (routing.weights_A * lost_A).detach())
