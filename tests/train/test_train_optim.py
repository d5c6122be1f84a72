"""Schedule against a table worked by hand, AdamW against a loop of plain Python, groups by kind."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import tiny_decoder
from torch import nn

from moekit.config import MoEConfig, TrainConfig
from moekit.errors import ConfigError
from moekit.train.optim import lr_at, make_optimizer, parameter_groups, set_lr
from tolerances import near, rel


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.25), (2, 0.5), (4, 1.0), (5, 0.9779754323), (8, 0.5 + 0.05), (12, 0.1), (99, 0.1)],
)
def test_schedule(step: int, expected: float) -> None:
    """4 steps of warm-up, then 8 of cosine from 1 to 0.1; half way it is their mean."""
    if step == 5:
        expected = 0.1 + 0.9 * (1 + 0.9238795325112867) / 2  # cos(π/8)
    config = TrainConfig(steps=12, warmup_steps=4, lr=1.0, min_lr_ratio=0.1)
    assert lr_at(step, config) == pytest.approx(expected, abs=near("fp64")["rtol"])


def test_schedule_without_warm_up_and_longer_warm_up_than_run() -> None:
    assert lr_at(1, TrainConfig(steps=1, warmup_steps=0, lr=2.0, min_lr_ratio=0.5)) == 1.0
    assert lr_at(3, TrainConfig(steps=3, warmup_steps=10, lr=1.0)) == pytest.approx(0.3)


def test_adamw_is_the_published_algorithm() -> None:
    """1711.05101 algorithm 2, number by number, in Python floats."""
    model = nn.Linear(2, 1, bias=True)
    config = TrainConfig(lr=0.1, weight_decay=0.3, beta1=0.9, beta2=0.95)
    optimizer = make_optimizer(model, config)
    state = {name: [p.detach().flatten().tolist(), None, None] for name, p in model.named_parameters()}
    for step in range(1, 5):
        set_lr(optimizer, 0.1 / step)
        for index, (name, p) in enumerate(model.named_parameters()):
            p.grad = torch.linspace(-1, 2, p.numel()).view_as(p) * (step + index)
            values, m, v = state[name]
            m, v = m or [0.0] * len(values), v or [0.0] * len(values)
            for i, g in enumerate(p.grad.flatten().tolist()):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
                decay = 0.3 if name == "weight" else 0.0
                step_size = (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.95**step)) + 1e-8)
                values[i] -= 0.1 / step * (decay * values[i] + step_size)
            state[name] = [values, m, v]
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.flatten().tolist() == pytest.approx(state[name][0], rel=rel("fp32 loss"))


def test_groups_hold_every_parameter_once_by_kind() -> None:
    moe = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, bias=True)
    decoder = tiny_decoder(moe=moe, qk_norm=True, attention_bias=True)
    names = {id(p): name for name, p in decoder.named_parameters()}
    groups = {g["name"]: g for g in parameter_groups(decoder, TrainConfig(weight_decay=0.2, router_lr_scale=0.5))}
    kinds = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert kinds["routers"] == {f"layers.{i}.mlp.router.weight" for i in range(2)}
    assert kinds["vectors"] == {n for n in names.values() if "norm" in n or "bias" in n}
    assert sum(map(len, kinds.values())) == len(names)
    assert {k: (g["weight_decay"], g["lr_scale"]) for k, g in groups.items()} == {
        "matrices": (0.2, 1.0),
        "vectors": (0.0, 1.0),
        "routers": (0.0, 0.5),
    }


def test_frozen_parameters_are_left_out_and_nothing_trainable_is_refused() -> None:
    decoder = tiny_decoder()
    decoder.requires_grad_(False)
    decoder.layers[0].mlp.router.weight.requires_grad_(True)
    (group,) = parameter_groups(decoder, TrainConfig())
    assert len(group["params"]) == 1
    decoder.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        parameter_groups(decoder, TrainConfig())
