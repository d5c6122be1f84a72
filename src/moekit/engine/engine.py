"""`load` and `Model`: a folder of weights becomes something one can talk to.

It joins the decoder (ids and logits), the tokenizer (ids and text) and the sampler, and adds no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeGuard, cast, overload

import torch
from torch import Tensor

from moekit.adapt.budget import MemoryBudget, load_within
from moekit.adapt.packed_folder import load_packed, save_packed
from moekit.adapt.quant_stream import load_quantised
from moekit.config import ModelConfig, SamplingConfig, from_dict
from moekit.engine.completion import Completion
from moekit.engine.generation import Generation, Stream, complete_all
from moekit.engine.session import Session
from moekit.engine.stats import GenerationStats
from moekit.errors import ConfigError, ContextLengthError, MoekitError, UnsupportedError
from moekit.machine import parse_bytes
from moekit.models.archs import is_packed
from moekit.models.decoder import Decoder, DecoderOutput
from moekit.models.tokenizer import Message, Tokenizer, load_tokenizer
from moekit.models.weights import load_decoder
from moekit.models.weights_write import save_decoder
from moekit.registry import Registry

__all__ = ["Model", "Prompt", "load"]

Prompt = str | Sequence[Message]
"""Text to continue, or messages {"role": ..., "content": ...} for the model's chat template."""
BATCH_SIZE = 16
"""Prompts of a list in memory at once: each has keys and values of its own."""

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
        memory: what the whole process may take, as in "8GB": of a packed MoE the experts then stay on disk, and as many
            as fit are kept in memory. No number changes.
    Raises:
        FileError, FormatError, UnsafeFileError: the files are missing, contradict themselves, or are pickles.
        UnknownNameError: no such dtype or format.
        UnsupportedError: a dtype for a quantised model, quant for a packed one, or memory for one that is not packed
            or has no experts.
        BudgetError: the memory is too little; the message has the least that works.
    """
    packed = is_packed(path)
    if memory is not None and not packed:
        raise UnsupportedError(
            f"memory={memory!r}: {path} is not packed, and experts come from disk as they are used: "
            f"moekit pack {path} OUT --quant int4, then load OUT"
        )
    if dtype is not None and (packed or quant is not None):
        raise UnsupportedError(f"dtype={dtype!r}: a quantised model computes in float32; leave dtype out")
    if packed and quant is not None:
        raise UnsupportedError(f"quant={quant!r}: {path} is packed already; quantise the model it was made of")
    if memory is not None:
        limit = parse_bytes(memory)
        tokenizer = load_tokenizer(path)  # first, so that what it takes is measured with the rest
        return Model(load_within(path, limit), tokenizer)
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
        last_stats: figures of the last finished or abandoned generation of a single prompt; None before the first.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.last_stats: GenerationStats | None = None

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def budget(self) -> MemoryBudget | None:
        """How memory is divided, of a model loaded with `memory`."""
        room = self.decoder.room
        return room if isinstance(room, MemoryBudget) else None

    @property
    def can_chat(self) -> bool:
        """Whether prompts may be messages: whether the tokenizer has a chat template."""
        return bool(self.tokenizer.hf.chat_template)

    def __call__(self, input_ids: Tensor) -> DecoderOutput:
        """Logits (B, L, V) and routings for ids int64 (B, L)."""
        output: DecoderOutput = self.decoder(input_ids)
        return output

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str] | list[list[Message]], **options: Any) -> list[str]: ...
    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> str | list[str]:
        """The text that follows `prompt`, and for a list of prompts the list of their texts; see `complete`."""
        found: Completion | list[Completion] = self.complete(cast(Any, prompt), **options)
        return found.text if isinstance(found, Completion) else [each.text for each in found]

    @overload
    def complete(self, prompt: Prompt, **options: Any) -> Completion: ...
    @overload
    def complete(self, prompt: list[str] | list[list[Message]], **options: Any) -> list[Completion]: ...
    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        session: Session | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> Completion | list[Completion]:
        """What follows a prompt, with tokens, log-probabilities and figures; for a list of prompts a list of these.

        Each prompt of a list gets what it gets alone, bit for bit, whatever its length and whoever is beside it: it
        has a cache and, with the same `seed`, a random generator of its own. See `Decoder.forward_each`.

        Args:
            session: as for `stream`, for one prompt.
            batch_size: how many prompts of a list are in memory at once; one that ends makes room for the next.
            options: as for `stream`.
        Raises:
            As `stream`, before anything is computed; the error names the prompt of the list.
        """
        if not _is_batch(prompt):
            stream = self.stream(cast(Prompt, prompt), session=session, **options)
            for _ in stream:
                pass
            return stream.completion
        if session is not None:
            raise ConfigError("a session is for one prompt, not for a list")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        generations = [self._one_of_many(number, each, options) for number, each in enumerate(prompt)]
        complete_all(generations, self.new_session, batch_size)
        return [each.completion() for each in generations]

    def stream(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Any] | None = None,
        logprobs: int | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Stream:
        """Pieces of the text that follows `prompt`, each as soon as it is certain; `completion` of what is returned
        has the rest.

        Args:
            prompt: text, or chat messages.
            tools: for the chat template; see `Tokenizer.chat`.
            logprobs: record the log-probability of each token and this many of the most likely ones; 0 its own alone.
            session: from `new_session`; keeps the cache, so that a longer version of the last prompt is quick.
            sampling: fields of `SamplingConfig`.
        Raises:
            ConfigError: a sampling field is unknown or out of range, the prompt is empty, or its template does not
                take it.
            ContextLengthError: the prompt leaves no room in the model's context.
            UnsupportedError: messages for a model without a chat template, or tools for one that knows none.
        """
        generation = self._generation(prompt, tools=tools, logprobs=logprobs, **sampling)
        return Stream(generation, session or self.new_session(), self._ended)

    def new_session(self) -> Session:
        """A conversation's memory, for `stream` and `generate`."""
        return Session(self.decoder)

    def encode(self, prompt: Prompt, tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a prompt, checked to fit the context with room for an answer. Raises as `stream` does."""
        if not isinstance(prompt, str | Sequence):
            raise ConfigError(f"a prompt is text or a list of messages, not {prompt!r}")
        if isinstance(prompt, str):
            if tools:
                raise ConfigError("tools are for chat messages; a plain prompt has no place for them")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.chat(prompt, tools)
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
        if self.budget is not None:
            raise UnsupportedError("the experts of this model are on disk: copy the folder it was loaded from")
        if self.decoder.is_packed:
            save_packed(self.decoder, folder, self.tokenizer)
            return
        save_decoder(self.decoder, folder)
        self.tokenizer.save(folder)

    def _one_of_many(self, number: int, prompt: Prompt, options: dict[str, Any]) -> Generation:
        try:
            return self._generation(prompt, **options)
        except MoekitError as error:
            raise type(error)(f"prompts[{number}]: {error}") from error

    def _generation(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, logprobs: int | None = None, **sampling: Any
    ) -> Generation:
        config = from_dict(SamplingConfig, sampling, source="sampling")
        if logprobs is not None and not 0 <= logprobs <= self.config.vocab_size:
            raise ConfigError(f"logprobs must lie between 0 and the vocabulary's size, not {logprobs}")
        end_ids = [*self.config.eos_token_ids, *self.tokenizer.eos_ids]
        context = self.config.max_position_embeddings
        return Generation(self.encode(prompt, tools), config, self.tokenizer, end_ids, context, logprobs)

    def _ended(self, stats: GenerationStats) -> None:
        self.last_stats = stats


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> TypeGuard[Sequence[Prompt]]:
    """Whether this is a list of prompts, not one: messages are mappings, prompts are not."""
    return not isinstance(prompt, str) and not any(isinstance(each, Mapping) for each in prompt)
