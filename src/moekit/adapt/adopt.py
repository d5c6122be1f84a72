"""MoE layers of transformers that keep experts of their own, Switch's and DBRX's, as moekit's with the same weights.

transformers is not imported: the two classes are known by name. What the layer computes is transformers' own, down to
where it draws its noise; `state_dict` has transformers' names and shapes, so `save_pretrained` writes its files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit import kernels
from moekit.adapt.dense import ACTIVATIONS, check_replaceable
from moekit.adapt.drop_in import DropIn, ModelPass
from moekit.config import Activation, CapacityConfig, MoEConfig
from moekit.errors import UnsupportedError
from moekit.moe import MoE, Routing

__all__ = ["Adopted", "adopt", "is_adoptable"]

Tensors = dict[str, Tensor]


class Adopted(DropIn):
    """A `DropIn` that says and saves what the layer in whose place it stands did.

    Args:
        moe: the layer.
        kind: name of the class that was replaced.
        router: its router. It stays in the model, without weights, for the hooks by which transformers collects
            router logits for its own losses.
        model_pass: as in `DropIn`.
    """

    def __init__(self, moe: MoE, kind: str, router: nn.Module, model_pass: ModelPass) -> None:
        super().__init__(moe, 0.0, model_pass)
        self.kind = kind
        self.shown_logits = _without_weights(router, _LAYOUTS[kind].show)
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def _run(self, x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = super()._run(x)
        self.shown_logits(routing.logits_TE.view(*x.shape[:-1], -1))
        return y, routing


def is_adoptable(module: nn.Module) -> bool:
    """Whether it is one of the layers that `adopt` knows."""
    return type(module).__name__ in _LAYOUTS


def adopt(module: Any, model_pass: ModelPass) -> Adopted:
    """The layer in moekit's form, in the device and dtype of `module`, sharing no weight with it.

    Raises:
        UnsupportedError: a setting of the layer is one that moekit does not have; the message names it.
    """
    check_replaceable(module)
    kind = type(module).__name__
    layout = _LAYOUTS[kind]
    config = layout.read(module)
    tensors = layout.load({name: value.detach() for name, value in module.state_dict().items()})
    with torch.device("meta"):
        moe = MoE(config)
    moe.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
    if kind == _SWITCH:
        moe.router.to(torch.float32)  # where transformers' own first pass leaves it
    return Adopted(moe, kind, module.router, model_pass).train(module.training)


def _without_weights(router: nn.Module, show: Callable[[Tensor], Any]) -> nn.Module:
    """A copy of the router that has no parameters and answers logits with what the router would have returned."""
    shell: Any = copy.copy(router)
    shell._modules, shell._parameters = {}, {}
    shell.forward = show
    return shell


def _rename_saved(module: Adopted, state: Tensors, prefix: str, metadata: Any) -> None:
    names = [name for name in state if name.startswith(f"{prefix}moe.")]
    ours = {name.removeprefix(f"{prefix}moe."): state.pop(name) for name in names}
    state.update({prefix + name: value for name, value in _LAYOUTS[module.kind].save(ours).items()})


def _rename_loaded(module: Adopted, state: Tensors, prefix: str, *args: Any) -> None:
    names = [name for name in state if name.startswith((f"{prefix}router.", f"{prefix}experts."))]
    theirs = {name.removeprefix(prefix): state.pop(name) for name in names}
    if theirs:
        state.update({f"{prefix}moe.{name}": value for name, value in _LAYOUTS[module.kind].load(theirs).items()})


# Switch Transformers


def _read_switch(layer: Any) -> MoEConfig:
    router, expert = layer.router, layer.experts["expert_0"]
    if router.dtype != torch.float32:
        raise UnsupportedError(f"its router computes in {router.dtype}; moekit's routers compute in fp32")
    if expert.dropout.p:
        warnings.warn(
            f"Switch's experts drop {expert.dropout.p:.0%} of their inner values while training; moekit's have no such "
            "dropout, so training (not eval) differs in that",
            stacklevel=4,
        )
    width, hidden = expert.wi.weight.shape
    # In fp32 its router multiplies the tokens in place, and the experts read them next; else only its own copy.
    shared = expert.wi.weight.dtype == torch.float32
    return MoEConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=router.num_experts,
        top_k=1,
        router="switch",
        router_options={
            "jitter": 0.0 if shared else router.jitter_noise,
            "gate_bias": router.classifier.bias is not None,
        },
        input_jitter=router.jitter_noise if shared else 0.0,
        capacity=CapacityConfig(tokens=router.expert_capacity, per="sequence"),
        expert="mlp",
        activation=_activation(expert.act),
    )


def _save_switch(ours: Tensors) -> Tensors:
    theirs = {
        name.replace("router.", "router.classifier."): value
        for name, value in ours.items()
        if name.startswith("router.")
    }
    for expert, (up_FD, down_DF) in enumerate(zip(ours["experts.up_proj"], ours["experts.down_proj"], strict=True)):
        theirs[f"experts.expert_{expert}.wi.weight"] = up_FD
        theirs[f"experts.expert_{expert}.wo.weight"] = down_DF
    return theirs


def _load_switch(theirs: Tensors) -> Tensors:
    ours = {f"router.{name.rpartition('.')[2]}": value for name, value in theirs.items() if name.startswith("router.")}
    experts = range((len(theirs) - len(ours)) // 2)
    return ours | {
        "experts.up_proj": torch.stack([theirs[f"experts.expert_{number}.wi.weight"] for number in experts]),
        "experts.down_proj": torch.stack([theirs[f"experts.expert_{number}.wo.weight"] for number in experts]),
    }


def _show_switch(logits_BLE: Tensor) -> tuple[None, None, Tensor]:
    return None, None, logits_BLE


# DBRX


def _read_dbrx(layer: Any) -> MoEConfig:
    power = layer.moe_normalize_expert_weights
    if power not in (None, 1):
        raise UnsupportedError(f"its weights are normalised by their {power}-norm, not by their sum (1)")
    experts = layer.experts
    return MoEConfig(
        hidden_size=experts.hidden_size,
        intermediate_size=experts.ffn_hidden_size,
        num_experts=experts.num_experts,
        top_k=layer.top_k,
        gate_order="softmax_topk",
        norm_topk_prob=power is not None,
        input_jitter=layer.router.moe_jitter_eps or 0.0,
        activation=_activation(experts.mlp.activation_fn),
    )


def _save_dbrx(ours: Tensors) -> Tensors:
    gate_EFD, up_EFD = ours["experts.gate_up_proj"].chunk(2, dim=1)
    return {
        "router.layer.weight": ours["router.weight"],
        "experts.mlp.w1": gate_EFD.flatten(0, 1),
        "experts.mlp.v1": up_EFD.flatten(0, 1),
        "experts.mlp.w2": ours["experts.down_proj"].transpose(1, 2).flatten(0, 1),
    }


def _load_dbrx(theirs: Tensors) -> Tensors:
    weight_ED = theirs["router.layer.weight"]
    gate, up, down = (theirs[f"experts.mlp.{name}"].unflatten(0, (len(weight_ED), -1)) for name in ("w1", "v1", "w2"))
    return {
        "router.weight": weight_ED,
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": down.transpose(1, 2).contiguous(),
    }


def _show_dbrx(logits_BLE: Tensor) -> Tensor:
    return logits_BLE.flatten(0, -2)


@dataclass(frozen=True)
class _Layout:
    """One class of transformers: its settings, and its tensors' names in both directions."""

    read: Callable[[Any], MoEConfig]
    save: Callable[[Tensors], Tensors]
    load: Callable[[Tensors], Tensors]
    show: Callable[[Tensor], Any]


_SWITCH = "SwitchTransformersSparseMLP"
_LAYOUTS = {
    _SWITCH: _Layout(_read_switch, _save_switch, _load_switch, _show_switch),
    "DbrxFFN": _Layout(_read_dbrx, _save_dbrx, _load_dbrx, _show_dbrx),
}


def _activation(function: Callable[[Tensor], Tensor]) -> Activation:
    """Which of ours computes what `function` does."""
    x = torch.linspace(-5, 5, 201, dtype=torch.float64)
    found = [name for name in ACTIVATIONS if torch.allclose(function(x), kernels.activate(x, name), atol=1e-6)]
    if len(found) != 1:
        raise UnsupportedError(f"its activation is none of {', '.join(ACTIVATIONS)}")
    return found[0]
