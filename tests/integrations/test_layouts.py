"""Every layout that the interface can describe, those too that no family uses, beside a loop over tokens."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.integrations.moe import use_experts_implementation

from integrations.families import build
from moekit.integrations.transformers import expert_modules
from tolerances import near, rel

FLAGS = ("is_transposed", "has_bias", "has_gate", "has_post_expert_norm", "is_concatenated")
EXPERTS, HIDDEN, INNER = 3, 10, 7
LAYOUTS = [
    dict(zip(FLAGS, values, strict=True)) for values in product((False, True), repeat=5) if values[2] or values[4]
]


def interleaved(self, gate_up):
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


def experts_with(layout, activation=nn.SiLU):
    """A module of the layout, random, on moekit."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, activation()
            name, width = ("gate_up_proj", 2 * INNER) if layout["has_gate"] else ("up_proj", INNER)
            shapes = {name: (width, HIDDEN), "down_proj": (HIDDEN, INNER)}
            for key, (rows, columns) in shapes.items():
                shape = (columns, rows) if layout["is_transposed"] else (rows, columns)
                self.register_parameter(key, nn.Parameter(torch.randn(EXPERTS, *shape)))
                if layout["has_bias"]:
                    self.register_parameter(f"{key}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
            if layout["has_post_expert_norm"]:
                self.post_expert_norm = nn.LayerNorm(HIDDEN)
                nn.init.normal_(self.post_expert_norm.bias)

        def forward(self, x, ids, weights):
            rows = []
            for token in range(x.shape[0]):
                terms = [
                    weights[token, slot] * self.one(x[token], expert) for slot, expert in enumerate(ids[token].tolist())
                ]
                rows.append(sum(terms, torch.zeros(HIDDEN)))
            return torch.stack(rows)

        def one(self, x, expert):
            if expert == EXPERTS:
                return torch.zeros(HIDDEN)
            hidden = self.linear(x, "gate_up_proj" if layout["has_gate"] else "up_proj", expert)
            hidden = self._apply_gate(hidden) if layout["has_gate"] else self.act_fn(hidden)
            out = self.linear(hidden, "down_proj", expert)
            return self.post_expert_norm(out) if layout["has_post_expert_norm"] else out

        def linear(self, x, name, expert):
            weight = getattr(self, name)[expert]
            bias = getattr(self, f"{name}_bias")[expert] if layout["has_bias"] else 0
            return (x @ weight if layout["is_transposed"] else weight @ x) + bias

    if not layout["is_concatenated"]:
        Experts._apply_gate = interleaved
    return use_experts_implementation(Experts, **layout)(SimpleNamespace(_experts_implementation="moekit"))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(key for key in layout if layout[key]))
def test_layout_equals_a_loop_over_tokens(layout, activation, poisoned):
    module = experts_with(layout, activation)
    x, weights = torch.randn(13, HIDDEN, requires_grad=True), torch.rand(13, 2, requires_grad=True)
    ids = torch.rand(13, EXPERTS + 1).topk(2).indices  # 3 is another process's
    results = []
    for backend in ("moekit", "eager"):
        module.config._experts_implementation = backend
        out = module(x, ids, weights)
        with torch.no_grad():
            few = module(x[:4], ids[:4], weights[:4])
        grads = torch.autograd.grad(out.square().sum(), [x, weights, *module.parameters()])
        results.append([out.detach(), few, *grads])
    for got, want in zip(*results, strict=True):
        scale = want.abs().max()
        assert_close(got / scale, want / scale, **near("fp32 twin"))


@pytest.mark.parametrize("grad", [True, False])
def test_result_has_the_dtype_of_the_tokens(grad):
    module = experts_with(LAYOUTS[-1] | {"has_post_expert_norm": False}).bfloat16()
    plain = next(iter(expert_modules(build("mixtral")).values())).bfloat16()
    plain.config._experts_implementation = "moekit"
    with torch.set_grad_enabled(grad):
        for experts, width in ((module, HIDDEN), (plain, 32)):
            x, ids = torch.randn(5, width), torch.zeros(5, 1, dtype=torch.int64)
            assert experts(x, ids, torch.ones(5, 1)).dtype == torch.float32
            assert experts(x.bfloat16(), ids, torch.ones(5, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [True, False])
def test_sum_over_experts_is_in_fp32(grad):
    """Two experts of opposite sign: what is left is the difference of their weights, which bf16 cannot hold."""
    experts = next(iter(expert_modules(build("mixtral")).values())).bfloat16()
    experts.config._experts_implementation = "moekit"
    with torch.no_grad():
        experts.gate_up_proj[1], experts.down_proj[1] = experts.gate_up_proj[0], -experts.down_proj[0]
    x, ids = torch.randn(3, 32).bfloat16(), torch.tensor([[0, 1]] * 3)
    with torch.set_grad_enabled(grad):
        left = experts(x, ids, torch.tensor([[1 + 2**-10, 1.0]] * 3))
        one = experts(x, ids[:, :1], torch.full((3, 1), 2.0**-10))
    assert_close(left.float(), one.float(), rtol=rel("bf16 layer"), atol=0)
    assert left.abs().min() > 0
