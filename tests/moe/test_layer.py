"""The layer against a plain loop: outputs and every gradient, at the sizes where layers go wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import gradients, plain_moe

import moekit
from moekit import kernels
from moekit.errors import ConfigError, UnknownNameError
from moekit.moe import MoE
from tolerances import near

BASE = {"hidden_size": 12, "intermediate_size": 7, "num_experts": 5, "top_k": 2}


def make(dtype=torch.float64, **changes) -> MoE:
    return MoE(moekit.MoEConfig(**(BASE | changes))).to(dtype)


def compare(layer: MoE, x: torch.Tensor) -> None:
    """Output and all gradients equal the loop's, in fp64 to rounding."""
    x = x.requires_grad_()
    y, _ = layer(x)
    expected = plain_moe(layer, x.reshape(-1, x.shape[-1])).view_as(x)
    torch.testing.assert_close(y, expected, **near("fp64"))
    seed = torch.randn_like(y)
    ours, theirs = gradients(layer, y, x, seed), gradients(layer, expected, x, seed)
    for name, gradient in ours.items():
        assert gradient is not None, f"{name} got no gradient tensor"
        reference = torch.zeros_like(gradient) if theirs[name] is None else theirs[name]
        torch.testing.assert_close(gradient, reference, **near("fp64"), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_order": "softmax_topk"},
        {"gate_order": "softmax_topk", "norm_topk_prob": True},
        {"gate_order": "softmax_topk", "top_k": 1},
        {"top_k": 5},  # the dense softmax gate
        {"num_experts": 1, "top_k": 1},
        {"routed_scaling_factor": 2.5},
        {"expert": "mlp", "activation": "relu"},
        {"expert": "mlp", "activation": "gelu", "bias": True},
        {"activation": "gelu_tanh", "bias": True},
        {"intermediate_size": 6},  # 2F = D
        {"intermediate_size": 12},  # F = D
        {"num_shared_experts": 1},
        {"num_shared_experts": 3, "shared_intermediate_size": 4, "shared_gate": True},
        {"num_experts": 64, "top_k": 6, "intermediate_size": 3},  # fine-grained
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_plain_loop(changes, threads):
    compare(make(**changes), torch.randn(2, 9, 12, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (2, 0, 12), (1, 1, 12), (3, 12)])
def test_few_tokens_or_none(shape):
    compare(make(), torch.randn(*shape, dtype=torch.float64))


def test_non_contiguous_input():
    compare(make(), torch.randn(12, 9, dtype=torch.float64).T)


def test_all_tokens_to_one_expert_and_empty_experts_get_exact_zeros():
    layer = make(top_k=1, gate_order="softmax_topk")
    with torch.no_grad():
        layer.router.weight.zero_()[3] = 1.0
    x = torch.rand(8, 12, dtype=torch.float64) + 0.1
    y, routing = layer(x)
    assert routing.counts_E.tolist() == [0, 0, 0, 8, 0]
    y.sum().backward()
    empty = [0, 1, 2, 4]
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert (weight.grad[empty] == 0).all()
        assert (weight.grad[3] != 0).any()
    compare(layer, x)


def test_gradcheck():
    layer = make(hidden_size=4, intermediate_size=3)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters))


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 9),
    hidden=st.integers(1, 17),
    inner=st.integers(1, 9),
    tokens=st.integers(0, 11),
    data=st.data(),
)
def test_any_size(experts, hidden, inner, tokens, data):
    top_k = data.draw(st.integers(1, experts))
    layer = make(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=experts,
        top_k=top_k,
        gate_order="softmax_topk",
        expert=data.draw(st.sampled_from(["swiglu", "mlp"])),
    )
    compare(layer, torch.randn(tokens, hidden, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_gives_the_same_numbers_as_the_sorted_path(dtype):
    layer = make(dtype, hidden_size=32, intermediate_size=24, num_experts=8).eval()
    tokens = min(kernels.MOE_DECODE_MAX_TOKENS, 6)
    x = torch.randn(tokens, 32).to(dtype)
    with torch.no_grad():
        routing = layer.router(x)
        assert layer.experts.can_decode(x, routing)
        decoded, _ = layer(x)
    sorted_path, _ = layer(x.clone().requires_grad_())
    what = "fp32 twin" if dtype == torch.float32 else "bf16 layer"
    torch.testing.assert_close(decoded, sorted_path, **near(what))


def test_the_sorted_path_is_taken_for_many_tokens_and_for_training():
    layer = make(torch.float32).eval()
    few, many = torch.randn(1, 12), torch.randn(kernels.MOE_DECODE_MAX_TOKENS + 1, 12)
    assert not layer.experts.can_decode(few, layer.router(few))  # gradients are wanted
    with torch.no_grad():
        assert not layer.experts.can_decode(many, layer.router(many))
        assert layer.experts.can_decode(few, layer.router(few))
        assert not layer.train().experts.can_decode(few, layer.router(few))  # a checkpoint's first pass


def test_a_token_alone_equals_the_same_token_in_a_batch_and_combine_repeats_bit_for_bit():
    layer = make(torch.float64, num_experts=8, top_k=3)
    x = torch.randn(20, 12, dtype=torch.float64)
    routing = layer.router(x)
    rows, plan = layer.dispatcher.dispatch(x, routing)
    out = layer.experts(rows, plan.counts_E)
    first = layer.dispatcher.combine(out, plan)
    assert all(torch.equal(first, layer.dispatcher.combine(out, plan)) for _ in range(5))
    batch, _ = layer(x)
    alone = torch.cat([layer(x[i : i + 1])[0] for i in range(20)])
    torch.testing.assert_close(batch, alone, **near("fp64 scalar"))


def test_autocast_computes_in_bf16_but_routes_in_fp32_and_keeps_parameters():
    layer = make(torch.float32)
    x = torch.randn(6, 12)
    _, expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x)
        assert layer.experts(x, torch.tensor([6, 0, 0, 0, 0])).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert routing.logits_TE.dtype == routing.weights_A.dtype == torch.float32
    assert torch.equal(routing.logits_TE, expected.logits_TE)
    assert torch.equal(routing.expert_ids_A, expected.expert_ids_A)
    y.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.parameters())


def test_padding_mask_changes_no_output():
    layer = make(torch.float32)
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    masked, routing = layer(x, mask)
    assert torch.equal(masked, layer(x)[0])
    assert routing.counts_E.sum() == mask.sum() * 2


def test_state_dict_names_are_the_ones_of_hugging_face():
    shapes = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    assert shapes == {"router.weight": (5, 12), "experts.gate_up_proj": (5, 14, 12), "experts.down_proj": (5, 12, 7)}


def test_errors_name_what_was_wrong():
    with pytest.raises(ConfigError, match="hidden_size is 12, but x has 11 features"):
        make()(torch.randn(3, 11, dtype=torch.float64))
    with pytest.raises(UnknownNameError, match=r"unknown router 'best'; choose from: .*topk"):
        make(router="best")
    with pytest.raises(
        UnknownNameError, match="unknown expert kind 'big'; choose from: clamped_swiglu, mixed, mlp, swiglu"
    ):
        make(expert="big")


def test_input_jitter_reaches_router_and_experts_in_training_alone():
    config = moekit.MoEConfig(hidden_size=6, intermediate_size=4, num_experts=4, top_k=2, input_jitter=0.3)
    layer, x = moekit.MoE(config).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    plain = moekit.MoE(dataclasses.replace(config, input_jitter=0.0)).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x)[0], plain.eval()(x)[0])
    torch.manual_seed(3)
    got, _ = layer.train()(x)
    torch.manual_seed(3)
    want, _ = plain.train()(x * torch.empty_like(x).uniform_(0.7, 1.3))
    assert torch.equal(got, want)
    assert not torch.allclose(got, plain(x)[0])
