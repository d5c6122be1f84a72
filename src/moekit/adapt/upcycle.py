"""Upcycling: a dense model's MLPs become the experts of a sparse one. `from_dense` has the mathematics."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from moekit.adapt.dense import DenseWeights
from moekit.adapt.from_dense import layer_from_dense
from moekit.config import ModelConfig, UpcycleConfig
from moekit.errors import UnsupportedError
from moekit.models.decoder import Decoder

__all__ = ["upcycle", "upcycled_config"]

# Which row of models.archs the MoE model of a dense family is written as.
MOE_ARCH = {"llama": "mixtral", "qwen3": "qwen3_moe"}
# Softmax over the selected logits is the selected entries of the full softmax, divided by their sum: the same
# weights under two names, of which a family's files know one.
NORMALISED: dict[str, tuple[Literal["topk_softmax", "softmax_topk"], bool]] = {
    "mixtral": ("topk_softmax", False),
    "qwen3_moe": ("softmax_topk", True),
}
# Switch Transformer's weight of the balance loss (2101.03961 §2.2).
BALANCE_COEF = 0.01


def upcycled_config(dense: ModelConfig, config: UpcycleConfig) -> ModelConfig:
    """The configuration of the MoE model that `upcycle` makes of a dense one.

    Raises:
        UnsupportedError: the model is an MoE already, or no MoE family is known for it.
        ConfigError: the MLP's width cannot be cut into `splits` equal slices.
    """
    if dense.moe is not None:
        raise UnsupportedError(f"the model is a Mixture of Experts already (arch {dense.arch}); upcycle a dense one")
    arch = MOE_ARCH.get(dense.arch)
    biased = dense.mlp_bias or (arch == "mixtral" and dense.attention_bias)
    if arch is None or biased:
        bias = " with biases" if biased else ""
        raise UnsupportedError(f"no MoE family is known for {dense.arch!r}{bias}; known: {', '.join(MOE_ARCH)}")
    moe = _named_for(arch, config).layer(hidden_size=dense.hidden_size, intermediate_size=dense.intermediate_size)
    return dataclasses.replace(
        dense, arch=arch, intermediate_size=moe.intermediate_size, moe=moe, router_aux_loss_coef=BALANCE_COEF
    )


def upcycle(dense: Decoder, config: UpcycleConfig) -> Decoder:
    """Make a sparse `Decoder` of a dense one; the dense one is left as it is and shares no memory with it.

    Attention, norms, embeddings and head are copied; every MLP becomes an MoE layer in the dense model's dtype.
    The result is a pure function of the model and `config`. Raises what `upcycled_config` raises. A gate or router
    that the family's files cannot express works in memory; saving it is what raises `UnsupportedError`.
    """
    moe_config = upcycled_config(dense.config, config)
    config = _named_for(moe_config.arch, config)
    with torch.device("meta"):
        sparse = Decoder(moe_config)
    generator = torch.Generator().manual_seed(config.seed)
    weights = dense.state_dict()
    tensors = {name: value.clone() for name, value in weights.items() if ".mlp." not in name}
    for layer in range(moe_config.num_hidden_layers):
        prefix = f"layers.{layer}.mlp."
        mlp = DenseWeights(
            gate_FD=weights[f"{prefix}gate_proj.weight"],
            up_FD=weights[f"{prefix}up_proj.weight"],
            down_DF=weights[f"{prefix}down_proj.weight"],
        )
        made = layer_from_dense(mlp, config, generator).state_dict()
        tensors |= {f"{prefix}{name}": value for name, value in made.items()}
    sparse.load_state_dict(tensors, strict=True, assign=True)
    return sparse.requires_grad_(True).train(dense.training)


def _named_for(arch: str, config: UpcycleConfig) -> UpcycleConfig:
    """The same gate under the name that files of this family have for it."""
    if config.router != "topk" or not (config.norm_topk_prob or config.gate_order == "topk_softmax"):
        return config
    gate_order, normalised = NORMALISED[arch]
    return dataclasses.replace(config, gate_order=gate_order, norm_topk_prob=normalised)
