"""Parameter counts against real modules, published figures and hand-written sums."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.config import ROUTER_OPTIONS, ExpertGroup, ModelConfig, MoEConfig
from moekit.models.decoder import Decoder
from moekit.moe import MoE
from moekit.plan import BITS_PER_WEIGHT, flops_per_token, kv_cache_bytes, parameters, weight_bytes
from tolerances import rel


def model(**changes) -> ModelConfig:
    values = {
        "arch": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**values, **changes})


SMOLLM2_135M = model(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
MIXTRAL_8X7B = model(
    arch="mixtral",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    moe=MoEConfig(hidden_size=4096, intermediate_size=14_336, num_experts=8, top_k=2),
)
QWEN3_30B_A3B = model(
    arch="qwen3_moe",
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    qk_norm=True,
    moe=MoEConfig(
        hidden_size=2048,
        intermediate_size=768,
        num_experts=128,
        top_k=8,
        gate_order="softmax_topk",
        norm_topk_prob=True,
    ),
)


@st.composite
def configs(draw) -> ModelConfig:
    width, layers = draw(st.sampled_from([8, 12])), draw(st.integers(1, 3))
    moe = None
    if draw(st.booleans()):
        experts = draw(st.integers(2, 5))
        shared = draw(st.integers(0, 2))
        moe = MoEConfig(
            hidden_size=width,
            intermediate_size=draw(st.integers(1, 9)),
            num_experts=experts,
            top_k=draw(st.integers(2, experts)),
            expert=draw(st.sampled_from(["swiglu", "mlp"])),
            bias=draw(st.booleans()),
            num_shared_experts=shared,
            shared_intermediate_size=draw(st.sampled_from([None, 5])) if shared else None,
            shared_gate=bool(shared) and draw(st.booleans()),
        )
    return model(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=width,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([2, 6])),
        tie_word_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        moe=moe,
        dense_layers=tuple(draw(st.sets(st.integers(0, layers - 1)))) if moe else (),
    )


@settings(max_examples=80, deadline=None)
@given(configs())
def test_the_count_is_that_of_the_real_module(config):
    assert parameters(config).total == sum(p.numel() for p in Decoder(config).parameters())


@settings(max_examples=40, deadline=None)
@given(configs())
def test_a_token_meets_everything_but_the_experts_it_is_not_sent_to(config):
    count = parameters(config)
    unused = 0
    for block in Decoder(config).layers:
        if config.moe and hasattr(block.mlp, "experts"):
            expert = sum(p[0].numel() for p in block.mlp.experts.parameters())
            unused += (config.moe.num_experts - config.moe.top_k) * expert
    assert count.total - count.active == unused


@pytest.mark.parametrize(
    ("config", "total", "active_billions"),
    [
        (MIXTRAL_8X7B, 46_702_792_704, 12.9),  # 2401.04088 section 2: 47B and 13B; the sum is of its config.json
        (QWEN3_30B_A3B, 30_532_122_624, 3.35),  # 2505.09388 table 2: 30B-A3B; model card: 30.5B and 3.3B
        (SMOLLM2_135M, 134_515_008, 0.1345),
    ],
)
def test_published_counts(config, total, active_billions):
    count = parameters(config)
    assert count.total == total
    assert count.active / 1e9 == pytest.approx(active_billions, rel=rel("published"))


def test_flops_by_hand():
    config = model(moe=MoEConfig(hidden_size=16, intermediate_size=4, num_experts=8, top_k=2))
    attention = 16 * 32 * 2 + 16 * 16 * 2
    matrices = 2 * (attention + 8 * 16 + 2 * 3 * 16 * 4) + 50 * 16
    assert flops_per_token(config) == 2 * matrices
    scores_and_sums = 2 * 4 * (2 * 8 * 100) * 2  # layers, heads, one dot product and one sum over 100 positions
    assert flops_per_token(config, context=100) == 2 * matrices + scores_and_sums


def test_a_tied_head_costs_work_but_no_parameters():
    tied, untied = model(tie_word_embeddings=True), model()
    assert flops_per_token(tied) == flops_per_token(untied)
    assert parameters(untied).total - parameters(tied).total == 50 * 16


def test_bytes():
    assert weight_bytes(SMOLLM2_135M)["bfloat16"] == 2 * 134_515_008
    assert weight_bytes(SMOLLM2_135M)["float32"] == 4 * 134_515_008
    assert list(weight_bytes(SMOLLM2_135M)) == list(BITS_PER_WEIGHT)
    # 32 weights of 4 bits and one 16-bit scale
    assert weight_bytes(SMOLLM2_135M)["int4"] == 134_515_008 // 32 * 18
    assert kv_cache_bytes(SMOLLM2_135M, 1000) == 1000 * 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize(
    "changes",
    [
        *({"router": name, "gate_order": "softmax_topk"} for name in ROUTER_OPTIONS if ROUTER_OPTIONS[name].causal),
        {"expert": "mlp", "bias": True, "num_shared_experts": 2, "shared_gate": True},
        {
            "expert": "mixed",
            "bias": True,
            "expert_groups": (
                ExpertGroup(count=2),
                ExpertGroup(count=3, kind="mlp", intermediate_size=5, activation="relu"),
                ExpertGroup(count=1, kind="zero"),
            ),
        },
    ],
    ids=str,
)
def test_every_layer_has_the_parameters_that_are_counted(changes):
    moe = MoEConfig(**({"hidden_size": 12, "intermediate_size": 7, "num_experts": 6, "top_k": 2} | changes))
    parts = parameters(model(hidden_size=12, moe=moe, num_hidden_layers=1)).parts
    counted = parts["router"] + parts["experts"] + parts["shared"]
    assert counted == sum(p.numel() for p in MoE(moe).parameters())


def test_active_experts_where_their_number_varies():
    values = {"hidden_size": 12, "intermediate_size": 7, "num_experts": 6, "top_k": 4, "gate_order": "softmax_topk"}
    moe = MoEConfig(**values, router="top_p", router_options={"target_k": 1.5})
    count = parameters(model(hidden_size=12, moe=moe, num_hidden_layers=1))
    assert count.active_parts["experts"] == count.parts["experts"] / 6 * 1.5
