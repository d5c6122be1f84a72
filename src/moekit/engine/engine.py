"""`load` and `Model`: a folder of weights becomes something one can talk to.

It joins the decoder (ids and logits), the tokenizer (ids and text) and the sampler, and adds no mathematics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from moekit.adapt.packed_folder import load_packed, save_packed
from moekit.adapt.quant import load_quantised
from moekit.config import ModelConfig, SamplingConfig, from_dict
from moekit.engine.sampler import Sampler
from moekit.engine.session import Session
from moekit.engine.stats import FinishReason, GenerationStats, count_experts
from moekit.engine.stops import StopStrings
from moekit.errors import ConfigError, ContextLengthError, UnsupportedError
from moekit.models.archs import is_packed
from moekit.models.decoder import Decoder, DecoderOutput
from moekit.models.tokenizer import TextStream, Tokenizer, load_tokenizer
from moekit.models.weights import load_decoder, save_decoder
from moekit.registry import Registry

__all__ = ["Model", "Prompt", "load"]

Prompt = str | Sequence[dict[str, str]]
"""Text to continue, or messages {"role": ..., "content": ...} for the model's chat template."""

DTYPES: Registry[torch.dtype] = Registry("dtype")
for _name in ("float32", "bfloat16", "float16"):
    DTYPES.register(_name)(getattr(torch, _name))


def load(
    path: str | PathLike[str],
    dtype: str | torch.dtype | None = None,
    quant: str | None = None,
    memory: str | None = None,
) -> Model:
    """Read a model and its tokenizer from a folder in Hugging Face layout, one of `moekit pack`, or a .gguf file.

    Args:
        path: the folder or file.
        dtype: float32, bfloat16 or float16, by name or as torch has it; None keeps the stored one. Not for a quantised
            model, which computes in float32.
        quant: quantise an unquantised model while it is read, tensor by tensor, to this format (int8, int4, nf4,
            mxfp4, int4-g64-asym, …), embedding and head to int8. `moekit pack` does it once and for all.
        memory: not in this version; anything but None is refused.
    Raises:
        FileError, FormatError, UnsafeFileError: the files are missing, contradict themselves, or are pickles.
        UnknownNameError: no such dtype or format.
        UnsupportedError: memory is given, or a dtype for a quantised model, or quant for a packed one.
    """
    if memory is not None:
        raise UnsupportedError(f"memory={memory!r}: this version loads models whole; leave memory out")
    packed = is_packed(path)
    if dtype is not None and (packed or quant is not None):
        raise UnsupportedError(f"dtype={dtype!r}: a quantised model computes in float32; leave dtype out")
    if packed and quant is not None:
        raise UnsupportedError(f"quant={quant!r}: {path} is packed already; quantise the model it was made of")
    if packed:
        decoder = load_packed(path)
    elif quant is not None:
        decoder, _ = load_quantised(path, quant)
    else:
        decoder = load_decoder(path, DTYPES[dtype] if isinstance(dtype, str) else dtype)
    return Model(decoder, load_tokenizer(path))


class Model:
    """A decoder and its tokenizer.

    Attributes:
        decoder: the `Decoder`, a torch module.
        tokenizer: text to ids and back.
        config: the decoder's `ModelConfig`.
        last_stats: figures of the last finished or abandoned generation; None before the first.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.last_stats: GenerationStats | None = None

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def can_chat(self) -> bool:
        """Whether prompts may be messages: whether the tokenizer has a chat template."""
        return bool(self.tokenizer.hf.chat_template)

    def __call__(self, input_ids: Tensor) -> DecoderOutput:
        """Logits (B, L, V) and routings for ids int64 (B, L)."""
        output: DecoderOutput = self.decoder(input_ids)
        return output

    def generate(self, prompt: Prompt, *, session: Session | None = None, **sampling: Any) -> str:
        """The whole text that follows `prompt`; see `stream`."""
        return "".join(self.stream(prompt, session=session, **sampling))

    def stream(self, prompt: Prompt, *, session: Session | None = None, **sampling: Any) -> Iterator[str]:
        """Pieces of the text that follows `prompt`, each as soon as it is certain.

        Args:
            prompt: text, or chat messages.
            session: from `new_session`; keeps the cache, so that a longer version of the last prompt is quick.
            sampling: fields of `SamplingConfig`.
        Raises:
            ConfigError: a sampling field is unknown or out of range, or the prompt is empty.
            ContextLengthError: the prompt leaves no room in the model's context.
        """
        config = from_dict(SamplingConfig, sampling, source="sampling")
        return self._pieces(self.encode(prompt), session or self.new_session(), config)

    def new_session(self) -> Session:
        """A conversation's memory, for `stream` and `generate`."""
        return Session(self.decoder)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, checked to fit the context with room for an answer. Raises as `stream` does."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.chat(prompt)
        context = self.config.max_position_embeddings
        if not ids:
            raise ConfigError("the prompt is empty: give at least one character")
        if len(ids) >= context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, but the model's context holds {context} with its answer"
            )
        return list(ids)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write weights, configuration and tokenizer to `folder`: in Hugging Face layout, or packed if quantised."""
        if self.decoder.is_packed:
            save_packed(self.decoder, folder, self.tokenizer)
            return
        save_decoder(self.decoder, folder)
        self.tokenizer.save(folder)

    def _pieces(self, ids: list[int], session: Session, config: SamplingConfig) -> Iterator[str]:
        run = _Generation(session, ids, config, self._end_ids())
        text, stops = TextStream(self.tokenizer), StopStrings(config.stop)
        try:
            for token in run:
                piece = stops.push(text.push(token))
                if piece:
                    yield piece
                if stops.found:
                    run.finish_reason = "stop"
                    return
            tail = stops.push(text.end()) + stops.end()
            if tail:
                yield tail
        finally:
            self.last_stats = run.stats()

    def _end_ids(self) -> frozenset[int]:
        return frozenset([*self.config.eos_token_ids, *self.tokenizer.eos_ids])


class _Generation:
    """The tokens of one answer, and what they cost. Iterate once."""

    def __init__(self, session: Session, ids: list[int], config: SamplingConfig, end_ids: Iterable[int]) -> None:
        self._session, self._ids, self._end_ids = session, ids, frozenset(end_ids)
        self._sampler = Sampler(config)
        room = session.decoder.config.max_position_embeddings - len(ids)
        self._limit = min(config.max_new_tokens, room)
        self._limit_reason: FinishReason = "length" if config.max_new_tokens <= room else "context"
        self._seconds: list[float] = []
        self._new_tokens = 0
        self.finish_reason: FinishReason = "cancelled"

    def __iter__(self) -> Iterator[int]:
        self._session.take_routings()
        token = self._timed(self._ids, first=True)
        while token not in self._end_ids:
            self._new_tokens += 1
            yield token
            if self._new_tokens == self._limit:
                self.finish_reason = self._limit_reason
                return
            token = self._timed([token])
        self.finish_reason = "stop"

    def stats(self) -> GenerationStats:
        first, later = sum(self._seconds[:1]), self._seconds[1:]
        computed = len(self._ids) - self._session.reused
        return GenerationStats(
            prompt_tokens=len(self._ids),
            reused_tokens=self._session.reused,
            new_tokens=self._new_tokens,
            time_to_first_token=first,
            prefill_tokens_per_second=computed / first if first else 0.0,
            decode_tokens_per_second=len(later) / sum(later) if later else 0.0,
            finish_reason=self.finish_reason,
            expert_counts=count_experts(self._session.take_routings()),
        )

    def _timed(self, ids: list[int], first: bool = False) -> int:
        """Compute `ids` and choose the next token, remembering how long it took."""
        start = time.perf_counter()
        logits_V = self._session.read(ids) if first else self._session.append(ids)
        token = self._sampler(logits_V)
        self._seconds.append(time.perf_counter() - start)
        return token
