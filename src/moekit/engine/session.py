"""A sequence in progress: its tokens and their cache. It knows ids and logits, not text and not sampling.

Shapes: L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.models.cache import PREFILL_CHUNK, KVCache, Room
from moekit.models.decoder import Decoder, DecoderOutput
from moekit.moe import Routing

__all__ = ["PREFILL_CHUNK", "Session", "append_each"]


SETTLED = 128
"""Tokens after which a memory budget is compared with what the process takes; also after each part of a prompt."""


class Session:
    """Keeps a decoder's keys and values between prompts, so that only what follows the common prefix is computed.

    Logits after a reused prefix equal those of a fresh session up to the rounding of the model's dtype.

    Attributes:
        tokens: the ids whose keys and values the cache holds.
        reused: how many of them the last `read` took over instead of computing.
        room: who allots memory to it; None: nobody.
    """

    def __init__(self, decoder: Decoder, chunk: int = PREFILL_CHUNK) -> None:
        self.decoder = decoder
        self.tokens: list[int] = []
        self.reused = 0
        self._chunk = chunk
        self.room: Room | None = getattr(decoder, "room", None)
        self._cache = KVCache(decoder.config, dtype=decoder.cache_dtype, room=self.room)
        self._routings: list[tuple[Routing, ...]] = []

    def read(self, ids: Sequence[int]) -> Tensor:
        """Make `ids` the session's tokens and return the logits (V,) that follow the last one.

        Raises:
            ContextLengthError: more ids than the model's context holds.
            BudgetError: their keys and values do not fit the memory that was allowed.
        """
        self.reused = min(_common_prefix(self.tokens, ids), self._cache.length, len(ids) - 1)
        self._cache.truncate(self.reused)
        del self.tokens[self.reused :]
        for start in range(self.reused, len(ids), self._chunk):
            logits_V = self.append(ids[start : start + self._chunk])
        return logits_V

    @torch.inference_mode()
    def append(self, ids: Sequence[int]) -> Tensor:
        """Compute `ids` after the session's tokens; returns the logits (V,) that follow the last one."""
        return self._took(ids, self.decoder(torch.tensor([ids]), cache=self._cache, last_only=True))

    def _took(self, ids: Sequence[int], output: DecoderOutput) -> Tensor:
        self.tokens.extend(ids)
        if output.routings:
            self._routings.append(output.routings)
        if self.room is not None and (len(ids) > 1 or len(self.tokens) % SETTLED == 0):
            self.room.settle()
        return output.logits[0, -1]

    def take_routings(self) -> list[tuple[Routing, ...]]:
        """The routings (one an MoE layer) of every pass since the last call, which forgets them."""
        taken, self._routings = self._routings, []
        return taken


@torch.inference_mode()
def append_each(sessions: Sequence[Session], tokens: Sequence[int]) -> list[Tensor]:
    """Compute one token after those of each session of one decoder; the logits (V,) that follow, bit for bit those
    that `append` gives for each alone."""
    outputs = sessions[0].decoder.forward_each(tokens, [session._cache for session in sessions])
    joined = zip(sessions, tokens, outputs, strict=True)
    return [session._took([token], output) for session, token, output in joined]


def _common_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    pairs = zip(old, new, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(old), len(new)))
