"""What a generation gives: its text, its tokens with their log-probabilities, and its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moekit.engine.stats import GenerationStats

__all__ = ["ChosenToken", "Completion", "TokenLogprob", "chosen"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token that could come next.

    Attributes:
        id: in the vocabulary.
        text: of the token alone; U+FFFD for a part of a character.
        logprob: natural logarithm of its probability.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class ChosenToken(TokenLogprob):
    """The one that did, and the most likely ones beside it, the likeliest first."""

    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        text: up to the end token, the first stop string or the limit.
        token_ids: every id generated but the end token, those of a stop string included.
        logprobs: one for each of these, if asked for. They are of the model's own distribution, before penalties,
            temperature and cuts, as vLLM gives them by default ("raw_logprobs").
        stats: figures.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[ChosenToken, ...] | None
    stats: GenerationStats

    def to_dict(self) -> dict[str, Any]:
        """For JSON: text, token ids, logprobs if there are any, and the figures beside them."""
        logprobs = {} if self.logprobs is None else {"logprobs": [asdict(each) for each in self.logprobs]}
        return {"text": self.text, "token_ids": list(self.token_ids), **logprobs, **self.stats.to_dict()}


def chosen(logits_V: Tensor, token: int, count: int, text_of: Callable[[int], str]) -> ChosenToken:
    """The log-probability of `token` and of the `count` most likely ones, from the model's logits (V,).

    >>> import torch
    >>> found = chosen(torch.tensor([0.0, 1.0]).log(), 1, 1, "ab".__getitem__)
    >>> found.text, found.logprob, found.top
    ('b', 0.0, (TokenLogprob(id=1, text='b', logprob=0.0),))
    """
    logprobs_V = logits_V.double().log_softmax(dim=-1)
    values, ids = logprobs_V.topk(count)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = tuple(TokenLogprob(each, text_of(each), value) for each, value in pairs)
    return ChosenToken(token, text_of(token), logprobs_V[token].item(), top)
