"""Other people's layers, given our weights, so that both do the same work and can be checked to."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from moekit.moe import MoE

__all__ = ["transformers_layer"]


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
