"""Surgery: MLPs inside any PyTorch model become layers of experts, in place, in one call.

The model keeps its class, its forward and its training loop; `routings` gives what router losses and monitors need.
Reading the MLP is `dense`, the mathematics `from_dense`, and what the new layer keeps `drop_in`.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moekit.adapt.adopt import adopt, is_adoptable
from moekit.adapt.dense import check_replaceable, read_mlp
from moekit.adapt.drop_in import DropIn, ModelPass
from moekit.adapt.from_dense import layer_from_dense
from moekit.config import MoEConfig, SurgeryConfig, from_dict
from moekit.errors import ConfigError, UnsupportedError
from moekit.moe import MoE, Routing

__all__ = ["after_step", "routings", "to_moe"]

M = TypeVar("M", bound=nn.Module)


def to_moe(
    model: M,
    where: str | Sequence[str] | None = None,
    config: SurgeryConfig | MoEConfig | None = None,
    **settings: Any,
) -> M:
    """Replace the MLPs that `where` names by MoE layers made of them; returns the same model, changed.

    MoE layers of transformers that keep experts of their own (Switch, DBRX) become moekit's with the same weights,
    router and capacity, where they are named without settings; all of them when `where` is None.

    Args:
        model: anything; operate before it is wrapped, sharded, compiled or given to an optimizer.
        where: dotted names of submodules; `*` and `?` stand for parts of one name, so "transformer.h.*.mlp" is the
            MLP of every block. None: every layer of Switch or DBRX.
        config: how the experts are made. A `MoEConfig` makes a fresh layer instead, with random experts, in place
            of any module that maps a tensor to one of its shape.
        settings: the fields of a `SurgeryConfig`, instead of one.
    Raises:
        ConfigError: nothing is called so, or the settings are wrong.
        UnsupportedError: a named module is not an MLP that can be read (a whole block, say). Nothing is changed then.

    >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> model, x = nn.Sequential(nn.LayerNorm(8), mlp), torch.randn(2, 3, 8)
    >>> before = model(x)
    >>> torch.allclose(to_moe(model, "1", num_experts=4, top_k=2)(x), before, atol=1e-6)
    True
    >>> [routing.counts_E.sum().item() for routing in routings(model)]
    [12]
    """
    if config is not None and settings:
        raise ConfigError(f"give either a config or its fields ({', '.join(settings)}), not both")
    if where is None and (config is not None or settings):
        raise ConfigError("where says which MLPs become experts: name them")
    keep = config is None and not settings
    config = config or from_dict(SurgeryConfig, settings, source="to_moe")
    if config.router == "hash":
        raise UnsupportedError("the hash router needs token ids, and a layer inside a model never sees them")
    model_pass = ModelPass()
    generator = torch.Generator().manual_seed(config.seed if isinstance(config, SurgeryConfig) else 0)
    made: dict[str, DropIn] = {}
    for name in _adoptable(model) if where is None else _names(model, where):
        module = model.get_submodule(name)
        try:
            if keep and is_adoptable(module):
                made[name] = adopt(module, model_pass)
            else:
                made[name] = _drop_in(module, config, generator, model_pass)
        except UnsupportedError as error:
            raise UnsupportedError(_refusal(model, name, error)) from None
    for name, layer in made.items():
        _replace(model, model.get_submodule(name), layer)
    model_pass.watch(model)
    return model


def routings(model: nn.Module, mask: Tensor | None = None) -> tuple[Routing, ...]:
    """The routings of the model's last forward pass, in layer order, for `moekit.losses` and monitors.

    Args:
        mask: bool or 0/1 (batch, length), 1 for real tokens: losses and counts leave the others out.
    Raises:
        UnsupportedError: the model has no layer that `to_moe` made.
        ConfigError: a layer saw another number of tokens than the mask has.
    """
    layers = _layers(model)
    found = tuple(routing for layer in layers for routing in layer.routings)
    if mask is None:
        return found
    mask_T = mask.reshape(-1).bool()
    for routing in found:
        if routing.num_tokens != mask_T.numel():
            raise ConfigError(f"the mask has {mask_T.numel()} tokens, but a layer saw {routing.num_tokens}")
    return tuple(dataclasses.replace(routing, mask_T=mask_T) for routing in found)


def after_step(model: nn.Module) -> None:
    """Once after each optimizer step: routers that learn without a gradient do so (bias, temperature, threshold).

    They are given all that was routed in training mode since the last call, so micro-batches count together.
    """
    for layer in _layers(model):
        layer.after_step()


def _layers(model: nn.Module) -> list[DropIn]:
    layers = [part for part in model.modules() if isinstance(part, DropIn)]
    if not layers:
        raise UnsupportedError("the model has no layer that to_moe made")
    return layers


def _adoptable(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if is_adoptable(module)]
    if not names:
        raise UnsupportedError(f"the {type(model).__name__} has no MoE layer of Switch or DBRX: name its MLPs in where")
    return names


def _names(model: nn.Module, where: str | Sequence[str]) -> list[str]:
    """Names of the modules that the patterns match, in the model's order; of one with two names, the first."""
    patterns = [where] if isinstance(where, str) else list(where)
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"where: no module of the {type(model).__name__} is called {pattern!r}{hint}")
    matched = [name for name in known if any(_matches(name, pattern) for pattern in patterns)]
    for name in matched:
        inside = next((other for other in matched if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise ConfigError(f"where names {name!r} and {inside!r}, which is inside it: choose one")
    first: dict[int, str] = {}
    for name in matched:
        first.setdefault(id(known[name]), name)
    return list(first.values())


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _drop_in(
    module: nn.Module, config: SurgeryConfig | MoEConfig, generator: torch.Generator, model_pass: ModelPass
) -> DropIn:
    if any(isinstance(part, DropIn | MoE) for part in module.modules()):
        raise UnsupportedError("it is a Mixture of Experts already")
    if is_adoptable(module) and not isinstance(config, MoEConfig):
        raise UnsupportedError("it is a Mixture of Experts already: to_moe without settings keeps its weights")
    if isinstance(config, MoEConfig):
        return _fresh(module, config, model_pass).train(module.training)
    mlp = read_mlp(module)
    if mlp.inner_dropout:
        warnings.warn(
            f"a {type(module).__name__} drops {mlp.inner_dropout:.0%} of its inner values while training; "
            "experts have no such dropout, so training (not eval) differs in that",
            stacklevel=3,
        )
    return DropIn(layer_from_dense(mlp, config, generator), mlp.dropout, model_pass).train(module.training)


def _fresh(module: nn.Module, config: MoEConfig, model_pass: ModelPass) -> DropIn:
    check_replaceable(module, config.hidden_size)
    inner = next(_mlps_inside(module), None)
    if inner is not None:
        raise UnsupportedError("it holds an MLP and more than that")
    parameter = next(module.parameters(), torch.empty(0))
    return DropIn(MoE(config).to(parameter.device, parameter.dtype), 0.0, model_pass)


def _mlps_inside(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        if part is not module and next(part.children(), None) is not None:
            try:
                read_mlp(part)
            except UnsupportedError:
                continue
            yield name


def _refusal(model: nn.Module, name: str, error: UnsupportedError) -> str:
    module = model.get_submodule(name)
    child = next(_mlps_inside(module), None)
    hint = "" if child is None else f"; name its child {f'{name}.{child}'!r} instead"
    return f"{name!r} ({type(module).__name__}) cannot become experts: {error}{hint}"


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands; a module that is used in two places stays one."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)
