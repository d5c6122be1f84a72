"""torchtitan, asked by the traps: its layer, router and bias update on one process.

Not a dependency of the tests: it is asked where it can be imported, and docs/conformance.md keeps what it answered.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.adapter import Adapter, BiasedRouter, Layer, LoraCase, Parts, Routed, Shape
from conformance.judge import Absent, NotApplicable


def built(shape: Shape, *, biased: bool = False, **router: Any) -> Any:
    """torchtitan's MoE with parameters from N(0, 0.3²); its experts have biases in GPT-OSS only."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    sizes = {"dim": shape.hidden, "hidden_dim": shape.inner, "num_experts": shape.experts}
    routing = {"num_experts": shape.experts, "top_k": shape.top_k}
    gate = Linear.Config(in_features=shape.hidden, out_features=shape.experts)
    layer = moe.MoE.Config(
        num_experts=shape.experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=(GptOssGroupedExperts if biased else moe.GroupedExperts).Config(**sizes),
            token_dispatcher=moe.LocalTokenDispatcher.Config(**routing),
        ),
        router=moe.TokenChoiceTopKRouter.Config(**routing, gate=gate, **router),
    ).build()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer


def with_gate(gate_ED: Tensor, top_k: int, **router: Any) -> Any:
    experts, hidden = gate_ED.shape
    layer = built(Shape(hidden=hidden, experts=experts, top_k=top_k), **router).to(gate_ED.dtype)
    with torch.no_grad():
        layer.router.gate.weight.copy_(gate_ED)
    return layer


def routed(layer: Any, x_TD: Tensor) -> Routed:
    weights_BLK, ids_BLK, scores_BLE = layer.router(x_TD.unsqueeze(0), layer.expert_bias_E)
    return Routed.of(logits_of(layer, x_TD, scores_BLE[0]), ids_BLK[0], weights_BLK[0])


def logits_of(layer: Any, x_TD: Tensor, scores_TE: Tensor) -> Tensor:
    """The logits behind a router's scores, which are all that it gives."""
    if layer.router.score_func == "sigmoid":
        return scores_TE.logit()
    exact_TE = x_TD.double() @ layer.router.gate.weight.double().T
    return scores_TE.double().log() + exact_TE.logsumexp(1, keepdim=True)


class Torchtitan(Adapter):
    name = "torchtitan"
    backends = ("grouped_mm",)
    layer_tolerance = "bf16 layer"
    remarks: ClassVar[dict[int, str]] = {
        12: "The update subtracts its mean, which changes no choice.",
        13: "Its bias update halves the counts again under full activation checkpointing.",
        15: "It asks autocast for float32, which PyTorch does not offer on a CPU; a GPU was not asked.",
        22: "Experts compute in bf16 whatever their parameters are; they are held to a bf16 tolerance.",
    }

    def route(
        self,
        kind: str,
        x_TD: Tensor,
        gate_ED: Tensor,
        top_k: int,
        *,
        training: bool = False,
        mask_T: Tensor | None = None,
        **options: Any,
    ) -> Routed:
        if kind == "topk":
            norm = options.get("renormalise", True)
            return routed(with_gate(gate_ED, top_k, score_func="softmax", route_norm=norm), x_TD)
        if kind == "capacity":
            raise NotApplicable("capacity is the size of HybridEP's buffers between processes")
        return super().route(kind, x_TD, gate_ED, top_k)

    def capacity(self, tokens: int, experts: int, top_k: int, factor: float) -> int:
        raise NotApplicable("capacity is the size of HybridEP's buffers between processes")

    def renormalised_top1(self) -> nn.Module:
        return built(Shape(top_k=1), route_norm=True)

    def biased_router(self, gate_ED: Tensor, bias_E: Tensor, top_k: int) -> BiasedRouter:
        layer = with_gate(gate_ED, top_k, route_norm=True)
        layer.expert_bias_E.copy_(bias_E)

        def step(parts: list[Tensor], mode: str) -> None:
            for part_TD in parts:
                _through(layer, part_TD.unsqueeze(0), mode)
            _update_hook(layer)()

        return BiasedRouter(
            layer, lambda: layer.expert_bias_E, lambda x_TD: routed(layer, x_TD), step, layer.load_balance_coeff
        )

    def grouped(self) -> dict[str, Callable[..., Routed]]:
        def route(x_TD: Tensor, gate_ED: Tensor, top_k: int, *, bias_E: Tensor, groups: int, chosen: int) -> Routed:
            limits = {"num_expert_groups": groups, "num_limited_groups": chosen}
            layer = with_gate(gate_ED, top_k, route_norm=True, **limits)
            layer.expert_bias_E.copy_(bias_E)
            return routed(layer, x_TD)

        return {"sigmoid": route}

    def counted(self, mode: str) -> tuple[Tensor, Tensor]:
        layer, x_BLD = built(Shape(), route_norm=True), torch.randn(2, 9, 16)
        _through(layer, x_BLD, mode)
        return layer.tokens_per_expert_E.clone(), routed(layer, x_BLD.flatten(0, 1)).chosen_TE.sum(0).float()

    def autocast_logits(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, Tensor]:
        layer = with_gate(gate_ED, 2, score_func="softmax")
        with torch.autocast("cpu", torch.bfloat16):
            scores_TE = layer.router(x_TD.unsqueeze(0))[2][0]
        return {"softmax": logits_of(layer, x_TD, scores_TE)}

    def dropless(self, gate_ED: Tensor, top_k: int, *, training: bool) -> dict[str, Callable[[Tensor], Routed]]:
        layers = {name: with_gate(gate_ED, top_k, score_func=name).train(training) for name in ("softmax", "sigmoid")}
        return {name: lambda x_TD, layer=layer: routed(layer, x_TD) for name, layer in layers.items()}

    def layer(self, shape: Shape, dtype: torch.dtype = torch.float32, backend: str = "grouped_mm") -> Layer:
        if dtype == torch.float64:
            raise Absent("experts compute in bf16 only")
        layer = built(shape, score_func="softmax", route_norm=True).to(dtype)
        experts = layer.routed_experts.inner_experts

        def parts() -> Parts:
            return Parts(layer.router.gate.weight, torch.cat([experts.w1_EFD, experts.w3_EFD], dim=1), experts.w2_EDF)

        return Layer(layer, layer.router, layer, parts)

    def down_biased(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], int, int]:
        # In bf16 throughout: GPT-OSS's experts return bf16, which the combine does not add to anything else.
        layer = built(Shape(), biased=True, score_func="softmax", route_norm=True).bfloat16()

        def run(x_BLD: Tensor, bias_ED: Tensor) -> Tensor:
            with torch.no_grad():
                layer.routed_experts.inner_experts.mlp2_bias_ED.copy_(bias_ED)
            return layer(x_BLD.bfloat16()).float()

        return run, lambda x_BLD: routed(layer, x_BLD[0].bfloat16()).weights_TE.float(), 6, 16

    def dtype_layers(self) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
        return {"MoE": lambda: (built(Shape()).bfloat16(), torch.randn(1, 9, 16).bfloat16())}

    def parameter_counts(self) -> tuple[tuple[int, int | None], tuple[int, int]]:
        from torchtitan.models.utils import get_moe_model_nparams_and_flops

        model, layer = nn.Module(), built(Shape())
        model.layers = nn.ModuleDict({"0": _block(layer)})
        moe = SimpleNamespace(router=SimpleNamespace(top_k=2), num_experts=6)
        config = SimpleNamespace(layers=[SimpleNamespace(moe=moe)])
        total, flops = get_moe_model_nparams_and_flops(config, model, n_heads=1, head_dims=1, seq_len=0)
        by_hand = sum(parameter.numel() for parameter in layer.parameters())
        experts = sum(parameter.numel() for parameter in layer.routed_experts.parameters())
        # It returns 6 FLOPs of training a parameter and token, without attention where there is no context.
        return (total, flops // 6), (by_hand, by_hand - experts // 6 * 4)

    def decayed(self) -> list[str]:
        # Weight decay reaches parameters alone.
        return [name for name, _ in built(Shape()).named_parameters() if "expert_bias" in name]

    def lora(self, shape: Shape, rank: int, *, transposed: bool, stacks: tuple[str, ...]) -> LoraCase:
        raise Absent("its LoRA is for linear layers, and experts are none")

    def says_experts_frozen(self) -> bool:
        raise Absent("its LoRA is for linear layers, and experts are none")

    def quantised(self) -> float:
        raise NotApplicable("its low-precision training needs a GPU, and none was asked")

    def muon(self) -> float:
        raise NotApplicable("its Muon runs on sharded meshes, which this suite does not start")


def _block(layer: Any) -> nn.Module:
    """A block as torchtitan's models have them, with the layer alone in it."""
    block = nn.Module()
    block.moe, block.moe_enabled = layer, True
    return block


def _through(layer: Any, x_BLD: Tensor, mode: str) -> None:
    """A training step's forward and backward."""
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD = layer(x_BLD) if mode == "none" else checkpoint(layer, x_BLD, use_reentrant=mode == "reentrant")
    y_BLD.sum().backward()


def _update_hook(layer: Any) -> Callable[[], None]:
    """What torchtitan runs before each optimizer step, for a model of one block and one process."""
    from torchtitan.components.optimizer.optimizer import register_moe_load_balancing_hook

    model, hooks = nn.Module(), []
    model.layers = nn.ModuleDict({"0": _block(layer)})
    one_process = SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1)
    register_moe_load_balancing_hook(SimpleNamespace(register_step_pre_hook=hooks.append), [model], one_process)
    return hooks[0]
