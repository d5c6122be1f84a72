"""`watch(model)`: what the routers of any PyTorch model do, by forward hooks, without its cooperation.

It needs no `output_router_logits`, so that it also sees the families that hide their logits, and changes no result.
Which layers it knows is in `sites.py`.

Shapes: B rows, L tokens a row, T = B·L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UnsupportedError
from moekit.integrations.sites import ScoreFunction, Seen, Site, argument, find_sites, parameters_of
from moekit.moe import Router, Routing, RoutingTotals
from moekit.moe.measures import Drift, LayerRouting, RouterDrift, Similarity, expert_similarity

__all__ = ["RoutingWatch", "watch"]

logger = logging.getLogger(__name__)


def watch(model: nn.Module, *, routings: bool = False, score_function: ScoreFunction | None = None) -> RoutingWatch:
    """Count from now on what the MoE layers of `model` choose, until `close()` or the end of a `with` block.

    Tokens of padding are left out where the model is given an `attention_mask` (B, L). A forward pass that is
    computed again in backward, for activation checkpointing of either kind, is not counted again. A count costs a few
    small operations a layer, and no wait for the device.

    Args:
        model: a model of transformers, one wrapped by PEFT or for data parallelism, or any that holds `moekit.MoE`.
        routings: also keep the routings of the last pass, with gradient: for losses that the model does not add.
        score_function: how logits become probabilities; found from the weights when not given.
    Raises:
        UnsupportedError: no layer of it is one that is known.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    >>> model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **sizes))
    >>> with watch(model) as seen:
    ...     output = model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]))
    >>> [(layer.layer, sum(layer.counts), layer.mean_k) for layer in seen.report()]
    [(0, 4, 2.0)]
    """
    return RoutingWatch(model, routings, score_function)


class RoutingWatch:
    """Counts of a model's MoE layers, taken by hooks; see `watch`.

    Attributes:
        paths: the watched modules' names, in the order of the model.
        layers: their layers' numbers; 0, 1, … where those are not unique (an encoder and a decoder, say).
    """

    def __init__(self, model: nn.Module, routings: bool, score_function: ScoreFunction | None) -> None:
        self._keep, self._score_function = routings, score_function
        self._sites = list(find_sites(model))
        if not self._sites:
            raise UnsupportedError(f"{type(model).__name__} has no MoE layer whose choices moekit can read")
        self.paths = tuple(site.path for site in self._sites)
        numbers = tuple(site.layer for site in self._sites)
        self.layers = numbers if len(set(numbers)) == len(numbers) else tuple(range(len(numbers)))
        self._masks: dict[str, Tensor] = {}
        self._told: set[str] = set()
        weights = {layer: site.router_weight for layer, site in zip(self.layers, self._sites, strict=True)}
        self._drift = RouterDrift({layer: weight for layer, weight in weights.items() if weight is not None})
        self._handles = [handle for site in self._sites for handle in self._hook(site)]
        modules = dict(model.named_modules())
        for path in dict.fromkeys(site.backbone for site in self._sites):
            self._handles += self._hook_backbone(path, modules[path])

    def totals(self) -> list[RoutingTotals]:
        """What each layer chose and computed since `watch` or `reset`."""
        return [site.totals() for site in self._sites]

    def report(self) -> list[LayerRouting]:
        """The measures of each layer since `watch` or `reset`."""
        return [LayerRouting.of_totals(*pair) for pair in zip(self.layers, self.totals(), strict=True)]

    @property
    def routings(self) -> list[Routing]:
        """The routing of each layer that the last forward pass came through, with the gradient of logits and weights.

        Raises:
            UnsupportedError: `watch` was not asked to keep them, nothing has run, or a layer does not show its logits.
        """
        if not self._keep:
            raise UnsupportedError("routings are kept only by watch(model, routings=True)")
        ran = [site for site in self._sites if site.ran]
        if not ran:
            raise UnsupportedError("there is no routing yet: the model has not run since it is watched")
        for site in ran:
            if site.routing is None:
                raise UnsupportedError(f"there is no routing of {site.path}: its router does not show its logits")
        return [site.routing for site in ran if site.routing is not None]

    def drift(self, steps: int = 1) -> list[Drift]:
        """How far each router's weight has moved since `watch`; `steps` have been taken since the call before."""
        return self._drift.report(steps)

    def similarity(self) -> list[Similarity]:
        """How alike the experts of each layer are, where they are stored as one stack."""
        pairs = [(layer, site.stacks()) for layer, site in zip(self.layers, self._sites, strict=True)]
        found = [expert_similarity(layer, stacks) for layer, stacks in pairs]
        return [one for one in found if one is not None]

    def reset(self) -> None:
        """Start counting from zero."""
        for site in self._sites:
            site.reset()

    def close(self) -> None:
        """Remove every hook; what was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> RoutingWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, site: Site) -> Iterator[Any]:
        if site.experts is not None:
            if site.router is not None and self._keep:
                yield site.router.register_forward_hook(lambda _, args, output: site.take_logits(output))
            yield site.experts.register_forward_pre_hook(
                lambda _, args, kwargs: self._take(site, site.of_call(args, kwargs)), with_kwargs=True
            )
        elif isinstance(site.router, Router):
            yield site.router.register_forward_hook(lambda _, args, output: self._take_routing(site, output))
        elif site.router is not None:
            yield site.router.register_forward_hook(lambda _, args, output: self._take(site, site.of_output(output)))

    def _hook_backbone(self, path: str, backbone: nn.Module) -> list[Any]:
        """Learn which tokens are padding from the mask that the stack of layers is called with."""

        names = parameters_of(backbone)
        sites = [site for site in self._sites if site.backbone == path]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _in_backward():
                return
            for site in sites:
                site.begin()
            mask = argument(names, "attention_mask", args, kwargs)
            self._masks.pop(path, None)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                self._masks[path] = mask != 0
            elif mask is not None:
                self._tell("its attention mask does not say which tokens are padding: all are counted")

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._masks.pop(path, None)

        return [
            backbone.register_forward_pre_hook(enter, with_kwargs=True),
            backbone.register_forward_hook(leave, always_call=True),
        ]

    def _take(self, site: Site, seen: Seen) -> None:
        """A layer of transformers has chosen."""
        if _in_backward():
            return
        mask_T = self._mask_of(site, seen.ids_TK.shape[0], seen.ids_TK.device)
        site.count(seen, mask_T)
        if self._keep and seen.logits_TE is not None:
            site.score_function = self._score_function or site.score_function or site.score_function_of(seen)
            site.routing = site.routing_of(seen, mask_T, site.score_function)
            self._check_gradient(site, seen.logits_TE)

    def _take_routing(self, site: Site, routing: Routing) -> None:
        """A router of moekit has run."""
        if _in_backward():
            return
        if routing.mask_T is None:
            mask_T = self._mask_of(site, routing.num_tokens, routing.logits_TE.device)
            routing = replace(routing, mask_T=mask_T)
        site.add(routing.chosen_counts_E, routing.counts_E, torch.tensor(routing.real_tokens))
        if self._keep:
            site.routing = routing
            self._check_gradient(site, routing.logits_TE)

    def _mask_of(self, site: Site, tokens: int, device: torch.device) -> Tensor | None:
        """(T,) bool, or None where all tokens are real."""
        mask_BL = self._masks.get(site.backbone)
        if mask_BL is None:
            return None
        length, rest = divmod(tokens, mask_BL.shape[0])
        if rest or length > mask_BL.shape[1]:
            self._tell("a layer's tokens are not those of the attention mask: all are counted")
            return None
        # With a cache the mask covers the past as well, and these are the last tokens.
        return mask_BL[:, mask_BL.shape[1] - length :].reshape(-1).to(device)

    def _check_gradient(self, site: Site, logits_TE: Tensor) -> None:
        weight = site.router_weight
        learns = weight is not None and weight.requires_grad and site.router is not None and site.router.training
        if learns and not logits_TE.requires_grad:
            self._tell(
                "its routings carry no gradient: the pass ran without one, as reentrant checkpointing does "
                "(gradient_checkpointing_kwargs={'use_reentrant': False} keeps it)"
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("moekit watches a model, but %s", message)


def _in_backward() -> bool:
    """Whether autograd is running: then a forward pass is one that is computed again.

    Grad mode does not tell: it is on when either kind of checkpointing computes again, and on in the first pass of
    one of them.
    """
    return torch._C._current_graph_task_id() != -1
