"""Hugging Face transformers, asked by the traps: its own functions, routers and blocks, with their defaults.

The balance loss is Mixtral's (Qwen's and others' are copies of it), the z-loss and the capacity Switch's, the
selection bias DeepSeek-V3's, the balance loss beside a selection bias MiniMax-M2's, biased experts GPT-OSS's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.axk2.configuration_axk2 import AXK2Config
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP, GptOssTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import load_balancing_loss_func as minimax_loss
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
    router_z_loss_func,
)
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func as switch_loss

from conformance.adapter import Adapter, BiasedRouter, Layer, Parts, Routed, Shape
from conformance.judge import Absent, Measured, each, off

JITTER = 0.3

# The gates that hand their logits to a copy of the balance loss.
WITH_LOSS = {
    "mixtral": (MixtralTopKRouter, MixtralConfig),
    "qwen2_moe": (Qwen2MoeTopKRouter, Qwen2MoeConfig),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig),
    "gpt_oss": (GptOssTopKRouter, GptOssConfig),
}
# The gates that limit the choice to groups, with a bias on the selection.
GROUPED = {
    "deepseek_v3": (DeepseekV3TopkRouter, DeepseekV3Config),
    "glm4_moe": (Glm4MoeTopkRouter, Glm4MoeConfig),
    "axk2": (AXK2TopkRouter, AXK2Config),
}


def config_of(cls: type[PreTrainedConfig], shape: Shape | None = None, **more: Any) -> Any:
    """A configuration of this family and size, each size under every name that the family has for it."""
    shape = shape or Shape()
    sizes = {
        "hidden_size": shape.hidden,
        "d_model": shape.hidden,
        "intermediate_size": shape.inner,
        "moe_intermediate_size": shape.inner,
        "d_ff": shape.inner,
        "num_experts": shape.experts,
        "num_local_experts": shape.experts,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
    }
    known = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})} | set(cls.attribute_map)
    config = cls(**({name: size for name, size in sizes.items() if name in known} | more))
    config._experts_implementation = "eager"
    return config


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter from N(0, 0.3²)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def gate_of(cls: type[nn.Module], config: Any, gate_ED: Tensor) -> nn.Module:
    """A router of this class with this gate, biases 0."""
    router = cls(config).to(gate_ED.dtype)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        next(router.parameters()).copy_(gate_ED)
    return router


def shaped(gate_ED: Tensor, top_k: int) -> Shape:
    return Shape(hidden=gate_ED.shape[1], experts=gate_ED.shape[0], top_k=top_k)


def grouped(cls: type[nn.Module], config: type[PreTrainedConfig], gate_ED: Tensor, top_k: int, **options: Any):
    """A group-limited sigmoid gate; one group that all may use unless told otherwise."""
    groups = {"n_group": options.get("groups", 1), "topk_group": options.get("chosen", 1)}
    sizes = config_of(config, shaped(gate_ED, top_k), norm_topk_prob=True, routed_scaling_factor=1.0, **groups)
    router = gate_of(cls, sizes, gate_ED)
    router.e_score_correction_bias.copy_(options["bias_E"])
    return router


def switch(gate_ED: Tensor, *, rows: int = 10**6, jitter: float = 0.0) -> nn.Module:
    config = config_of(SwitchTransformersConfig, shaped(gate_ED, 1), expert_capacity=rows, router_jitter_noise=jitter)
    return gate_of(SwitchTransformersTop1Router, config, gate_ED)


def routed(logits_weights_ids: tuple[Tensor, Tensor, Tensor]) -> Routed:
    logits_TE, weights_TK, ids_TK = logits_weights_ids
    return Routed.of(logits_TE, ids_TK, weights_TK)


class Transformers(Adapter):
    name = "transformers"
    backends = ("eager", "grouped_mm", "batched_mm")
    capacity_top_k = (1,)
    remarks: ClassVar[dict[int, str]] = {
        1: "A convention: K times the definition, exactly. Divide by K.",
        3: "Capacity is Switch's; its configuration has router_ignore_padding_tokens, which no code reads.",
        8: "Reentrant mode has to be asked for; the default is the other one.",
        12: "`from_pretrained(dtype=torch.bfloat16)` keeps DeepSeek-V3's bias in fp32; `.to(torch.bfloat16)` does not.",
        14: "AX-K2 masks with 0 on purpose, as its reference does. The fixed 2 is right for DeepSeek-V3's own K/M.",
        15: "DeepSeek-V3's gate casts to fp32 first; autocast casts the product back.",
        22: "Mixtral's gate computes its softmax in fp32 also in an fp64 model, which gradcheck sees.",
        27: "Switch's router converts its own parameter the first time it runs.",
        36: "A hook moved the router's input between the two passes. Eager stops with an error in the default mode.",
    }

    # Losses

    def balance_factor(self, top_k: int) -> float:
        return float(top_k)

    def balance_loss(self, layers: list[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
        mask_BL = None if mask_T is None else mask_T.unsqueeze(0)
        return mixtral_loss(tuple(layers), layers[0].shape[1], top_k, attention_mask=mask_BL)

    def biased_balance(self, logits_TE: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        experts = logits_TE.shape[1]
        config = config_of(MiniMaxM2Config, Shape(hidden=experts, experts=experts, top_k=top_k))
        router = gate_of(MiniMaxM2TopKRouter, config, torch.eye(experts))
        seen = router(logits_TE, bias_E)
        return minimax_loss((seen[0],), experts, top_k), seen[0].softmax(1), routed(seen).chosen_TE

    def limited_balance(self, logits_TE: Tensor, rows: int, count: str) -> Tensor:
        if count == "kept":
            raise Absent("f always counts what was chosen")
        return switch_loss(logits_TE.softmax(1).unsqueeze(0), logits_TE.argmax(1).unsqueeze(0))

    def sequence_loss(self, logits_TE: Tensor, sequence_T: Tensor, top_k: int, mask_T: Tensor | None) -> Tensor:
        raise Absent("Switch's loss is one a row of the batch, of equal length and without padding")

    def global_loss(self, parts: list[Tensor], top_k: int) -> Tensor:
        raise Absent("the loss of each micro-batch only")

    def z_loss(self, logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
        if mask_T is not None:
            raise Absent("Switch's z-loss takes no mask")
        return router_z_loss_func(logits_TE.unsqueeze(0))

    def z_logits(self, x_TD: Tensor, gate_ED: Tensor) -> Tensor:
        return switch(gate_ED)(x_TD.unsqueeze(0))[2][0]

    def loss_inputs(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        right_TE = (x_TD @ gate_ED.T).softmax(1)
        routers = {
            name: gate_of(cls, config_of(config, shaped(gate_ED, 2)), gate_ED)
            for name, (cls, config) in WITH_LOSS.items()
        }
        return {name: (router(x_TD)[0].softmax(1), right_TE) for name, router in routers.items()}

    # Routing

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
            renormalise = options.get("renormalise", True)
            config = config_of(Qwen3MoeConfig, shaped(gate_ED, top_k), norm_topk_prob=renormalise)
            return routed(gate_of(Qwen3MoeTopKRouter, config, gate_ED)(x_TD))
        if kind == "biased":
            return routed(grouped(*GROUPED["deepseek_v3"], gate_ED, top_k, **options)(x_TD))
        if kind in ("capacity", "jitter"):
            return self._switch(kind, x_TD, gate_ED, top_k, training, **options)
        if kind == "hash":
            raise Absent("DeepSeek-V4 reads a table from its checkpoint; nothing is hashed")
        return super().route(kind, x_TD, gate_ED, top_k)

    def _switch(self, kind: str, x_TD: Tensor, gate_ED: Tensor, top_k: int, training: bool, **options: Any) -> Routed:
        if top_k > 1 and kind == "capacity":
            raise Absent("capacity is Switch's, for top-1")
        if options.get("order", "position") != "position" or options.get("overflow", "drop") != "drop":
            raise Absent("capacity is by position and drops")
        router = switch(gate_ED, rows=options.get("rows", 10**6), jitter=JITTER * (kind == "jitter")).train(training)
        kept_BTE, probs_BT1, logits_BTE = router(x_TD.clone().unsqueeze(0))
        return Routed(kept_BTE[0] * probs_BT1[0], kept_BTE[0].bool(), logits_BTE[0])

    def renormalised_top1(self) -> nn.Module:
        return drawn(MixtralSparseMoeBlock(config_of(MixtralConfig, Shape(top_k=1))))

    def biased_router(self, gate_ED: Tensor, bias_E: Tensor, top_k: int) -> BiasedRouter:
        router = grouped(*GROUPED["deepseek_v3"], gate_ED, top_k, bias_E=bias_E)

        def step(parts: list[Tensor], mode: str) -> None:
            raise Absent("nothing updates the bias")

        return BiasedRouter(router, lambda: router.e_score_correction_bias, lambda x_TD: routed(router(x_TD)), step)

    def grouped(self) -> dict[str, Callable[..., Routed]]:
        def of(name: str) -> Callable[..., Routed]:
            return lambda x_TD, gate_ED, top_k, **options: routed(
                grouped(*GROUPED[name], gate_ED, top_k, **options)(x_TD)
            )

        return {name: of(name) for name in GROUPED}

    def autocast_logits(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, Tensor]:
        zero_E = torch.zeros(gate_ED.shape[0])
        with torch.autocast("cpu", torch.bfloat16):
            seen = {
                name: gate_of(cls, config_of(config, shaped(gate_ED, 2)), gate_ED)(x_TD)[0]
                for name, (cls, config) in WITH_LOSS.items()
            }
            seen["deepseek_v3"] = grouped(*GROUPED["deepseek_v3"], gate_ED, 2, bias_E=zero_E)(x_TD)[0]
            return seen | {"switch": switch(gate_ED)(x_TD.unsqueeze(0))[2][0]}

    def dropless(self, gate_ED: Tensor, top_k: int, *, training: bool) -> dict[str, Callable[[Tensor], Routed]]:
        routers = {
            name: gate_of(cls, config_of(config, shaped(gate_ED, top_k)), gate_ED)
            for name, (cls, config) in WITH_LOSS.items()
        }
        zero_E = torch.zeros(gate_ED.shape[0])
        routers["deepseek_v3"] = grouped(*GROUPED["deepseek_v3"], gate_ED, top_k, bias_E=zero_E)

        def of(router: nn.Module) -> Callable[[Tensor], Routed]:
            return lambda x_TD: routed(router.train(training)(x_TD))

        return {name: of(router) for name, router in routers.items()}

    def jittered(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        block = drawn(MixtralSparseMoeBlock(config_of(MixtralConfig, router_jitter_noise=JITTER))).train()
        seen: list[Tensor] = []
        block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        block(x_BLD)
        return x_BLD, seen[0]

    # Compute

    def layer(self, shape: Shape, dtype: torch.dtype = torch.float32, backend: str = "eager") -> Layer:
        config = config_of(MixtralConfig, shape)
        config._experts_implementation = backend
        block = drawn(MixtralSparseMoeBlock(config)).to(dtype)

        def parts() -> Parts:
            return Parts(block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)

        return Layer(block, block.gate, block, parts)

    def poisoned_tail(self) -> Measured:
        return each(self.backends, self._tail)

    def _tail(self, backend: str) -> float:
        """Assignments to expert E, as expert parallelism marks another process's, beside the same without them."""
        experts = self.layer(Shape(experts=4), backend=backend).module.experts
        experts._is_expert_parallel = True
        x_TD, ids_TK = torch.randn(9, 16), torch.randint(0, 3, (9, 2))
        weights_TK = torch.rand(9, 2)
        ids_TK[::2, 1], weights_TK[::2, 1] = 4, 0.0
        got, want = [], []
        for ids, seen in ((ids_TK, got), (ids_TK.where(ids_TK < 4, 3), want)):
            given_TD = x_TD.clone().requires_grad_()
            experts.zero_grad()
            y_TD = experts(given_TD, ids, weights_TK)
            y_TD.square().sum().backward()
            seen += [y_TD, given_TD.grad, *(parameter.grad.clone() for parameter in experts.parameters())]
        return max(off(g, w) for g, w in zip(got, want, strict=True))

    def down_biased(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], int, int]:
        block = drawn(GptOssMLP(config_of(GptOssConfig)))

        def run(x_BLD: Tensor, bias_ED: Tensor) -> tuple[Tensor, str]:
            outs = {}
            with torch.no_grad():
                block.experts.down_proj_bias.copy_(bias_ED)
                for backend in self.backends:
                    block.experts.config._experts_implementation = backend
                    outs[backend] = block(x_BLD)[0]
            assert all(off(out, outs["eager"]) < 1e-4 for out in outs.values())
            return outs["grouped_mm"]

        return run, lambda x_BLD: routed(block.router(x_BLD[0])).weights_TE, 6, 16

    def dtype_layers(self) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
        blocks = {
            "mixtral": (MixtralSparseMoeBlock, MixtralConfig),
            "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig),
            "deepseek_v3": (DeepseekV3MoE, DeepseekV3Config),
            "gpt_oss": (GptOssMLP, GptOssConfig),
            "switch": (SwitchTransformersSparseMLP, SwitchTransformersConfig),
        }

        def of(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
            cls, config = blocks[name]
            groups = {"n_group": 1, "topk_group": 1} if name == "deepseek_v3" else {}
            return lambda: (drawn(cls(config_of(config, **groups))).bfloat16(), torch.randn(1, 9, 16).bfloat16())

        return {name: of(name) for name in blocks}
