"""The MoE layers inside a PyTorch model, found by their shape, and what one pass through each decided.

transformers is not imported: its experts are known by the arguments they are called with, its odder routers by name.

Shapes: T tokens, E experts, K experts a token, A assignments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.errors import UnsupportedError
from moekit.moe import Choice, Router, Routing, RoutingTotals
from moekit.moe.measures import ExpertStack

__all__ = ["ScoreFunction", "Seen", "Site", "argument", "find_sites", "parameters_of"]

ScoreFunction = Literal["softmax", "sigmoid"]

# The arguments by which an experts module of transformers is told what was chosen, and with what weight.
_CALLS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
# Routers that return probabilities where others return logits; their logarithm has the same softmax.
_PROBABILITIES = {"Gemma4TextRouter", "DiffusionGemmaTextRouter"}
# Weights may be off by two roundings to bfloat16 of numbers up to 1.
_SAME_SCORES = 0.02


@dataclass(frozen=True, eq=False)
class Seen:
    """What one pass through one layer decided, before padding is told apart.

    Attributes:
        ids_TK: the experts that were chosen; E and above mark none.
        weights_TK: their combine weights.
        kept_TK: bool, those that found room; None for all.
        logits_TE: the router's logits, or None where they are not known.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    logits_TE: Tensor | None


def _llama4(router: Any, output: Any) -> Seen:
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=-1).indices
    return Seen(ids_TK, scores_TE.gather(1, ids_TK), None, logits_TE)


def _jetmoe(router: Any, output: Any) -> Seen:
    values_TK, ids_TK = output[4].topk(router.top_k, dim=-1)
    return Seen(ids_TK, values_TK.softmax(dim=-1), None, output[4])


def _switch(router: Any, output: Any) -> Seen:
    places_BLE, probs_BL1, logits_BLE = output
    logits_TE = logits_BLE.flatten(0, 1)
    # Not the logits' own argmax: probabilities are rounded to the model's dtype first, and the first of equals wins.
    ids_T1 = logits_TE.softmax(dim=-1).to(router.input_dtype).argmax(dim=-1, keepdim=True)
    return Seen(ids_T1, probs_BL1.flatten(0, 1), places_BLE.flatten(0, 1).gather(1, ids_T1) > 0, logits_TE)


# Routers of transformers whose experts are not told what was chosen, or not in that form.
_ROUTERS: dict[str, Callable[[Any, Any], Seen]] = {
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "SwitchTransformersTop1Router": _switch,
}


class Site:
    """One MoE layer, and what it has done so far.

    Attributes:
        path: the module's name in the model: the experts', or the router's where that alone tells.
        num_experts: E.
        router, experts: the modules, as far as they are known.
        backbone: name of the module that runs the stack of layers, "" for the model itself.
        ran: whether the last pass came through here.
        routing: of that pass, where it was kept.
    """

    def __init__(
        self, path: str, num_experts: int, router: nn.Module | None, experts: nn.Module | None, backbone: str
    ) -> None:
        self.path, self.num_experts, self.backbone = path, num_experts, backbone
        self.router, self.experts = router, experts
        # Read once: others may put a function of their own, with other names, in the place of forward.
        self._names = [] if experts is None else parameters_of(experts)
        self.score_function: ScoreFunction | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._counts: tuple[Tensor, Tensor, Tensor] | None = None
        self.begin()

    def begin(self) -> None:
        """A pass begins: forget the last one, but not what was counted."""
        self.ran = False
        self.routing: Routing | None = None
        self._logits: Tensor | None = None

    @property
    def layer(self) -> int:
        """The first number in the path; 0 without one."""
        return next((int(part) for part in self.path.split(".") if part.isdigit()), 0)

    @property
    def router_weight(self) -> Tensor | None:
        """The (E, D) parameter of the router; None if it has none, or it is not in memory."""
        parameters = [] if self.router is None else self.router.parameters()
        fitting = (p for p in parameters if p.ndim == 2 and p.shape[0] == self.num_experts and not p.is_meta)
        return next(fitting, None)

    def stacks(self) -> list[ExpertStack]:
        """The experts' weights, where they are stored as (E, …)."""
        parameters = [] if self.experts is None else self.experts.parameters()
        tensors = tuple(p for p in parameters if p.ndim == 3 and p.shape[0] == self.num_experts and not p.is_meta)
        return [ExpertStack(0, tensors)] if tensors else []

    def take_logits(self, output: Any) -> None:
        """Keep what the router beside the experts returned, until they are called."""
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.shape[-1] == self.num_experts:
            logits_TE = first.reshape(-1, self.num_experts)
            self._logits = logits_TE.log() if self._shows_probabilities else logits_TE

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen:
        """What the experts module is told by this call."""
        told = next(names for names in _CALLS if set(names) <= set(self._names))
        ids_TK, weights_TK = (argument(self._names, name, args, kwargs) for name in told)
        logits_TE, self._logits = self._logits, None
        return Seen(ids_TK, weights_TK, None, logits_TE)

    def of_output(self, output: Any) -> Seen:
        """What the output of a router of `_ROUTERS` says."""
        return _ROUTERS[type(self.router).__name__](self.router, output)

    @torch.no_grad()
    def count(self, seen: Seen, mask_T: Tensor | None) -> None:
        """Add one pass, its real tokens alone; on the layer's device, whose result nobody waits for."""
        chosen_TK = self._chosen(seen)
        if mask_T is not None:
            chosen_TK = chosen_TK & mask_T[:, None]
        tokens = torch.tensor(seen.ids_TK.shape[0]) if mask_T is None else mask_T.sum()
        chosen_E = self._histogram(seen.ids_TK, chosen_TK)
        kept_E = chosen_E if seen.kept_TK is None else self._histogram(seen.ids_TK, chosen_TK & seen.kept_TK)
        self.add(chosen_E, kept_E, tokens)

    def add(self, chosen_E: Tensor, kept_E: Tensor, tokens: Tensor) -> None:
        """Add counts that were taken elsewhere; `tokens` is a scalar on any device."""
        self.ran = True
        new, old = (chosen_E, kept_E, tokens), self._counts
        self._counts = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2].to(old[2].device))

    def totals(self) -> RoutingTotals:
        """What was counted, on the CPU."""
        if self._counts is None:
            zeros_E = torch.zeros(self.num_experts, dtype=torch.int64)
            return RoutingTotals(zeros_E, zeros_E, 0)
        chosen_E, kept_E, tokens = self._counts
        return RoutingTotals(chosen_E.cpu(), kept_E.cpu(), int(tokens))

    def routing_of(self, seen: Seen, mask_T: Tensor | None, score_function: ScoreFunction) -> Routing:
        """One pass as a `Routing`, with the gradient that logits and weights have."""
        assert seen.logits_TE is not None
        choice, weights_A = Choice.regular(seen.ids_TK.to(torch.int64)), seen.weights_TK.reshape(-1)
        chosen_A, before = self._chosen(seen).reshape(-1), None
        if not chosen_A.all():
            choice, weights_A = choice.where(chosen_A), weights_A[chosen_A]
        if seen.kept_TK is not None:
            before, kept_A = choice, seen.kept_TK.reshape(-1)[chosen_A]
            choice, weights_A = choice.where(kept_A), weights_A[kept_A]
        return Routing(
            token_ids_A=choice.token_ids_A,
            expert_ids_A=choice.expert_ids_A,
            weights_A=weights_A.float(),
            logits_TE=seen.logits_TE.float(),
            top_k=choice.top_k,
            mask_T=mask_T,
            chosen=before,
            score_function=score_function,
        )

    def score_function_of(self, seen: Seen) -> ScoreFunction:
        """Softmax or sigmoid, whichever the weights go with: over a token's experts, or over tokens where K = 1.

        Raises:
            UnsupportedError: neither.
        """
        assert seen.logits_TE is not None
        weights_TK = torch.where(self._chosen(seen), seen.weights_TK.detach().double(), 0)
        one = seen.ids_TK.shape[1] == 1
        if self._shows_probabilities or (one and bool((weights_TK == weights_TK[:1]).all())):
            return "softmax"  # equal weights of single experts tell nothing
        ids_TK = seen.ids_TK.to(torch.int64).clamp(max=self.num_experts - 1)
        logits_TE = seen.logits_TE.detach().double()
        scores: dict[ScoreFunction, Tensor] = {"softmax": logits_TE.softmax(dim=-1), "sigmoid": logits_TE.sigmoid()}
        wanted_TK = _shares(weights_TK, one)
        errors = {
            name: (_shares(scores_TE.gather(1, ids_TK), one) - wanted_TK).abs().max().item()
            for name, scores_TE in scores.items()
        }
        best = min(errors, key=lambda name: errors[name])
        if errors[best] > _SAME_SCORES:
            raise UnsupportedError(
                f"{self.path}: its weights are neither softmax nor sigmoid of its logits; give watch a score_function"
            )
        return best

    @property
    def _shows_probabilities(self) -> bool:
        return type(self.router).__name__ in _PROBABILITIES

    def _chosen(self, seen: Seen) -> Tensor:
        """(T, K) bool: neither a weight of 0 (a router's way to skip) nor an expert of another process is a choice."""
        return (seen.weights_TK != 0) & (seen.ids_TK < self.num_experts)

    def _histogram(self, ids_TK: Tensor, which_TK: Tensor) -> Tensor:
        """(E,) int64. Not torch.bincount, which waits for the device to learn the largest id."""
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_TK.device)
        ids_A = ids_TK.reshape(-1).to(torch.int64).clamp(max=self.num_experts - 1)
        return counts_E.scatter_add_(0, ids_A, which_TK.reshape(-1).to(torch.int64))


def _shares(values_TK: Tensor, of_tokens: bool) -> Tensor:
    return values_TK / values_TK.sum(dim=0 if of_tokens else -1, keepdim=True)


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Every MoE layer of the model, in its own order.

    Raises:
        UnsupportedError: experts that do not say how many they are.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, Router):
            yield Site(path, module.config.num_experts, module, None, _backbone(path))
        elif type(module).__name__ in _ROUTERS and next(module.parameters(), None) is not None:  # one without: to_moe's
            yield Site(path, module.num_experts, module, None, _backbone(path))
        elif any(set(names) <= set(parameters_of(module)) for names in _CALLS):
            yield Site(path, _num_experts(module), _router_beside(path, modules), module, _backbone(path))


def argument(names: list[str], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument `name` of a call whose parameters are `names`; None when it was not given."""
    if name in kwargs:
        return kwargs[name]
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def parameters_of(module: Any) -> list[str]:
    """What the module's forward calls its arguments."""
    return list(inspect.signature(module.forward).parameters)


def _num_experts(experts: Any) -> int:
    """How many experts may be chosen; LongCat counts those that do nothing apart."""
    found = getattr(experts, "total_experts", None) or getattr(experts, "num_experts", None)
    if found is None:
        raise UnsupportedError(f"{type(experts).__name__} does not say how many experts it has")
    return int(found)


def _router_beside(path: str, modules: dict[str, Any]) -> nn.Module | None:
    """The router that feeds these experts: it is in the same block, or in one around it."""
    for _ in range(3):
        path = path.rpartition(".")[0]
        for name in ("gate", "router"):
            found = getattr(modules[path], name, None)
            if isinstance(found, nn.Module):
                return found
    return None


def _backbone(path: str) -> str:
    """The owner of the first numbered list on the way to a layer."""
    parts = path.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: max(numbered - 1, 0)])
