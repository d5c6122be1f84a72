"""Parameter counts against real modules, published figures and hand-written sums."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.config import ROUTER_OPTIONS, AttentionConfig, ExpertGroup, MLAConfig, ModelConfig, MoEConfig
from moekit.errors import UnknownNameError
from moekit.models.decoder import Decoder
from moekit.moe import MoE
from moekit.plan import (
    FORMATS,
    Case,
    SwitchConfig,
    advise,
    decode_bound,
    find,
    flops_per_token,
    kv_cache_bytes,
    kv_cache_bytes_read,
    offload,
    parameters,
    part_bytes,
    prefill_bound,
    published,
    training_flops,
)
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
    assert part_bytes(SMOLLM2_135M, "bfloat16").total == 2 * 134_515_008
    assert part_bytes(SMOLLM2_135M, "float32").total == 4 * 134_515_008
    assert kv_cache_bytes(SMOLLM2_135M, 1000) == 1000 * 30 * 2 * 3 * 64 * 2
    # Codes, and a 16-bit scale for 64 or 32 weights, or an 8-bit one; nf4 has 64 bytes more for 16 rows.
    for format, bits in {"int8": 8 + 16 / 64, "int4": 4 + 16 / 32, "mxfp4": 4 + 8 / 32, "nf4": 4 + 8 / 64}.items():
        assert format in FORMATS
        sizes = part_bytes(MIXTRAL_8X7B, format)
        assert sizes.stored["experts"] == pytest.approx(45_097_156_608 * bits / 8, rel=2e-3)
        assert sizes.stored["head"] == 131_072_000 * 8.25 / 8  # int8 in each
        assert sizes.stored["router"] == 4 * 32 * 8 * 4096  # float32
        assert sizes.read["experts"] * 4 == sizes.stored["experts"]
    with pytest.raises(UnknownNameError, match="unknown format 'int5'"):
        part_bytes(SMOLLM2_135M, "int5")


def test_a_token_reads_its_row_of_the_embedding_and_all_of_a_tied_one():
    tied, untied = part_bytes(model(tie_word_embeddings=True), "float32"), part_bytes(model(), "float32")
    assert tied.read["embedding"] == tied.stored["embedding"] == 4 * 50 * 16
    assert (untied.read["embedding"], untied.read["head"]) == (4 * 16, 4 * 50 * 16)


def test_bounds_by_hand():
    sizes = part_bytes(SMOLLM2_135M, "bfloat16")
    past = 100 * 30 * 2 * 3 * 64 * 2
    assert decode_bound(SMOLLM2_135M, sizes, 1e9, 100) == pytest.approx(1e9 / (2 * 134_515_008 + past))
    matrices = 49_152 * 576 + 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    work = 2 * matrices + 4 * 50 * 9 * 64 * 30
    assert prefill_bound(SMOLLM2_135M, 1e9, 100) == pytest.approx(1e9 / work)


def test_experts_on_disk_by_hand():
    sizes = part_bytes(QWEN3_30B_A3B, "int4")
    expert = 3 * 2048 * 768 * 9 // 16  # 4 bits, and 16 for 32 of them
    stride = -(-expert // 4096) * 4096
    assert sizes.stored["experts"] == 48 * 128 * expert
    cache = 4096 * 2 * 48 * 4 * 128 * 2
    rest = sum(sizes.stored[part] for part in ("attention", "router", "norms", "head"))  # the embedding is looked up
    taken = (400 << 20) + rest + cache
    memory = 8_000_000_000
    found = offload(QWEN3_30B_A3B, sizes, memory, 4096, bandwidth=10e9, disk=2e9)
    assert found.base == taken - cache
    assert found.slots == (int(0.99 * memory) - (16 << 20) - taken) // stride
    missed = (1 - found.slots / 6144) * 48 * 8 * expert
    assert found.missed_bytes == pytest.approx(missed)
    seconds = (sizes.per_token + cache) / 10e9 + missed / 2e9
    assert found.tokens_per_second == pytest.approx(1 / seconds)
    assert offload(QWEN3_30B_A3B, sizes, memory, 4096, 10e9, None).tokens_per_second is None
    assert offload(QWEN3_30B_A3B, sizes, found.least, 4096, 10e9, 2e9).slots == 8
    assert offload(QWEN3_30B_A3B, sizes, found.least - 2, 4096, 10e9, 2e9).slots == 0


def test_windows_and_latent_vectors_in_the_cache():
    windowed = model(attention=AttentionConfig(window=10, window_layers=(1,)))
    one = 2 * 2 * 8 * 2  # keys and values, heads, features, bytes
    assert kv_cache_bytes(windowed, 100) == 2 * 100 * one
    assert kv_cache_bytes_read(windowed, 100) == (100 + 10) * one
    assert flops_per_token(windowed, 100) - flops_per_token(windowed) == 4 * 4 * 8 * (100 + 10)
    mla = MLAConfig(kv_lora_rank=12, nope_head_dim=10, rope_head_dim=6, value_head_dim=14)
    assert kv_cache_bytes(model(mla=mla, head_dim=6), 100) == 2 * 100 * (12 + 6) * 2


def test_training_by_hand():
    # GPT-3 (2005.14165 table D.1): 174.6 B parameters, 300 B tokens, 3.14e23 FLOPs
    gpt3 = model(
        vocab_size=50_257,
        hidden_size=12_288,
        intermediate_size=49_152,
        num_hidden_layers=96,
        num_attention_heads=96,
        num_key_value_heads=96,
        head_dim=128,
        mlp_gated=False,
        tie_word_embeddings=True,
    )
    assert training_flops(gpt3, 300e9) == pytest.approx(3.14e23, rel=rel("published"))


PUBLISHED = {  # of the papers and model cards that the shipped files name: total, active
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "deepseek-moe-16b": (16.4e9, 2.8e9),
    "deepseek-v3": (671e9, 37e9),
    "qwen3-30b-a3b": (30.5e9, 3.3e9),
    "dbrx": (132e9, 36e9),
    "grok-1": (314e9, None),
    "olmoe-1b-7b": (6.9e9, 1.3e9),
    "gpt-oss-20b": (20.9e9, 3.6e9),
    "switch-base-128": (7.4e9, None),
    "glam-64e": (1.2e12, 96.6e9),
}


def test_every_published_model_is_counted_as_its_publisher_does():
    assert published().keys() == PUBLISHED.keys()
    for name, (total, active) in PUBLISHED.items():
        config, known = find(name)
        count = parameters(config)
        assert known.total == pytest.approx(total, rel=1e-3), name
        if name == "glam-64e":  # two digits
            assert round(count.total / 1e11) * 1e11 == total
        else:
            assert count.total == pytest.approx(total, rel=0.01), name
        counted = count.active if known.active_counts == "all" else count.active_without_embeddings
        assert (known.active is None) == (active is None)
        assert active is None or counted == pytest.approx(active, rel=0.03), name
        assert known.source


def test_figures_that_publishers_break_down():
    gpt_oss = parameters(find("gpt-oss-20b")[0])  # 2508.10925 table 1: MLP 19.12, attention 0.64, both embeddings 1.16
    assert round((gpt_oss.parts["experts"] + gpt_oss.parts["router"]) / 1e9, 2) == 19.12
    assert round(gpt_oss.parts["attention"] / 1e9, 2) == 0.64
    assert round((gpt_oss.parts["embedding"] + gpt_oss.parts["head"]) / 1e9, 2) == 1.16
    qwen = parameters(find("Qwen/Qwen3-30B-A3B")[0])  # its card: 29.9 B without embeddings
    assert round((qwen.total - qwen.parts["embedding"] - qwen.parts["head"]) / 1e9, 1) == 29.9
    assert parameters(find("grok-1")[0]).total == 315_684_820_992


@pytest.mark.parametrize(
    "values",
    [
        {"d_model": 24, "d_kv": 6, "d_ff": 10, "num_heads": 3, "vocab_size": 50, "num_experts": 5},
        {"d_ff": 10, "d_model": 8, "num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 0},
        {"d_ff": 10, "d_model": 8, "num_layers": 2, "num_decoder_layers": 3, "num_sparse_encoder_layers": 2},
    ],
    ids=str,
)
def test_switch_is_counted_as_transformers_builds_it(values):
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    theirs = SwitchTransformersConfig(**values)
    with torch.device("meta"):
        expected = SwitchTransformersForConditionalGeneration(theirs).num_parameters()
    assert parameters(SwitchConfig.from_hf(theirs.to_dict(), "config.json")).total == expected


GB = 10**9
CASE = Case(
    total=40 * GB,
    active=10 * GB,
    work=20 * GB,
    dense_work=80 * GB,
    weight_bytes=20 * GB,
    cache_bytes=GB,
    memory=24 * GB,
    num_experts=8,
    mean_k=2,
)


@pytest.mark.parametrize(
    ("changes", "choice", "because"),
    [
        ({}, "moe", "1/4.0 of the work"),
        ({"memory": 16 * GB}, "dense", "memory is paid for all parameters"),
        ({"memory": 4 * GB}, "neither", "does not fit either"),
        ({"dense_work": 24 * GB}, "dense", "falls 1.20 times only"),
        ({"tokens": 100e9}, "moe", "10.0 training tokens for each active parameter"),
        ({"num_experts": 1, "mean_k": 1, "dense_work": 20 * GB}, "dense", "no room for experts"),
        ({"num_experts": 1, "mean_k": 1, "memory": 64 * GB}, "dense", "moekit upcycle"),
        ({"num_experts": 1, "mean_k": 1, "memory": 8 * GB}, "neither", "it takes 19.6 GiB"),
    ],
)
def test_advice(changes, choice, because):
    advice = advise(dataclasses.replace(CASE, **changes))
    assert advice.choice == choice
    assert any(because in reason for reason in advice.reasons)


def test_a_batch_reads_most_experts():
    # 1 − (1 − 2/8)^16
    assert any("read about 99% of the experts" in reason for reason in advise(CASE).reasons)


def test_a_name_is_a_path_or_shipped_or_in_the_cache(tmp_path, monkeypatch):
    config, known = find("mixtral-8x7b")
    assert find("MistralAI/mixtral-8x7B-v0.1") == (config, known)
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers", "d_ff": 3072}')
    assert find(tmp_path) == (SwitchConfig(d_ff=3072), None)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert find("google/switch-base-8") == (SwitchConfig(d_ff=3072), None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UnknownNameError, match=r"grok-1.*`moekit pull`"):
        find("some/model")


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
