"""Qwen3-MoE tuned by TRL: LoRA on attention and experts through PEFT, a trainable router, its balancing loss on."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from integrations.families import build, output, tokens
from moekit.integrations.transformers import expert_modules, use_moekit
from tiny import VOCABULARY, byte_tokenizer
from tolerances import near, rel

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# The two ways in which PEFT trains a router: a whole copy, or LoRA on its weight, which is no Linear's.
ROUTER = {"whole": {"modules_to_save": ["gate"]}, "lora": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]}}
SUMS = [f"{a} plus {b} is {a + b}." for a in range(4) for b in range(4)]
TRAINING = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}

disable_progress_bars()


def model_for_text(backend):
    model = build("qwen3_moe", vocab_size=VOCABULARY, eos_token_id=256, pad_token_id=256, bos_token_id=None)
    model.set_experts_implementation(backend)
    return model


def tokenizer():
    hf = byte_tokenizer().hf
    hf.pad_token = hf.eos_token
    return hf


def lora(router="whole"):
    options = {"target_parameters": EXPERTS} | ROUTER[router]
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)


def sft(backend, folder, router="whole", **options):
    torch.manual_seed(0)
    return SFTTrainer(
        model=model_for_text(backend),
        args=SFTConfig(str(folder), router_aux_loss_coef=0.1, max_length=32, **(TRAINING | QUIET | options)),
        train_dataset=Dataset.from_list([{"text": text} for text in SUMS]),
        processing_class=tokenizer(),
        peft_config=lora(router),
    )


def curve(trainer, name="loss"):
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def router_grads(model):
    return {name: p.grad for name, p in model.named_parameters() if ".gate." in name and p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router", ROUTER)
def test_sft_for_twenty_steps_equals_eager(router, checkpointing, tmp_path):
    options = {"activation_checkpointing": checkpointing}
    trainer, eager = (sft(backend, tmp_path, router, **options) for backend in ("moekit", "eager"))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    got = curve(trainer)
    assert len(got) == 20
    assert got == pytest.approx(curve(eager), rel=rel("fp32 loss"))
    assert sum(got[-5:]) < sum(got[:5])
    assert trainer.model.get_experts_implementation() == {"": "moekit"}
    for (name, weight), other in zip(trainer.model.named_parameters(), eager.model.parameters(), strict=True):
        assert_close(weight, other, **near("fp32 twin"), msg=name)
        assert torch.equal(weight, start[name]) is not weight.requires_grad, name
    assert len(expert_modules(trainer.model)) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router", ROUTER)
def test_balancing_loss_alone_gives_the_router_the_gradient_that_eager_gives(router, checkpointing, tmp_path):
    grads = []
    for backend in ("moekit", "eager"):
        options = {"activation_checkpointing": checkpointing, "max_steps": 2, "learning_rate": 1e-2}
        trainer = sft(backend, tmp_path, router, **options)
        trainer.train()  # LoRA's A has no gradient while its B is still zero
        trainer.model.zero_grad()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model(**batch, output_router_logits=True).aux_loss.backward()
        grads.append(router_grads(trainer.model))
    got, want = grads
    assert len(got) == (2 if router == "whole" else 4)
    for name, grad in got.items():
        assert grad.abs().max() > 1e-4, name
        assert_close(grad, want[name], **near("fp32 twin"), msg=name)


def test_merged_adapter_says_what_the_adapted_model_said():
    model = get_peft_model(model_for_text("eager"), lora())
    assert use_moekit(model) is model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        adapted = output(model, tokens())
        with model.disable_adapter():
            assert (output(model, tokens()) - adapted).abs().max() > 0.1
        merged = copy.deepcopy(model).merge_and_unload()
        assert_close(output(merged, tokens()), adapted, **near("fp32 twin"))
        merged.set_experts_implementation("eager")
        assert_close(output(merged, tokens()), adapted, **near("fp32 twin"))


def test_dpo_for_twenty_steps_equals_eager(tmp_path):
    pairs = [{"prompt": text[:-3], "chosen": text[-3:], "rejected": " 0."} for text in SUMS]
    curves = []
    for backend in ("moekit", "eager"):
        torch.manual_seed(0)
        trainer = DPOTrainer(
            model=model_for_text(backend),
            args=DPOConfig(str(tmp_path), max_length=32, **TRAINING, **QUIET),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(),
            peft_config=lora(),
        )
        curves.append(curve(trainer))
    assert len(curves[0]) == 20
    assert curves[0] == pytest.approx(curves[1], rel=rel("fp32 loss"))
