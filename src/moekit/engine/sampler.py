"""How logits become a token: pure functions of one row of logits, and a `Sampler` that remembers what they need.

The order is that of transformers' `generate`: penalties on the logits, then temperature, top-k, top-p, min-p.
Shapes: V vocabulary, C chosen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.config import SamplingConfig

__all__ = ["Sampler", "draw", "penalised", "probabilities"]

HEAD = 1024
"""Tokens that are ranked before the whole vocabulary is: sorting it costs more than a small model's step."""


class Sampler:
    """Chooses the tokens of one answer as a `SamplingConfig` says; two samplers with one seed choose the same.

    Args:
        config: how.
        prompt: its ids, which the repetition penalty counts in.

    >>> sample = Sampler(SamplingConfig(temperature=0))
    >>> sample(torch.tensor([0.1, 3.0, 0.2]))
    1
    """

    def __init__(self, config: SamplingConfig, prompt: Sequence[int] = ()) -> None:
        self.config = config
        self._prompt = list(prompt)
        self._counts: tuple[Tensor, Tensor] | None = None
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token of logits (V,) of any float dtype; temperature 0 takes the first of the largest."""
        if not self.config.has_penalties:
            return self._choose(logits_V)
        prompt_V, new_V = self._counts = self._counts or self._count(logits_V)
        token = self._choose(penalised(logits_V, prompt_V, new_V, self.config))
        new_V[token] += 1
        return token

    def _choose(self, logits_V: Tensor) -> int:
        if self.config.temperature == 0:
            return int(logits_V.argmax())
        return draw(probabilities(logits_V, self.config), self._generator)

    def _count(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        """How often each id is in the prompt, and in the answer that has not begun."""
        prompt_V = torch.bincount(torch.tensor(self._prompt, dtype=torch.int64), minlength=logits_V.shape[0])
        return prompt_V, torch.zeros_like(prompt_V)


def penalised(logits_V: Tensor, prompt_V: Tensor, new_V: Tensor, config: SamplingConfig) -> Tensor:
    """Logits after the penalties, float64 (V,).

    - Repetition (1909.05858 section 4.1, in the form of transformers' RepetitionPenaltyLogitsProcessor): a token of
      prompt or answer has its logit divided by the penalty where positive, multiplied where negative.
    - Presence and frequency (OpenAI API reference): logit − presence · [count > 0] − frequency · count, where the
      count is of the tokens sampled so far; the prompt does not count.

    Args:
        logits_V: any float dtype.
        prompt_V, new_V: int64, how often each token is in the prompt, and in the answer so far.

    >>> one, none = torch.tensor([1, 0]), torch.tensor([0, 0])
    >>> penalised(torch.tensor([2.0, 1.0]), one, none, SamplingConfig(repetition_penalty=4.0)).tolist()
    [0.5, 1.0]
    """
    wide_V = logits_V.double()
    if config.repetition_penalty != 1:
        factor = config.repetition_penalty
        changed_V = torch.where(wide_V < 0, wide_V * factor, wide_V / factor)
        wide_V = torch.where(prompt_V + new_V > 0, changed_V, wide_V)
    new_V = new_V.double()
    return wide_V - config.presence_penalty * new_V.sign() - config.frequency_penalty * new_V


def probabilities(logits_V: Tensor, config: SamplingConfig) -> Tensor:
    """What a token is drawn from: softmax(logits / temperature), cut to top_k, top_p and min_p; float64 (V,), sum 1.

    Each cut sees what the one before it left, renormalised, and is exactly zero outside (top-p: 1904.09751 section
    3.1; min-p: 2407.01082 section 3). The temperature must be above 0.

    >>> probabilities(torch.tensor([2.0, 1.0, 0.0]), SamplingConfig(temperature=1.0, top_k=1)).tolist()
    [1.0, 0.0, 0.0]
    """
    wide_V = logits_V.double()
    probs_V = ((wide_V - wide_V.max()) / config.temperature).softmax(dim=-1)
    if 0 < config.top_k < probs_V.shape[0]:
        probs_V = _keep(probs_V, probs_V.topk(config.top_k).indices)
    if config.top_p < 1:
        probs_V = _keep(probs_V, _nucleus(probs_V, config.top_p))
    if config.min_p > 0:
        probs_V = _keep(probs_V, probs_V >= config.min_p * probs_V.max())
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


def _keep(probs_V: Tensor, kept: Tensor) -> Tensor:
    """Only those of these ids (C,), or where this is True (V,)."""
    kept_V = torch.zeros_like(probs_V)
    kept_V[kept] = probs_V[kept]
    return kept_V / kept_V.sum()
