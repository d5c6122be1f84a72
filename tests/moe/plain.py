"""The layer as the papers write it: a Python loop over tokens and experts. What the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.moe import Experts, FreeExperts, MixedExperts, MoE
from moekit.moe.experts import ClampedSwiGLU

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain_weights(logits_E: Tensor, layer: MoE) -> dict[int, Tensor]:
    """Expert → weight for one token, by the definitions; ties to the lower expert number."""
    config = layer.config
    chosen = sorted(range(len(logits_E)), key=lambda e: (-logits_E[e].item(), e))[: config.top_k]
    if config.gate_order == "topk_softmax":
        total = sum(logits_E[e].exp() for e in chosen)
        weights = {e: logits_E[e].exp() / total for e in chosen}
    else:
        total = sum(logit.exp() for logit in logits_E)
        weights = {e: logits_E[e].exp() / total for e in chosen}
        if config.norm_topk_prob:
            kept = sum(weights.values())
            weights = {e: w / kept for e, w in weights.items()}
    return {e: w * config.routed_scaling_factor for e, w in weights.items()}


def plain_expert(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    """One expert on one token, from the parameters as documented."""
    if isinstance(experts, MixedExperts):
        for group, size in zip(experts.groups, experts.sizes, strict=True):
            if expert < size:
                return plain_expert(group, expert, x_D)
            expert -= size
    if isinstance(experts, FreeExperts):
        return x_D if experts.identity else torch.zeros_like(x_D)
    act, inner = ACTIVATIONS[experts.activation], experts.down_proj.shape[2]
    hidden = experts.in_proj[expert] @ x_D
    if experts.in_bias is not None:
        hidden = hidden + experts.in_bias[expert]
    if isinstance(experts, ClampedSwiGLU):
        gate, up = torch.minimum(hidden[:inner], torch.tensor(7.0)), hidden[inner:].clip(-7, 7)
        hidden = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    else:
        hidden = act(hidden[:inner]) * hidden[inner:] if experts.in_name == "gate_up" else act(hidden)
    out = experts.down_proj[expert] @ hidden
    return out if experts.down_bias is None else out + experts.down_bias[expert]


def plain_moe(layer: MoE, x_TD: Tensor, weights_T: list[dict[int, Tensor]] | None = None) -> Tensor:
    """y = Σ G(x)_i E_i(x), token by token, plus the shared experts; top-k routing where no weights are given."""
    if weights_T is None:
        weights_T = [plain_weights(layer.router.weight @ x_D, layer) for x_D in x_TD]
    rows = []
    for x_D, weights in zip(x_TD, weights_T, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in weights.items():
            y_D = y_D + weight * plain_expert(layer.experts, expert, x_D)
        if layer.shared is not None:
            y_D = y_D + plain_shared(layer, x_D)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.clone()


def plain_shared(layer: MoE, x_D: Tensor) -> Tensor:
    """The shared experts one by one: slices of the stored MLP, each an MLP of its own."""
    shared, act = layer.shared, ACTIVATIONS[layer.config.activation]
    width = layer.config.shared_width // layer.config.num_shared_experts

    def read(matrix: nn.Linear, part: slice) -> Tensor:
        return matrix.weight[part] @ x_D + (0 if matrix.bias is None else matrix.bias[part])

    y_D = torch.zeros_like(x_D) if shared.down_proj.bias is None else shared.down_proj.bias
    for first in range(0, layer.config.shared_width, width):
        part = slice(first, first + width)
        hidden = read(shared.up_proj, part)
        hidden = act(hidden) if shared.gate_proj is None else act(read(shared.gate_proj, part)) * hidden
        y_D = y_D + shared.down_proj.weight[:, part] @ hidden
    return y_D if shared.gate is None else y_D * torch.sigmoid(shared.gate.weight[0] @ x_D)


def gradients(module: nn.Module, y: Tensor, x: Tensor, seed: Tensor) -> dict[str, Tensor]:
    """Gradients of ⟨y, seed⟩ with respect to x and every parameter, by name."""
    named = dict(module.named_parameters())
    values = torch.autograd.grad((y * seed).sum(), [x, *named.values()], allow_unused=True)
    return dict(zip(["x", *named], values, strict=True))
