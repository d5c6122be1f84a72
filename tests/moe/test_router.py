"""Top-k routing: the definitions and the ties, and transformers' routers beside ours; every router's precision."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import ROUTER_CASES, token_ids
from cases import config as case_config
from cases import make as make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import plain_weights
from torch import nn

from moekit import MoEConfig
from moekit.errors import UnsupportedError
from moekit.moe import ROUTERS, MoE, Routing, TopKRouter
from tolerances import rel

CASES = [
    {"gate_order": "topk_softmax"},
    {"gate_order": "softmax_topk"},
    {"gate_order": "softmax_topk", "norm_topk_prob": True},
]


def make(experts=6, top_k=3, hidden=10, **changes) -> MoE:
    return MoE(MoEConfig(hidden_size=hidden, intermediate_size=4, num_experts=experts, top_k=top_k, **changes))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_ids_by_the_definition(case):
    layer = make(**case).double()
    x = torch.randn(40, 10, dtype=torch.float64)
    routing = layer.router(x)
    for token in range(40):
        expected = plain_weights(layer.router.weight @ x[token], layer)
        assert routing.expert_ids_TK[token].tolist() == list(expected)
        torch.testing.assert_close(routing.weights_TK[token], torch.stack(list(expected.values())))
    assert torch.equal(routing.token_ids_A, torch.arange(40).repeat_interleave(3))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 12), experts=st.integers(2, 12), data=st.data())
def test_properties(tokens, experts, data):
    top_k = data.draw(st.integers(2, experts))
    case = data.draw(st.sampled_from(CASES))
    router = make(experts, top_k, **case).router
    # Few distinct values, so that ties are common.
    x = torch.randint(-1, 2, (tokens, 10)).float()
    with torch.no_grad():
        router.weight.copy_(torch.randint(-1, 2, (experts, 10)).float())
    routing = router(x)
    ids_TK = routing.expert_ids_TK
    assert routing.expert_ids_A.numel() == tokens * top_k
    assert ((ids_TK >= 0) & (ids_TK < experts)).all()
    assert all(len(set(row)) == top_k for row in ids_TK.tolist()), "a token got the same expert twice"
    assert (routing.weights_A > 0).all()
    if case != CASES[1]:
        torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(tokens))
    # Ties go to the lower number, and no unchosen expert scores above a chosen one.
    for logits, ids in zip(routing.logits_TE.tolist(), ids_TK.tolist(), strict=True):
        assert ids == sorted(range(experts), key=lambda e: (-logits[e], e))[:top_k]
    # Permuting the tokens permutes the routing.
    order = torch.randperm(tokens)
    assert torch.equal(router(x[order]).expert_ids_TK, ids_TK[order])


def test_scores_are_fp32_whatever_the_input_and_the_autocast():
    router = make().router.bfloat16()
    x = torch.randn(7, 10, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.logits_TE.dtype == routing.weights_A.dtype == torch.float32
    assert torch.equal(routing.logits_TE, x.float() @ router.weight.float().T)


def test_initial_scale():
    wide = {"hidden_size": 1000, "intermediate_size": 4, "num_experts": 100, "top_k": 2}
    for scale in (1.0, 0.1):
        std = TopKRouter(MoEConfig(**wide, router_init_scale=scale)).weight.std().item()
        assert std == pytest.approx((scale / 1000) ** 0.5, rel=rel("standard deviation of many"))


def test_against_transformers_routers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    from transformers import MixtralConfig, Qwen3MoeConfig

    x = torch.randn(50, 10)
    theirs = mixtral.MixtralTopKRouter(MixtralConfig(hidden_size=10, num_local_experts=6, num_experts_per_tok=3))
    pairs = [(theirs, make().router)]
    for renormalise in (True, False):
        config = Qwen3MoeConfig(hidden_size=10, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalise)
        ours = make(gate_order="softmax_topk", norm_topk_prob=renormalise).router
        pairs.append((qwen.Qwen3MoeTopKRouter(config), ours))
    for theirs, ours in pairs:
        with torch.no_grad():
            theirs.weight.copy_(ours.weight)
        logits, weights, ids = theirs(x)
        routing = ours(x)
        torch.testing.assert_close(routing.logits_TE, logits)
        torch.testing.assert_close(routing.weights_TK, weights)
        assert torch.equal(routing.expert_ids_TK, ids)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_router_gets_a_gradient(case):
    layer = make(**case)
    y, _ = layer(torch.randn(20, 10))
    y.square().sum().backward()
    assert (layer.router.weight.grad != 0).any(dim=1).all()


def test_irregular_routing_has_no_regular_view():
    routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(2, 3), top_k=None)
    assert routing.counts_E.tolist() == [0, 1, 0]
    with pytest.raises(UnsupportedError, match="no \\(T, K\\) view"):
        _ = routing.expert_ids_TK


# Precision


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTER_CASES)
def test_autocast_changes_no_routing(router, training):
    layer = make_case(router, dtype=torch.float32).train(training)
    x, ids = torch.randn(11, 5), token_ids(11)
    torch.manual_seed(4)
    plain = layer.router(x, input_ids_T=ids)
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=dtype):
            routing = layer.router(x, input_ids_T=ids)
            assert torch.is_autocast_enabled("cpu")
        for name in ("expert_ids_A", "token_ids_A", "weights_A", "logits_TE"):
            assert torch.equal(getattr(routing, name), getattr(plain, name))
        assert routing.weights_A.dtype == routing.logits_TE.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ROUTER_CASES)
def test_sixteen_bits_are_widened_before_they_are_multiplied(router, dtype):
    layer = make_case(router, dtype=torch.float32).to(dtype)
    x, ids = torch.randn(11, 5).to(dtype), token_ids(11)
    torch.manual_seed(4)
    narrow = layer.router(x, input_ids_T=ids)
    wide = copy.deepcopy(layer).float()
    torch.manual_seed(4)
    expected = wide.router(x.float(), input_ids_T=ids)
    rounds = layer.config.router == "switch"  # by definition, after the product
    for name in ("logits_TE",) if rounds else ("expert_ids_A", "token_ids_A", "weights_A", "logits_TE"):
        assert torch.equal(getattr(narrow, name), getattr(expected, name))
    y, _ = layer(x, input_ids=ids)
    assert y.dtype == dtype


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTER_CASES)
def test_fp64_is_never_narrowed(router, training):
    layer = make_case(router).train(training)
    routing = layer.router(torch.randn(11, 5, dtype=torch.float64), input_ids_T=token_ids(11))
    assert routing.weights_A.dtype == routing.logits_TE.dtype == torch.float64
    assert routing.load_TE is None or routing.load_TE.dtype == torch.float64


STATE = {"sigmoid": "selection_bias", "top_p": "threshold", "gumbel": "steps"}


@pytest.mark.parametrize("name", STATE)
def test_state_keeps_every_bit_through_any_conversion(name):
    def router(value=None):
        made = ROUTERS[name](
            MoEConfig(hidden_size=4, intermediate_size=2, num_experts=4, top_k=2, router=name, **options)
        )
        if value is not None:
            made._buffers[STATE[name]] = value.clone()
        return made

    options = {"top_p": {"gate_order": "softmax_topk"}}.get(name, {})
    value = getattr(router(), STATE[name])
    value = torch.tensor(1_234_567) if name == "gumbel" else torch.full_like(value, 0.123456789)
    assert value.dtype == (torch.int64 if name == "gumbel" else torch.float32)
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: nn.Sequential(m).to("cpu", torch.bfloat16)[0],
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):
        kept = getattr(convert(router(value)), STATE[name])
        assert kept.dtype == value.dtype
        assert torch.equal(kept, value)
    for convert in (lambda m: m.to("meta"), lambda m: m.to("meta", torch.bfloat16), lambda m: m.half().to("meta")):
        away = convert(router(value))
        kept = getattr(away, STATE[name])
        assert kept.is_meta
        assert kept.dtype == value.dtype
        back = getattr(away.to_empty(device="cpu"), STATE[name])
        assert (back.dtype, back.shape, back.device.type) == (value.dtype, value.shape, "cpu")
    state = router(value).bfloat16().state_dict()
    assert state[STATE[name]].dtype == value.dtype
    fresh = router().bfloat16()
    fresh.load_state_dict(state)
    assert torch.equal(getattr(fresh, STATE[name]), value)


def test_state_is_fp32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        biased = make(router="sigmoid").router
        adaptive = make(router="top_p", gate_order="softmax_topk").router
        noisy = make(router="noisy_topk").float().router
    finally:
        torch.set_default_dtype(torch.float32)
    assert biased.selection_bias.dtype == adaptive.threshold.dtype == torch.float32
    assert noisy(torch.randn(3, 10)).logits_TE.dtype == torch.float32


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device():
    router = make(router="gumbel").router
    with torch.device("meta"):
        seed = router._seed()
    assert isinstance(seed, int)


@pytest.mark.parametrize("router", ROUTER_CASES)
def test_reset_parameters_makes_a_layer_without_memory_a_fresh_one(router):
    """Torch's way for models that are made on the meta device; buffers are part of it."""
    with torch.device("meta"):
        layer = MoE(case_config(router))
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.detach().fill_(7)
    torch.manual_seed(3)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    fresh = MoE(case_config(router)).state_dict()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, fresh[name]), name
