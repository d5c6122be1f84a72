"""Sequences in progress: each takes logits, chooses tokens, gives text and knows when it is over.

One alone and many together run the same class; many together take one token each in turn, over a session each, and a
sequence that ends makes room for the next prompt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from torch import Tensor

from moekit.adapt.budget import MemoryBudget
from moekit.config import SamplingConfig
from moekit.engine.completion import ChosenToken, Completion, chosen
from moekit.engine.sampler import Sampler
from moekit.engine.session import Session, append_each
from moekit.engine.stats import FinishReason, GenerationStats, Traffic, count_experts
from moekit.engine.stops import StopStrings
from moekit.models.tokenizer import TextStream, Tokenizer
from moekit.moe import Routing

__all__ = ["Generation", "Stream", "complete_all"]


class Generation:
    """One answer in the making.

    Args:
        ids: of the prompt, with room for an answer in the context.
        config: how tokens are chosen, and when it ends.
        tokenizer: what ids say.
        end_ids: ids that end the answer.
        context: positions that the model has.
        logprobs: how many of the most likely tokens to record beside each chosen one; None records nothing.

    Attributes:
        text: what was said so far and is certain.
        finish_reason: None until it is over.
    """

    def __init__(
        self,
        ids: Sequence[int],
        config: SamplingConfig,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        context: int,
        logprobs: int | None = None,
    ) -> None:
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._ids, self._end_ids, self._logprobs = list(ids), frozenset(end_ids), logprobs
        room = context - len(self._ids)
        self._limit = min(config.max_new_tokens, room)
        self._limit_reason: FinishReason = "length" if config.max_new_tokens <= room else "context"
        self._sampler = Sampler(config, self._ids)
        self._stream, self._stops, self._text_of = TextStream(tokenizer), StopStrings(config.stop), tokenizer.text_of
        self._session: Session | None = None
        self._reused = 0
        self._new_ids: list[int] = []
        self._chosen: list[ChosenToken] = []
        self._seconds: list[float] = []
        self._traffic: Traffic | None = None
        self._routings: list[tuple[Routing, ...]] = []

    def begin(self, session: Session) -> str:
        """Compute the prompt and choose the first token; returns the text that is certain, here as in `advance`."""
        start = time.perf_counter()
        session.take_routings()
        self._session = session
        self._traffic = Traffic(session.room) if isinstance(session.room, MemoryBudget) else None
        logits_V = session.read(self._ids)
        self._reused = session.reused
        return self._take(logits_V, start)

    @staticmethod
    def advance(generations: Sequence[Generation]) -> list[str]:
        """One more token of each, none of which is over."""
        start = time.perf_counter()
        sessions = [each._session for each in generations if each._session is not None]
        tokens = [each._new_ids[-1] for each in generations]
        logits = [sessions[0].append(tokens)] if len(sessions) == 1 else append_each(sessions, tokens)
        return [each._take(logits_V, start) for each, logits_V in zip(generations, logits, strict=True)]

    def completion(self) -> Completion:
        """What there is so far."""
        logprobs = None if self._logprobs is None else tuple(self._chosen)
        return Completion(self.text, tuple(self._new_ids), logprobs, self.stats())

    def stats(self) -> GenerationStats:
        """Figures so far."""
        first, later = sum(self._seconds[:1]), self._seconds[1:]
        return GenerationStats(
            prompt_tokens=len(self._ids),
            reused_tokens=self._reused,
            new_tokens=len(self._new_ids),
            time_to_first_token=first,
            prefill_tokens_per_second=(len(self._ids) - self._reused) / first if first else 0.0,
            decode_tokens_per_second=len(later) / sum(later) if later else 0.0,
            finish_reason=self.finish_reason or "cancelled",
            expert_counts=count_experts(self._routings),
            experts=self._traffic.stats() if self._traffic else None,
        )

    def _take(self, logits_V: Tensor, start: float) -> str:
        assert self._session is not None
        self._routings += self._session.take_routings()
        token = self._sampler(logits_V)
        self._seconds.append(time.perf_counter() - start)
        if self._traffic is not None:
            self._traffic.token()
        piece = self._end("stop") if token in self._end_ids else self._add(token, logits_V)
        if self.finish_reason is not None:
            self._session = None
        self.text += piece
        return piece

    def _add(self, token: int, logits_V: Tensor) -> str:
        self._new_ids.append(token)
        if self._logprobs is not None:
            self._chosen.append(chosen(logits_V, token, self._logprobs, self._text_of))
        piece = self._stops.push(self._stream.push(token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self._new_ids) == self._limit:
            piece += self._end(self._limit_reason)
        return piece

    def _end(self, reason: FinishReason) -> str:
        tail = self._stops.push(self._stream.end())
        self.finish_reason = "stop" if self._stops.found else reason
        return tail + self._stops.end()


class Stream(Iterator[str]):
    """The pieces of one answer, each as soon as it is certain. Iterate once; `close` stops the answer."""

    def __init__(self, generation: Generation, session: Session, ended: Callable[[GenerationStats], None]) -> None:
        self._generation = generation
        # No reference from the generator to this object: who drops it ends the answer at once.
        self._pieces = _pieces(generation, session, ended)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Generate no more."""
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """What there is so far; the whole answer after the last piece."""
        return self._generation.completion()


def _pieces(
    generation: Generation, session: Session, ended: Callable[[GenerationStats], None]
) -> Generator[str, None, None]:
    try:
        piece = generation.begin(session)
        while generation.finish_reason is None:
            if piece:
                yield piece
            [piece] = Generation.advance([generation])
        if piece:
            yield piece
    finally:
        ended(generation.stats())


def complete_all(generations: Sequence[Generation], new_session: Callable[[], Session], size: int) -> None:
    """Bring all to their end, at most `size` at a time."""
    waiting, live = deque(generations), list[Generation]()
    while waiting or live:
        while waiting and len(live) < size:
            live.append(waiting.popleft())
            live[-1].begin(new_session())
            live = _unfinished(live)
        if live:
            Generation.advance(live)
            live = _unfinished(live)


def _unfinished(generations: Sequence[Generation]) -> list[Generation]:
    return [each for each in generations if each.finish_reason is None]
