"""Routers: hidden states in, `Routing` out. Scores, choice and weights are always computed in float32.

Shapes: T tokens, D hidden, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.moe.replay import replayed
from moekit.moe.types import Routing
from moekit.registry import Registry

__all__ = ["ROUTERS", "TopKRouter"]

ROUTERS: Registry[type[nn.Module]] = Registry("router")


@ROUTERS.register("topk")
class TopKRouter(nn.Module):
    """Send each token to the K experts with the highest logits x·W.

    Weights by `gate_order`: `topk_softmax` is softmax over the selected logits (Mixtral, 2401.04088 §2.1;
    1701.06538 eq 3–5, where the others count as −∞); `softmax_topk` keeps the selected entries of the full
    softmax (Switch, 2101.03961 eq 1–2), divided by their sum when `norm_topk_prob` (Qwen3-MoE).
    Ties go to the lower expert number. The weight stays in its own dtype; the product is fp32 even under autocast.

    >>> config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
    >>> TopKRouter(config)(torch.randn(3, 8)).weights_TK.sum(-1).allclose(torch.ones(3))
    True
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate_order = config.gate_order
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling_factor = config.routed_scaling_factor
        self.init_scale = config.router_init_scale
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from N(0, init_scale / D) (2101.03961 §2.4 uses a scale of 0.1)."""
        nn.init.normal_(self.weight, std=(self.init_scale / self.weight.shape[1]) ** 0.5)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        """Route (T, D) hidden states of any float dtype; `mask_T` (bool) marks the real tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = x_TD.to(wide) @ self.weight.to(wide).T
            ids_TK = replayed(self._choose, logits_TE)
            weights_TK = self._weigh(logits_TE, ids_TK)
        tokens_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        return Routing(
            token_ids_A=tokens_T.repeat_interleave(self.top_k),
            expert_ids_A=ids_TK.flatten(),
            weights_A=weights_TK.flatten(),
            logits_TE=logits_TE,
            top_k=self.top_k,
            mask_T=mask_T,
        )

    def _choose(self, logits_TE: Tensor) -> Tensor:
        # A stable sort, because torch.topk leaves the order of equal values unspecified.
        return logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]

    def _weigh(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        if self.gate_order == "topk_softmax":
            weights_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
        else:
            weights_TK = logits_TE.softmax(dim=-1).gather(1, ids_TK)
            if self.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK * self.scaling_factor if self.scaling_factor != 1.0 else weights_TK

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, {self.gate_order}"
