"""PEFT, asked by trap 34: LoRA on transformers' experts, through `target_parameters`."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from conformance.adapter import Adapter, LoraCase, Shape
from conformance.judge import said
from conformance.on_transformers import config_of, drawn
from conformance.on_transformers_models import made


class Holder(nn.Module):
    """A model that is one experts module, called with a fixed routing."""

    def __init__(self, shape: Shape, transposed: bool) -> None:
        super().__init__()
        cls, config = (GptOssExperts, GptOssConfig) if transposed else (MixtralExperts, MixtralConfig)
        self.experts = drawn(cls(config_of(config, shape)))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts(x_TD, ids_TK, weights_TK)


def factors(adapter: dict[str, Tensor], inner: bool, experts: int) -> tuple[Tensor, Tensor]:
    """(A (E, r, in), B (E, out, r)) of a saved adapter: A's rows count experts slowest, B's columns fastest.

    Wrappers of several stacks are nested; the names of an inner one have "base_layer" in them.
    """
    a, b = (
        next(value for name, value in adapter.items() if f"lora_{side}" in name and ("base_layer" in name) == inner)
        for side in "AB"
    )
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


class Peft(Adapter):
    name = "peft"
    outside = "PEFT brings no MoE layer; it adapts those of others"
    traps = frozenset({34})
    remarks: ClassVar[dict[int, str]] = {
        34: "Experts stored transposed are GPT-OSS's; with more than one expert all is well."
    }

    def lora(self, shape: Shape, rank: int, *, transposed: bool, stacks: tuple[str, ...]) -> LoraCase:
        base = Holder(shape, transposed)
        plain = copy.deepcopy(base)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=[f"experts.{stack}" for stack in stacks])
        ids_TK = torch.rand(9, shape.experts).topk(shape.top_k).indices
        args = (torch.randn(9, shape.hidden), ids_TK, torch.rand(9, shape.top_k))
        model = get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3)
        unmerged = model(*args)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            adapter = load_file(Path(folder) / "adapter_model.safetensors")
            reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)(*args)
        merged = model.merge_and_unload()(*args)
        with torch.no_grad():
            for stack in stacks:
                a_ErI, b_EOr = factors(adapter, stack != stacks[-1], shape.experts)
                delta_EOI = 2.0 * b_EOr @ a_ErI
                getattr(plain.experts, stack).add_(delta_EOI.mT if transposed else delta_EOI)
        return LoraCase(unmerged, merged, reloaded, plain(*args))

    def says_experts_frozen(self) -> bool:
        with said() as lines:
            model = get_peft_model(made(), LoraConfig(target_modules="all-linear"))
        adapted = any(".experts." in name for name, _ in model.named_parameters() if "lora_" in name)
        return adapted or any("expert" in line for line in lines)
