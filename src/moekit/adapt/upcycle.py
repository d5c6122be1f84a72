"""Upcycling: a dense model's MLPs become the experts of a sparse one (2212.05055, and 2410.07524 for splits).

What is kept exactly, and why. The gate's weights sum to 1 (topk_softmax), so
- `copy`: every expert is the dense MLP f, and Σ w_i f(x) = f(x), whatever the router says;
- `split`: f is cut along its inner width into S slices, f = f_1 + … + f_S, which is exact because the gate
  and up rows of an inner unit belong to it alone. E/S groups hold all S slices each; the S router rows of a
  group are equal, so top-K takes whole groups (ties go to the lower number, and a group's are adjacent).
  A group of weight w gives each slice w/S, so the down-projections are multiplied by S:
  Σ_groups w/S · S · Σ_s f_s(x) = f(x);
- `noise`: copies that differ from the start; close to the dense model, not equal.
All hold up to rounding. Active FLOPs: `split` with K = S costs what the dense MLP costs, plus the router.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moekit.config import ModelConfig, MoEConfig, UpcycleConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.models.decoder import Decoder

__all__ = ["upcycle", "upcycled_config"]

# Which row of models.archs the MoE model of a dense family is written as.
MOE_ARCH = {"llama": "mixtral"}
# Switch Transformer's weight of the balance loss (2101.03961 §2.2).
BALANCE_COEF = 0.01
MLP_WEIGHTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def upcycled_config(dense: ModelConfig, config: UpcycleConfig) -> ModelConfig:
    """The configuration of the MoE model that `upcycle` makes of a dense one.

    Raises:
        UnsupportedError: the model is an MoE already, or no MoE family is known for it.
        ConfigError: the MLP's width cannot be cut into `splits` equal slices.
    """
    if dense.moe is not None:
        raise UnsupportedError(f"the model is a Mixture of Experts already (arch {dense.arch}); upcycle a dense one")
    if dense.arch not in MOE_ARCH or dense.attention_bias:
        bias = " with attention biases" if dense.attention_bias else ""
        raise UnsupportedError(f"no MoE family is known for {dense.arch!r}{bias}; known: {', '.join(MOE_ARCH)}")
    splits = config.splits if config.method == "split" else 1
    if dense.intermediate_size % splits:
        raise ConfigError(f"splits ({splits}) must divide the MLP's intermediate_size ({dense.intermediate_size})")
    moe = MoEConfig(
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size // splits,
        num_experts=config.num_experts,
        top_k=config.top_k,
        router_init_scale=config.router_init_scale,
    )
    return dataclasses.replace(
        dense,
        arch=MOE_ARCH[dense.arch],
        intermediate_size=moe.intermediate_size,
        moe=moe,
        router_aux_loss_coef=BALANCE_COEF,
    )


def upcycle(dense: Decoder, config: UpcycleConfig) -> Decoder:
    """Make a sparse `Decoder` of a dense one; the dense one is left as it is and shares no memory with it.

    Attention, norms, embeddings and head are copied; every MLP becomes an MoE layer in the dense model's dtype.
    The result is a pure function of the model and `config.seed`. Raises what `upcycled_config` raises.
    """
    moe_config = upcycled_config(dense.config, config)
    with torch.device("meta"):
        sparse = Decoder(moe_config)
    generator = torch.Generator().manual_seed(config.seed)
    weights = dense.state_dict()
    tensors = {name: value.clone() for name, value in weights.items() if ".mlp." not in name}
    for layer in range(moe_config.num_hidden_layers):
        mlp = {name: weights[f"layers.{layer}.mlp.{name}"] for name in MLP_WEIGHTS}
        tensors |= {f"layers.{layer}.mlp.{name}": value for name, value in _moe_layer(mlp, config, generator).items()}
    sparse.load_state_dict(tensors, strict=True, assign=True)
    return sparse.requires_grad_(True).train(dense.training)


def _moe_layer(mlp: dict[str, Tensor], config: UpcycleConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of one MoE layer, from gate_proj (F, D), up_proj (F, D) and down_proj (D, F)."""
    splits = config.splits if config.method == "split" else 1
    groups = config.num_experts // splits
    gate_SFD = torch.stack(mlp["gate_proj.weight"].chunk(splits, dim=0))
    up_SFD = torch.stack(mlp["up_proj.weight"].chunk(splits, dim=0))
    down_SDF = torch.stack(mlp["down_proj.weight"].chunk(splits, dim=1)) * splits
    gate_up_EGD = torch.cat([gate_SFD, up_SFD], dim=1).repeat(groups, 1, 1)
    down_EDF = down_SDF.repeat(groups, 1, 1)
    if config.method == "noise":
        for weight in (gate_up_EGD, down_EDF):
            weight.add_(_normal(weight.shape, generator, weight.dtype), alpha=config.noise * weight.std().item())
    hidden = gate_up_EGD.shape[2]
    rows_GD = _normal((groups, hidden), generator, gate_up_EGD.dtype) * (config.router_init_scale / hidden) ** 0.5
    return {
        "router.weight": rows_GD.repeat_interleave(splits, dim=0),
        "experts.gate_up_proj": gate_up_EGD,
        "experts.down_proj": down_EDF,
    }


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    # Drawn in fp32 whatever the model's dtype, so that one seed gives one router.
    return torch.randn(shape, generator=generator).to(dtype)
