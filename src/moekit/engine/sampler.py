"""How logits become a token. Pure functions of one row of logits; the only state is the random generator.

Shapes: V vocabulary, C chosen tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config import SamplingConfig

__all__ = ["Sampler", "draw", "probabilities"]

HEAD = 1024
"""Tokens that are ranked before the whole vocabulary is: sorting it costs more than a small model's step."""


class Sampler:
    """Chooses tokens as a `SamplingConfig` says; two samplers with one seed choose the same.

    >>> sample = Sampler(SamplingConfig(temperature=0))
    >>> sample(torch.tensor([0.1, 3.0, 0.2]))
    1
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token of logits (V,) of any float dtype; temperature 0 takes the first of the largest."""
        if self.config.temperature == 0:
            return int(logits_V.argmax())
        return draw(probabilities(logits_V, self.config), self._generator)


def probabilities(logits_V: Tensor, config: SamplingConfig) -> Tensor:
    """What a token is drawn from: softmax(logits / temperature), cut to top_k, then to top_p; float64 (V,), sum 1.

    Exactly zero outside the cut (top-p: 1904.09751 section 3.1). The temperature must be above 0.

    >>> probabilities(torch.tensor([2.0, 1.0, 0.0]), SamplingConfig(temperature=1.0, top_k=1)).tolist()
    [1.0, 0.0, 0.0]
    """
    wide_V = logits_V.double()
    probs_V = ((wide_V - wide_V.max()) / config.temperature).softmax(dim=-1)
    if 0 < config.top_k < probs_V.shape[0]:
        probs_V = _keep(probs_V, probs_V.topk(config.top_k).indices)
    if config.top_p < 1:
        probs_V = _keep(probs_V, _nucleus(probs_V, config.top_p))
    return probs_V


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One index drawn with these probabilities (V,), by inverting their running sum.

    `torch.multinomial` takes hundreds of times as long for a large vocabulary.
    """
    running_V = probs_V.cumsum(dim=0)
    point = torch.rand(1, generator=generator, dtype=running_V.dtype) * running_V[-1]
    return int(torch.searchsorted(running_V, point, right=True))


def _nucleus(probs_V: Tensor, mass: float) -> Tensor:
    """Ids of the smallest set of most likely tokens that holds at least `mass`, int64 (C,)."""
    values_C, ids_C = probs_V.topk(min(HEAD, probs_V.shape[0]))
    if values_C.sum() < mass:
        values_C, ids_C = probs_V.sort(descending=True, stable=True)
    before_C = values_C.cumsum(dim=0) - values_C
    return ids_C[before_C < mass]


def _keep(probs_V: Tensor, ids_C: Tensor) -> Tensor:
    kept_V = torch.zeros_like(probs_V)
    kept_V[ids_C] = probs_V[ids_C]
    return kept_V / kept_V.sum()
