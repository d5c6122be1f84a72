"""A transformers model of a folder of `moekit pack`: its code, with moekit's packed matrices in the places of its own.

With `memory` the experts stay on disk, as in `moekit.load`. Everything else is transformers': attention, caches,
`generate`, hooks; numbers are those of its own code with the packed weights, in float32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.adapt.budget import load_within
from moekit.adapt.packed_folder import load_packed
from moekit.adapt.quant_modules import QuantEmbedding, QuantExperts, QuantLinear
from moekit.errors import UnsupportedError
from moekit.files import read_json
from moekit.kernels.quant import quant_linear
from moekit.machine import parse_bytes
from moekit.models.archs import ARCHS
from moekit.models.decoder import Decoder
from moekit.moe import LocalDispatcher, Routing

__all__ = ["load"]


def load(folder: str | os.PathLike[str], memory: str | None = None) -> Any:
    """The causal language model of transformers in a folder of `moekit pack`, in evaluation mode, for inference.

    Args:
        folder: of a family whose modules transformers names as its files do (Qwen2- and Qwen3-MoE, OLMoE, Mixtral, …).
        memory: what the whole process may take when the model is loaded, as in "8GB": the experts then come from disk
            as tokens need them. transformers' key–value cache comes on top of it.
    Raises:
        UnsupportedError: the modules of this family have other names, or are cut otherwise.
        BudgetError, FileError, FormatError: as `moekit.load` raises them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    decoder = load_packed(folder) if memory is None else load_within(folder, parse_bytes(memory))
    values = read_json(Path(folder) / "config.json")
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(**values)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for path, module in _modules(decoder).items():
        _replace(model, path, module)
    for name, value in _plain(decoder).items():
        _put(model, name, value)
    for path, module in list(model.named_modules()):
        if "RotaryEmbedding" in type(module).__name__:  # its frequencies are computed, not stored
            _replace(model, path, type(module)(config))
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise UnsupportedError(f"{folder}: nothing packed belongs to {left[0]!r} of {type(model).__name__}")
    model.room = decoder.room  # and with it the budget's figures
    return model.eval()


class _Experts(nn.Module):
    """moekit's experts, called as transformers calls its own."""

    def __init__(self, experts: QuantExperts) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, len(experts.formats)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) → (T, D)."""
        tokens, top_k = top_k_index.shape
        token_ids_A = torch.arange(tokens).repeat_interleave(top_k)
        logits_TE = hidden_states.new_zeros(tokens, self.num_experts)
        routing = Routing(token_ids_A, top_k_index.flatten(), top_k_weights.flatten(), logits_TE, top_k)
        y_TD = self.experts.decode(hidden_states, routing)
        if y_TD is None:
            dispatcher = LocalDispatcher()
            rows_RD, plan = dispatcher.dispatch(hidden_states, routing)
            y_TD = dispatcher.combine(self.experts(rows_RD, plan.counts_E), plan)
        return y_TD


class _TiedHead(nn.Module):
    """The head that multiplies with the embedding's bytes."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        return quant_linear(x, self.embedding.packed)


def _modules(decoder: Decoder) -> dict[str, nn.Module]:
    """Where transformers has what is packed."""
    found: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, QuantExperts):
            found[f"{_prefix(decoder, name)}experts"] = _Experts(module)
        elif isinstance(module, QuantLinear | QuantEmbedding):
            found[_their_name(decoder, f"{name}.weight").removesuffix(".weight")] = module
    if decoder.head is None and isinstance(decoder.embed, QuantEmbedding):
        found["lm_head"] = _TiedHead(decoder.embed)
    return found


def _plain(decoder: Decoder) -> dict[str, Tensor]:
    """What is not packed, by transformers' names."""
    packed = (QuantExperts, QuantLinear, QuantEmbedding)
    owners = [name for name, module in decoder.named_modules() if isinstance(module, packed)]
    kept = {n: p for n, p in decoder.named_parameters() if not any(n.startswith(f"{owner}.") for owner in owners)}
    return {_their_name(decoder, name): value for name, value in kept.items()}


def _prefix(decoder: Decoder, name: str) -> str:
    """transformers' name of the MoE layer that holds our module of experts."""
    router = f"{name.removesuffix('experts')}router.weight"
    return _their_name(decoder, router).rsplit(".", 2)[0] + "."


def _their_name(decoder: Decoder, name: str) -> str:
    pieces = list(ARCHS[decoder.config.arch].hf.pieces(name, decoder.config))
    if len(pieces) != 1 or pieces[0].index or pieces[0].stored or pieces[0].transposed:
        raise UnsupportedError(
            f"{decoder.config.arch} keeps {name!r} in pieces: transformers' model cannot take it whole"
        )
    return pieces[0].name.replace("block_sparse_moe", "mlp")  # as transformers renames Mixtral's while it reads them


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(_owner(model, owner, path), leaf, module)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = _owner(model, owner, name)
    if leaf not in module._parameters:
        raise UnsupportedError(f"{type(model).__name__} has no parameter {name!r}")
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _owner(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedError(f"{type(model).__name__} has no module for {name!r}") from None
