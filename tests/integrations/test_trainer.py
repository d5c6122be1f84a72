"""transformers' Trainer on Mixtral, Qwen3-MoE and gpt-oss: twenty steps on "moekit" and on eager in the same way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from integrations.families import build, tokens
from moekit.integrations.transformers import use_moekit
from tolerances import near, rel

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
CHECKPOINTING = {
    "plain": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def losses(model, folder, **options):
    """The loss of each of 20 steps; the model is trained in place, its balancing loss included."""
    settings = {"per_device_train_batch_size": 2, "learning_rate": 3e-4, "max_steps": 20, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in tokens(16).tolist()]
    trainer = Trainer(model, TrainingArguments(str(folder), **settings, **quiet, **options), train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pair(family):
    """The same model on moekit and on eager, with the model's own balancing loss."""
    eager = build(family, output_router_logits=True)
    eager.set_experts_implementation("eager")
    return use_moekit(copy.deepcopy(eager)), eager


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps(family, way, tmp_path):
    model, eager = pair(family)
    got, want = (losses(each, tmp_path, **CHECKPOINTING[way]) for each in (model, eager))
    assert len(got) == 20
    assert got == pytest.approx(want, rel=rel("fp32 loss"))
    assert sum(got[-5:]) < sum(got[:5])
    for (name, weight), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert_close(weight, other, **near("fp32 twin"), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_bf16_autocast(family, tmp_path):
    got, want = (losses(each, tmp_path, bf16=True) for each in pair(family))
    assert got == pytest.approx(want, rel=rel("bf16 loss"))


@pytest.mark.parametrize("backend", ["eager", "moekit"])
def test_reentrant_checkpointing_cuts_the_models_own_balancing_loss_from_the_router(backend):
    """Of transformers, whatever the backend: it keeps the router's logits of the first pass, which has no gradient."""
    model, ids = build("mixtral", output_router_logits=True), tokens()
    model.set_experts_implementation(backend)
    grads = {}
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model(input_ids=ids, labels=ids).aux_loss.requires_grad is not reentrant
        for coefficient in (0.0, 1.0):
            model.router_aux_loss_coef = coefficient
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            grads[reentrant, coefficient] = model.model.layers[0].mlp.gate.weight.grad.clone()
    assert torch.equal(grads[True, 0.0], grads[True, 1.0])
    assert (grads[False, 1.0] - grads[False, 0.0]).abs().max() > 0.1
