"""Routers that follow one published model to the letter. Shapes as in router.py."""

from __future__ import annotations

from torch import Tensor

from moekit.moe.router import ROUTERS, Noise, Router, Scores, picked
from moekit.moe.types import Choice

__all__ = ["SwitchRouter"]


@ROUTERS.register("switch")
class SwitchRouter(Router):
    """Probabilities softmax(x·W + b), rounded to x's dtype; the K experts with the highest; weights are these.

    As transformers' SwitchTransformersTop1Router does it (2101.03961 eq 1–2 knows no rounding): of experts whose
    probabilities round to the same number in bf16, the lower one is taken. In fp32 it is `topk` with softmax first.

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
