"""Backend "moekit" beside transformers' own eager loop: every family, output, every gradient, ten training steps."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from integrations.families import FAMILIES, build, loss_of, output, tokens
from moekit import kernels
from moekit.integrations.transformers import expert_modules, use_moekit
from tolerances import near, rel

# One of each layout: plain, gpt-oss (interleaved, transposed, biased, clamped), transposed, transposed and biased,
# without a gate, with a norm after each expert, with a gate of its own.
LAYOUTS = ["mixtral", "gpt_oss", "aria", "openai_privacy_filter", "nemotron_h", "muse_spark", "deepseek_v4"]

# Gemma's attention does not divide its scores by √d, and passes a rounding of the experts on some ten times as large.
STEEP = {"gemma4", "diffusion_gemma"}
# Eager computes these experts in fp32 whatever their dtype; moekit, like "grouped_mm", in theirs.
WIDE_EAGER = {"openai_privacy_filter"}
# Trained in every run of the tests; the other families train in `make test-all`.
TRAINED = {
    *LAYOUTS,
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "hunyuan_v1_moe", "jamba"),
    *("lfm2_moe", "minimax", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "zaya"),
}


def run(model, backend, ids):
    """(output, gradients by name) of one training pass."""
    model.set_experts_implementation(backend)
    model.zero_grad()
    torch.manual_seed(1)  # some routers draw noise
    out = output(model, ids)
    loss_of(out, ids).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(model, backend, ids, steps=10):
    """The losses of a copy of the model."""
    model = copy.deepcopy(model)
    model.set_experts_implementation(backend)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = loss_of(output(model, ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_table_has_every_family_of_this_transformers():
    package = Path(transformers.__file__).parent / "models"
    using = {path.parent.name for path in package.glob("*/modeling_*.py") if "@use_experts" in path.read_text()}
    assert using == set(FAMILIES)


def test_page_names_every_family_once():
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    table = page[page.index("| layout |") : page.index("Combinations that no family has")]
    rows = [re.findall(r"`(\w+)`", row.split("|")[2]) for row in table.strip().splitlines()[2:]]
    assert sorted(name for row in rows for name in row) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_every_gradient_equal_eager(family):
    model, ids = use_moekit(build(family)), tokens()
    got, got_grads = run(model, "moekit", ids)
    want, want_grads = run(model, "eager", ids)
    bound = "steep fp32 model" if family in STEEP else "fp32 twin"
    assert_close(got, want, **near(bound))
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert_close(got_grads[name], grad, **near(bound), msg=name)
    of_experts = [name for name in want_grads if name.startswith(tuple(expert_modules(model)))]
    assert of_experts
    for name in of_experts:  # these may be small: nothing absolute is allowed
        scale, error = want_grads[name].abs().max(), (got_grads[name] - want_grads[name]).abs().max()
        assert scale > 0
        assert error <= rel(bound) * scale, name


@pytest.mark.parametrize(
    "family", [family if family in TRAINED else pytest.param(family, marks=pytest.mark.heavy) for family in FAMILIES]
)
def test_ten_steps_have_the_losses_of_eager(family):
    model, ids = build(family), tokens()
    got = train(model, "moekit", ids)
    assert got == pytest.approx(train(model, "eager", ids), rel=rel("fp32 loss"))
    assert got[-1] < got[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_few_tokens_without_gradient_equal_eager(family):
    model, ids = build(family).eval(), tokens(1, 5)
    assert ids.numel() <= kernels.MOE_DECODE_MAX_TOKENS
    outs = []
    for backend in ("moekit", "eager"):
        model.set_experts_implementation(backend)
        with torch.no_grad():
            outs.append(output(model, ids))
    assert_close(*outs, **near("fp32 twin"))


@pytest.mark.parametrize("family", LAYOUTS)
def test_experts_in_bfloat16_are_as_near_to_float64_as_eager_is(family):
    model = build(family)
    experts = next(iter(expert_modules(model).values())).bfloat16()
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = torch.randn(17, width).bfloat16()
    ids = torch.rand(17, 4).topk(2).indices
    weights, direction = torch.rand(17, 2).bfloat16(), torch.randn(17, width).bfloat16()

    def passes(module, backend, dtype):
        module.config._experts_implementation = backend
        inputs = [each.to(dtype, copy=True).requires_grad_() for each in (x, weights)]
        module.zero_grad()
        out = module(inputs[0], ids, inputs[1])
        out.backward(direction.to(dtype))
        return [out.detach(), *(each.grad.clone() for each in [*inputs, *module.parameters()])]

    exact = passes(copy.deepcopy(experts).double(), "eager", torch.float64)
    eager = passes(experts, "eager", torch.bfloat16)
    got = passes(experts, "moekit", torch.bfloat16)
    for mine, theirs, reference in zip(got, eager, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        error, allowed = ((each.double() - reference).norm() for each in (mine, theirs))
        assert family in WIDE_EAGER or error <= 1.1 * allowed
        assert error <= rel("bf16 layer") * reference.norm()
