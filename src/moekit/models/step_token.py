"""`Token`: one new token's hidden state on its way through the blocks, a native step or a module at a time.

Shapes: B batch, L length, D hidden, E experts, A assignments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moekit.kernels.steps import AttentionStep, MLPStep, PartStep
from moekit.models.attention import AttentionInput
from moekit.models.cache import KVCache
from moekit.moe import MoE, Routing
from moekit.moe.experts import Residency
from moekit.moe.replay import is_bound

__all__ = ["Token", "think_in_parts"]


class Token:
    """The hidden state of one token on its way through the blocks: float32, rounded to the model's dtype.

    Args:
        x_BLD: (1, 1, D), as embedded.
        cache: its sequence's past.
        inputs: makes what a block's own forward takes beside x.

    Attributes:
        routings: one an MoE layer passed, in layer order.
    """

    def __init__(self, x_BLD: Tensor, cache: KVCache, inputs: Callable[[], AttentionInput]) -> None:
        self.dtype, self.cache = x_BLD.dtype, cache
        self.routings: list[Routing] = []
        self._shape = x_BLD.shape
        self._x_D = x_BLD.to(torch.float32, copy=True).flatten()
        self._inputs = functools.cache(inputs)  # the same for all layers

    def as_module_takes_it(self) -> Tensor:
        """(1, 1, D) in the model's dtype."""
        return self._x_D.to(self.dtype).view(self._shape)

    def attend(self, block: Any, step: AttentionStep | None, angles: Callable[[], Tensor]) -> None:
        """The attention of a block, in its step if it has one."""
        if step is not None:
            step(self._x_D, angles(), self.cache.room(block.attn.layer, 1), self.cache.length)
            return
        x_BLD = self.as_module_takes_it()
        self._take(block.after_attention(x_BLD, block.attn(block.attn_norm(x_BLD), self._inputs())))

    def think(self, block: Any, step: MLPStep | None) -> None:
        """The MLP of a block; its routing, if any, joins `routings`. A router that the step does not know runs as a
        module, and so does one whose decisions are being recorded or repeated."""
        if step is not None and not isinstance(block.mlp, MoE):
            step(self._x_D)
            return
        routing = self._think_in_modules(block) if step is None else self._route(block, step)
        if routing is not None:
            self.routings.append(routing)

    def _route(self, block: Any, step: MLPStep) -> Routing:
        if step.gate is not None and not is_bound():
            logits_TE, ids_A, weights_A = step.route(self._x_D)
            return _routing(ids_A, weights_A, logits_TE)
        routing = self._routed_by_module(block)
        step.routed(self._x_D, routing.expert_ids_A, routing.weights_A)
        return routing

    def begin(self, block: Any, step: MLPStep) -> PartStep:
        """The MLP of a block as far as its routing, which joins `routings`."""
        if step.gate is not None and not is_bound():
            part = step.begin(self._x_D)
            self.routings.append(_routing(part.ids_A, part.weights_A, part.logits_1E))
            return part
        routing = self._routed_by_module(block)
        self.routings.append(routing)
        return step.begin(self._x_D, (routing.expert_ids_A, routing.weights_A))

    def _routed_by_module(self, block: Any) -> Routing:
        h_TD = block.mlp_norm(self.as_module_takes_it())[0]
        routing: Routing = block.mlp.router(h_TD, None, self._inputs().ids_BL[0])
        return routing

    def _think_in_modules(self, block: Any) -> Routing | None:
        x_BLD, routing = self.as_module_takes_it(), None
        y_BLD = block.mlp_norm(x_BLD)
        if isinstance(block.mlp, MoE):
            y_BLD, routing = block.mlp(y_BLD, None, self._inputs().ids_BL)
        else:
            y_BLD = block.mlp(y_BLD)
        self._take(block.after_mlp(x_BLD, y_BLD))
        return routing

    def _take(self, x_BLD: Tensor) -> None:
        self._x_D = x_BLD.float().flatten()


def think_in_parts(
    tokens: Sequence[Token], block: Any, step: MLPStep, following: tuple[Residency, MLPStep] | None
) -> None:
    """The MLP of a block for tokens whose experts come to memory one after another: each is fetched once for all of
    them, and works on those that want it as soon as it is there. No number depends on the order.

    Where that pays, the next block's router is asked already now, about a lone token, which experts to read next.
    """
    residency: Residency = block.mlp.experts.residency
    if len(tokens) == 1:
        residency.begin_lone_token()
    parts = [token.begin(block, step) for token in tokens]
    for group in residency.together([part.ids_A.tolist() for part in parts]):
        wanted: dict[int, list[tuple[int, int]]] = {}
        for number in group:
            for slot, expert in enumerate(parts[number].ids_A.tolist()):
                wanted.setdefault(expert, []).append((number, slot))
        with residency.bring(wanted) as arrivals:
            if following is not None and len(tokens) == 1 and following[0].looks_ahead:
                following[0].expect(following[1].guess(tokens[0]._x_D))
            for arrived in arrivals:
                slots: dict[int, list[int]] = {number: [] for number in group}
                for expert, address in arrived:
                    step.place(expert, address)
                    for number, slot in wanted[expert]:
                        slots[number].append(slot)
                for number in group:
                    parts[number].hidden(slots[number])
            for number in group:
                parts[number].finish()


def _routing(ids_A: Tensor, weights_A: Tensor, logits_TE: Tensor | None) -> Routing:
    assert logits_TE is not None
    return Routing(_zeros(len(ids_A)), ids_A, weights_A, logits_TE, len(ids_A))


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
