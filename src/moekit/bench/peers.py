"""Other people's layers and decoders, given our weights, so that both do the same work and can be checked to.

transformers' decoder shares our tensors; llama.cpp reads a file that `models.gguf_write` made of them. Its calls go
through llama-cpp-python's ctypes layer: the high-level class copies every logit into an array of the whole context.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn

from moekit.errors import FileError, MissingExtraError
from moekit.models.archs import ARCHS, config_to_hf
from moekit.models.decoder import Decoder
from moekit.moe import MoE

__all__ = ["LlamaCpp", "transformers_decoder", "transformers_layer"]


def transformers_layer(layer: MoE, implementation: str) -> nn.Module:
    """transformers' Mixtral block with the weights of `layer` (top-k → softmax, SwiGLU, SiLU).

    Args:
        implementation: its experts backend: eager or grouped_mm.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.config.hidden_size,
        intermediate_size=layer.config.intermediate_size,
        num_local_experts=layer.config.num_experts,
        num_experts_per_tok=layer.config.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = cast(nn.Module, MixtralSparseMoeBlock(config))
    names = {"router.weight": "gate.weight"}
    weights = {names.get(name, name): value.detach().clone() for name, value in layer.named_parameters()}
    block.load_state_dict(weights, assign=True)
    return block


def transformers_decoder(decoder: Decoder, implementation: str) -> nn.Module:
    """transformers' model of the same family on the very tensors of `decoder`, which has plain parameters.

    Args:
        implementation: its experts backend: eager or grouped_mm.
    """
    import transformers

    layout = ARCHS[decoder.config.arch].hf
    dtype = str(decoder.embed.weight.dtype).removeprefix("torch.")
    config = transformers.AutoConfig.for_model(**config_to_hf(decoder.config, dtype))
    config._experts_implementation = implementation
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, parameter in decoder.named_parameters():
        (piece,) = layout.pieces(name, decoder.config, fused=layout.fused_name(name) is not None)
        weights[piece.name] = parameter.detach()
    model.load_state_dict(weights, assign=True, strict=decoder.head is not None)
    model.tie_weights()
    # Its rotary frequencies are no parameters: they were made on meta with the rest.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return cast(nn.Module, model.eval())


class LlamaCpp:
    """A model evaluated by llama.cpp; a context manager, because its memory is not Python's.

    Args:
        path: a GGUF file.
        threads: for one token and for many.
        context: positions it can hold; also the most tokens of one `feed`.
        cache: type of the key–value cache, f16 as llama.cpp has it by default, or f32.
        repack: whether it may copy weights into layouts for this CPU. Compiled by GCC 12, its AMX kernels end the
            process with an illegal instruction, on their own too: leave it off where the CPU has AMX.
    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        FileError: llama.cpp does not load the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int,
        context: int = 1024,
        cache: str = "f16",
        repack: bool = True,
    ) -> None:
        self._api: Any = _library()
        self._model = self._context = None
        options = self._api.llama_model_default_params()
        options.use_extra_bufts = repack
        self._model = self._api.llama_model_load_from_file(os.fspath(path).encode(), options)
        if not self._model:
            raise FileError(f"llama.cpp does not load {path}")
        settings = self._api.llama_context_default_params()
        settings.n_ctx, settings.n_batch = context, context
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = {"f32": 0, "f16": 1}[cache]
        if cache == "f32":
            # Flash attention would round the queries' products through fp16.
            settings.flash_attn_type = 0
        self._context = self._api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise FileError(f"llama.cpp makes no context of {context} positions for {path}")
        self.vocab_size = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))

    @staticmethod
    def installed() -> bool:
        """Whether llama-cpp-python is there."""
        return find_spec("llama_cpp") is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; twice is once."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = None

    def clear(self) -> None:
        """Forget all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def forget(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), 0, position, -1)

    def feed(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Append tokens; the last one's logits (V,), a view that the next call overwrites."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        self._decode(self._api.llama_batch_get_one(array, len(ids)))
        return self._logits(-1)

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits (L, V) after each of `ids`, from an empty context."""
        self.clear()
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        try:
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = 1
            batch.n_tokens = len(ids)
            self._decode(batch)
            return np.stack([self._logits(at) for at in range(len(ids))])
        finally:
            self._api.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama.cpp's llama_decode returned {code}")

    def _logits(self, at: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = self._api.llama_get_logits_ith(self._context, at)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", extra="peers") from None
    # Its callback prints what this logger lets through.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama_cpp
