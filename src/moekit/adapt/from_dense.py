"""A layer of experts made of one dense MLP f: the mathematics that upcycling and surgery share.

With combine weights w_i over a token's K experts, W = Σ w_i, and f = f_1 + … + f_S cut along its inner width (exact,
because the rows of an inner unit in gate and up, and its column in down, belong to it alone):
- `copy` (2212.05055): Σ w_i · f/W = f, so down and its bias are divided by W.
- `split` (virtual groups, 2410.07524): E/S groups hold all S slices each; the S router rows of a group are equal, so
  top-K takes whole groups (of equal logits the lower number comes first, and a group is adjacent). A token meets K/S
  groups, each slice of group g with weight w_g: Σ_g w_g · Σ_s f_s = (W/S) · f, so down is multiplied by S/W. Its
  bias is added K times, with all weights: divided by W, as for a copy.
- `noise`: copies plus N(0, (noise · σ)²), σ each matrix's own standard deviation.
- `drop` (2502.19261 §3): copies; ⌊r·F⌋ inner units of each expert, the same ones in gate, up and down, are drawn anew
  from N(μ, σ²), μ and σ being those of the values they replace in that matrix.
W is 1 when the gate normalises; otherwise only equal logits fix it (`UpcycleConfig.weights_sum`). The factor goes to
down alone: 2410.07524 spreads its cube root over gate, up and down, which is exact for no activation but ReLU's kin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.adapt.dense import DenseWeights
from moekit.config import HierarchicalOptions, MoEConfig, UpcycleConfig
from moekit.moe import ROUTERS, MoE, Router

__all__ = ["layer_from_dense"]


def layer_from_dense(mlp: DenseWeights, config: UpcycleConfig, generator: torch.Generator) -> MoE:
    """The MoE layer, in the dtype and on the device of `mlp`, sharing no memory with it.

    Random numbers come from `generator` (on the CPU) alone.

    Raises:
        ConfigError: the MLP cannot be cut into `config.splits` equal slices.
    """
    inner, hidden = mlp.up_FD.shape
    layer_config = config.layer(
        hidden_size=hidden,
        intermediate_size=inner,
        expert="mlp" if mlp.gate_FD is None else "swiglu",
        activation=mlp.activation,
        bias=mlp.has_bias,
    )
    experts = _experts(mlp, config, generator)
    with torch.device("meta"):
        layer = MoE(layer_config)
    layer.experts.load_state_dict(experts, assign=True)
    layer.router = _router(layer_config, config.slices, generator).to(mlp.up_FD.device, mlp.up_FD.dtype)
    return layer


def _experts(mlp: DenseWeights, config: UpcycleConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The experts' parameters, by their names in `moe.experts`."""
    factor = 1 / config.weights_sum
    entries = [mlp.up_FD] if mlp.gate_FD is None else [mlp.gate_FD, mlp.up_FD]
    biases = [mlp.up_bias_F] if mlp.gate_FD is None else [mlp.gate_bias_F, mlp.up_bias_F]
    in_EFD = [_cut(weight, 0, config) for weight in entries]
    in_bias_EF = [_cut(_or_zeros(bias, mlp.up_FD[:, 0]), 0, config) for bias in biases] if mlp.has_bias else []
    down_EDF = _cut(mlp.down_DF, 1, config).mul_(config.slices * factor)
    if config.method == "noise":
        for weight in (*in_EFD, down_EDF):
            weight.add_(_normal(weight.shape, generator, weight), alpha=config.noise * weight.std().item())
    if config.method == "drop":
        for expert in range(config.num_experts):
            units = _drawn_units(mlp.up_FD.shape[0], config.drop_fraction, generator)
            for stacked in (*in_EFD, *in_bias_EF, down_EDF.transpose(1, 2)):
                stacked[expert, units] = _like(stacked[expert, units], generator)
    name = "up" if mlp.gate_FD is None else "gate_up"
    tensors = {f"{name}_proj": torch.cat(in_EFD, dim=1), "down_proj": down_EDF}
    if mlp.has_bias:
        bias_D = _or_zeros(mlp.down_bias_D, mlp.down_DF[:, 0]) * factor
        tensors |= {f"{name}_bias": torch.cat(in_bias_EF, dim=1), "down_bias": bias_D.repeat(config.num_experts, 1)}
    return tensors


def _router(layer: MoEConfig, slices: int, generator: torch.Generator) -> Router:
    """A new router, fp32, on the CPU; its rows are N(0, scale / D), equal inside each group of `slices` experts."""
    rows_GD = _normal((layer.num_experts // slices, layer.hidden_size), generator)
    rows_ED = rows_GD.repeat_interleave(slices, dim=0) * (layer.router_init_scale / layer.hidden_size) ** 0.5
    with torch.random.fork_rng(devices=[]):
        if layer.options.gate_rows(layer.num_experts) != layer.num_experts:
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))  # its other rows are its own
        router = ROUTERS[layer.router](layer)
    if router.weight is not None:
        first = layer.options.groups if isinstance(layer.options, HierarchicalOptions) else 0
        with torch.no_grad():
            router.weight[first : first + layer.num_experts] = rows_ED
    return router


def _cut(weight: Tensor, dim: int, config: UpcycleConfig) -> Tensor:
    """(E, ...): the slices of `weight` along `dim`, one an expert, repeated until there are E."""
    slices = torch.stack(weight.chunk(config.slices, dim=dim))
    return slices.repeat(config.num_experts // config.slices, *[1] * weight.ndim)


def _drawn_units(inner: int, fraction: float, generator: torch.Generator) -> Tensor:
    return torch.randperm(inner, generator=generator)[: int(inner * fraction)]


def _like(old: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and the standard deviation of `old` (of all of it, not an estimate)."""
    if not old.numel():
        return old
    wide = old.float()
    return (_normal(old.shape, generator, wide) * wide.std(correction=0) + wide.mean()).to(old.dtype)


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, like: Tensor | None = None) -> Tensor:
    # Drawn in fp32 on the CPU whatever the model's dtype and device, so that one seed gives one layer.
    drawn = torch.randn(shape, generator=generator)
    return drawn if like is None else drawn.to(like.device, like.dtype)
