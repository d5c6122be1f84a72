"""Configurations read and written; what cannot be computed is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from moekit.config import MoEConfig
from moekit.errors import FileError, FormatError, UnknownNameError, UnsupportedError
from moekit.models import ARCHS, read_config, write_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
QWEN = {**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
ERNIE = {**LLAMA, "model_type": "ernie4_5_moe", "moe_intermediate_size": 24, "moe_num_experts": 6, "moe_k": 3}


@pytest.fixture
def read(tmp_path):
    def read(values, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        return read_config(tmp_path)

    return read


def test_missing_keys_mean_what_transformers_means_by_them(read):
    config = read(LLAMA)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.bos_token_id) == (1e-6, False, 1)
    assert (config.eos_token_ids, config.pad_token_id, config.attention_bias) == ((2,), None, False)
    assert (read(MIXTRAL).rope_theta, read(MIXTRAL).rms_norm_eps) == (1e6, 1e-5)
    assert read(QWEN).eos_token_ids == ()


def test_both_homes_of_rope_theta_and_both_forms_of_eos(read):
    assert read(LLAMA, rope_theta=500).rope_theta == 500.0
    assert read(LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 7e5}).rope_theta == 7e5
    assert read(LLAMA, rope_theta=500, rope_parameters={"rope_theta": 600.0}).rope_theta == 600.0
    assert read(LLAMA, rope_scaling=None, rope_parameters=None, head_dim=None).head_dim == 8
    assert read(LLAMA, eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert read(LLAMA, eos_token_id=None).eos_token_ids == ()


def test_expert_count_under_either_name_and_dense_layers(read):
    assert read(QWEN).moe.num_experts == read(QWEN, num_experts=None, num_local_experts=6).moe.num_experts == 6
    config = read(QWEN, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.dense_layers == (0, 2, 3, 4)
    assert config.moe_layers == (1, 5)
    config = read(ERNIE, num_hidden_layers=9, moe_layer_interval=3, moe_layer_start_index=3)
    assert config.moe_layers == (5, 8)
    assert read(ERNIE, moe_layer_start_index=2).moe_layers == ()
    with pytest.raises(FormatError, match="moe_layer_interval must be at least 1, not 0"):
        read(ERNIE, moe_layer_interval=0)


def test_gate_orders_are_the_families_own(read):
    assert read(MIXTRAL).moe.gate_order == "topk_softmax"
    moe = read(QWEN, norm_topk_prob=True).moe
    assert (moe.gate_order, moe.norm_topk_prob) == ("softmax_topk", True)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_scaling of type 'spiral'"),
        (LLAMA, {"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters of type 'mrope'"),
        (MIXTRAL, {"mlp_bias": True}, "mlp_bias True is not supported in mixtral models"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported in llama models"),
        (LLAMA, {"hidden_act": "elu"}, "hidden_act 'elu'"),
        (LLAMA, {"hidden_act": ["silu"]}, "hidden_act"),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}, "rope_scaling of type"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (ERNIE, {"use_bias": True}, "use_bias True is not supported"),
        (ERNIE, {"moe_norm_min": 1e-6}, "moe_norm_min 1e-06 is not supported; moekit computes 1e-12"),
        (QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}, "a layer of type 'chunked_attention'"),
    ],
)
def test_what_the_decoder_would_compute_wrongly_is_refused(read, base, change, words):
    with pytest.raises(UnsupportedError, match=rf"config\.json: .*{words}"):
        read(base, **change)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (LLAMA, {"rope_scaling": {"type": "default"}, "attention_dropout": 0.1, "unheard_of": 1}),
        (LLAMA, {"sliding_window": 8}),
        (MIXTRAL, {"sliding_window": 64}),
        (QWEN, {"sliding_window": 32, "use_sliding_window": False}),
        (LLAMA, {"mlp_bias": False, "clip_qkv": None, "first_k_dense_replace": 0}),
    ],
)
def test_what_changes_nothing_is_accepted(read, base, change):
    assert read(base, **change) == read(base)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"hidden_size": None}, "the key 'hidden_size' is missing"),
        (MIXTRAL, {"num_local_experts": None}, "the key 'num_experts' is missing"),
        (LLAMA, {"hidden_size": "32"}, "hidden_size must be a whole number, not '32'"),
        (LLAMA, {"vocab_size": True}, "vocab_size must be a whole number, not True"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (LLAMA, {"eos_token_id": ["a"]}, "eos_token_id must be a token id"),
        (LLAMA, {"rope_parameters": 3}, "rope_parameters must be an object"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "the key 'factor' is missing"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "short_factor": 1}}, "short_factor must be a list of numbers"),
        (LLAMA, {"partial_rotary_factor": 0.4}, "dims must be even, not 3"),
        (LLAMA, {"partial_rotary_factor": float("inf")}, "partial_rotary_factor must lie in"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 0.0}}, "factor must be above 0, not 0.0"),
        (LLAMA, {"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": "x"}, "must be a whole number"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types must be a list of 2 kinds"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        (LLAMA, {"hidden_size": 10**12}, "hidden_size is 1000000000000, which no model has"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "top_k must be at most num_experts"),
        (QWEN, {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
    ],
)
def test_bad_values_name_the_key_and_the_file(read, base, change, words):
    with pytest.raises(FormatError, match=rf"config\.json: .*{words}") as caught:
        read(base, **change)
    assert "\n" not in str(caught.value)


def test_unknown_family_names_the_choices(read):
    with pytest.raises(UnknownNameError, match=r"'bert'; choose from: .*gpt2, .*llama, .*mixtral"):
        read(LLAMA, model_type="bert")
    with pytest.raises(UnknownNameError, match="choose from"):
        read({})


def test_positions_under_the_names_of_old_and_new_files(read):
    old = read(LLAMA, rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 2.0}, partial_rotary_factor=0.5)
    nested = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "partial_rotary_factor": 0.5}
    assert old == read(LLAMA, rope_parameters=nested)
    assert (old.rope.dims, old.rope.scaling.original_max_position_embeddings) == (4, 64)
    outside = read(LLAMA, rope_parameters=nested, original_max_position_embeddings=16)
    assert outside.rope.scaling.original_max_position_embeddings == 16


def test_windows_are_read_where_the_family_has_them(read):
    assert read({**LLAMA, "model_type": "mistral"}).attention.window is None  # 4096, and no text is as long
    assert read({**LLAMA, "model_type": "mistral"}, sliding_window=8).attention.window == 8
    assert read(QWEN2, layer_types=["full_attention", "sliding_attention"]).attention.window_layers == (1,)
    assert read(QWEN2, max_window_layers=0).attention.window_layers is None
    assert read(QWEN2, max_window_layers=2).attention.window is None


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1, "a": 2}', '{"a": ' + "[" * 100_000])
def test_broken_json_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileError, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(FileError, match=r"cannot read .*gone"):
        read_config(tmp_path / "gone")


def test_a_model_the_family_cannot_express_is_not_written(read, tmp_path):
    config = read(MIXTRAL)
    odd = dataclasses.replace(config.moe, gate_order="softmax_topk", num_shared_experts=1)
    with pytest.raises(UnsupportedError, match=r"mixtral .*moe\.gate_order='softmax_topk', moe\.num_shared_experts=1"):
        write_config(dataclasses.replace(config, moe=odd), tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"cannot express dense_layers=\(0,\)"):
        write_config(dataclasses.replace(config, dense_layers=(0,)), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="needs MoE layers"):
        write_config(dataclasses.replace(config, moe=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_starts_or_never_runs_may_differ(read, tmp_path):
    config = read(MIXTRAL)
    moe = dataclasses.replace(config.moe, intermediate_size=20, router_init_scale=0.1)
    write_config(dataclasses.replace(config, moe=moe), tmp_path / "out")
    assert read_config(tmp_path / "out").moe == dataclasses.replace(moe, router_init_scale=1.0)
    assert isinstance(moe, MoEConfig)


def test_rows_are_named_by_their_model_type():
    assert {name: ARCHS[name].model_type for name in ARCHS} == {name: name for name in ARCHS}


def test_reading_a_configuration_does_not_import_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    code = "import sys; from moekit.models import read_config; read_config(sys.argv[1]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
