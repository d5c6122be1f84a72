"""`MoE`: the pipeline, one line a stage."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.errors import ConfigError
from moekit.moe.dispatch import Dispatcher, LocalDispatcher
from moekit.moe.experts import EXPERTS, SharedExperts
from moekit.moe.router import ROUTERS
from moekit.moe.types import Routing

__all__ = ["MoE"]


class MoE(nn.Module):
    """A sparse Mixture-of-Experts layer: y = Σ_i G(x)_i · E_i(x) over the selected experts, plus the shared ones.

    Args:
        config: shape and kinds, see `MoEConfig`.
        dispatcher: how rows reach their experts; on this device unless told otherwise.

    >>> import torch
    >>> layer = MoE(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2))
    >>> y, routing = layer(torch.randn(2, 5, 16))
    >>> y.shape, routing.counts_E.sum().item()
    (torch.Size([2, 5, 16]), 20)
    """

    def __init__(self, config: MoEConfig, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.config = config
        self.router = ROUTERS[config.router](config)
        self.experts = EXPERTS[config.expert](config)
        self.shared = SharedExperts(config) if config.num_shared_experts else None
        self.dispatcher = dispatcher or LocalDispatcher()

    def forward(self, x: Tensor, mask: Tensor | None = None, input_ids: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Run the layer on x (..., D).

        Args:
            x: hidden states, any float dtype.
            mask: bool (...), True for real tokens; the others are computed but never counted, and with a capacity
                they take no room and come out as 0.
            input_ids: int64 (...), the tokens' ids in the vocabulary, for a router that reads them (hash).
        Returns:
            y in the shape and dtype of x, and the `Routing` for losses and monitors.
        Raises:
            ConfigError: x's last dimension is not the configured hidden_size.
        """
        if x.shape[-1] != self.config.hidden_size:
            raise ConfigError(f"the layer's hidden_size is {self.config.hidden_size}, but x has {x.shape[-1]} features")
        x_TD = self._jittered(x.reshape(-1, x.shape[-1]))
        sequences = math.prod(x.shape[:-2])
        routing: Routing = self.router(x_TD, _flat(mask), _flat(input_ids), max(1, sequences))
        y_TD = self.experts.decode(x_TD, routing)
        if y_TD is None and type(self.dispatcher) is LocalDispatcher:
            y_TD = self.experts.fused(x_TD, routing)
        if y_TD is None:
            rows_RD, plan = self.dispatcher.dispatch(x_TD, routing)
            rows_RD = self.experts(rows_RD, plan.counts_E)
            y_TD = self.dispatcher.combine(rows_RD, plan)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD).to(y_TD.dtype)
        return y_TD.view(x.shape), routing

    def _jittered(self, x_TD: Tensor) -> Tensor:
        jitter = self.config.input_jitter
        if not self.training or not jitter:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)
