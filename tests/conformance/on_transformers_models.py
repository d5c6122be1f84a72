"""Hugging Face transformers, asked by the traps about whole models: a small Mixtral and its documented switches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, MixtralForCausalLM

from conformance.adapter import LoraCase, Shape
from conformance.judge import NotApplicable, said
from conformance.on_transformers import GROUPED, Transformers, config_of, drawn

IDS_BL = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def made(**changes) -> MixtralForCausalLM:
    """Always the same model, training, with its balance loss on unless told otherwise."""
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        **({"output_router_logits": True} | changes),
    )
    return drawn(MixtralForCausalLM(config)).train()


def checkpointed(model: MixtralForCausalLM, mode: str) -> MixtralForCausalLM:
    if mode != "none":
        model.activation_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model


def gates(model: MixtralForCausalLM) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "gate.weight" in name}


class TransformersModels(Transformers):
    def trained(self, coef: float, mode: str, *, micro_batches: int = 1, scaled: bool = False) -> dict[str, Tensor]:
        model = checkpointed(made(router_aux_loss_coef=coef), mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for part_BL in IDS_BL.chunk(micro_batches):
            loss = model(input_ids=part_BL, labels=part_BL, use_cache=False).loss
            scaler.scale(loss / micro_batches).backward()
        scaler.unscale_(optimizer)
        return {name: parameter.grad for name, parameter in gates(model).items()}

    def aux_gradients(self, mode: str, micro_batches: int) -> dict[str, Tensor]:
        model = made()
        total = sum(model(input_ids=part_BL, use_cache=False).aux_loss for part_BL in IDS_BL.chunk(micro_batches))
        grads = torch.autograd.grad(total / micro_batches, list(gates(model).values()))
        return dict(zip(gates(model), grads, strict=True))

    def says_switched_off(self) -> list[str]:
        with said("transformers") as lines:
            made(router_aux_loss_coef=0.01, output_router_logits=False)(input_ids=IDS_BL, labels=IDS_BL)
        return [line for line in lines if "aux" in line or "router" in line]

    def counted(self, mode: str) -> tuple[Tensor, Tensor]:
        model, by_hand_E = checkpointed(made(), mode), torch.zeros(4)
        out = model(input_ids=IDS_BL, labels=IDS_BL, use_cache=False)
        out.loss.backward()
        counts = [torch.bincount(logits.topk(2).indices.flatten(), minlength=4) for logits in out.router_logits]
        plain = made()

        def count(experts: nn.Module, args: tuple[Tensor, ...]) -> None:
            by_hand_E.add_(torch.bincount(args[1].flatten(), minlength=4))

        for layer in plain.model.layers:
            layer.mlp.experts.register_forward_pre_hook(count)
        plain(input_ids=IDS_BL, use_cache=False)
        return sum(counts).float(), by_hand_E

    def decayed(self) -> list[str]:
        # Weight decay reaches parameters alone.
        router = GROUPED["deepseek_v3"][0](config_of(DeepseekV3Config))
        return [name for name, _ in router.named_parameters() if "correction_bias" in name]

    def lora(self, shape: Shape, rank: int, *, transposed: bool, stacks: tuple[str, ...]) -> LoraCase:
        raise NotApplicable("LoRA on its experts is PEFT's")

    def says_experts_frozen(self) -> bool:
        raise NotApplicable("LoRA on its experts is PEFT's")

    def quantised(self) -> float:
        raise NotApplicable("its quantisers are other packages, which were not asked")

    def parameter_counts(self) -> tuple[tuple[int, int | None], tuple[int, int]]:
        model = made()
        total = sum(parameter.numel() for parameter in model.parameters())
        return (model.num_parameters(), None), (total, 0)
