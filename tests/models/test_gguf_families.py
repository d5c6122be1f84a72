"""Every family that has a row for GGUF files: written there and read back, exactly, under llama.cpp's names."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf_twins import GGUF_TWINS
from twins import tokens, write

from moekit.errors import UnsupportedError
from moekit.models import GGUFFile, load_decoder, read_config, write_gguf
from moekit.models.gguf_archs import GGUF_ARCHS, gguf_metadata
from moekit.models.weights import stored_tensors

READ_AS = {"mistral": "llama", "solar_open": "glm4_moe", "glm4_moe_lite": "deepseek_v3"}
"""Families that are another's architecture there, of which nothing tells them apart."""


@pytest.fixture(params=GGUF_TWINS)
def family(request, tmp_path):
    """The name; the model, as transformers writes it, is in tmp_path/theirs and in tmp_path/a.gguf."""
    write(request.param, tmp_path / "theirs", GGUF_TWINS)
    write_gguf(load_decoder(tmp_path / "theirs"), tmp_path / "a.gguf", "f32")
    return request.param.split()[0]


@torch.no_grad()
def test_written_and_read_back_exactly(family, tmp_path):
    sent, back = load_decoder(tmp_path / "theirs"), load_decoder(tmp_path / "a.gguf")
    want, got = stored_tensors(sent), stored_tensors(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    ids = tokens(2, 13)
    assert torch.equal(back(ids).logits, sent(ids).logits)
    config = read_config(tmp_path / "a.gguf")
    rounded = np.float32(sent.config.rms_norm_eps).item()  # DBRX's has no key in config.json
    lost = {"router_aux_loss_coef": 0.0, "arch": READ_AS.get(family, family), "rms_norm_eps": rounded}
    if len(sent.config.moe_layers) == sent.config.num_hidden_layers:  # no dense MLP has a width
        lost["intermediate_size"] = config.intermediate_size
    assert config == dataclasses.replace(sent.config, **lost)


def test_names_are_those_of_llama_cpp(family, tmp_path):
    """Each is in the list that the gguf package has of this architecture's tensors."""
    architecture = GGUF_ARCHS[family].name
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for name, tensor in GGUFFile(tmp_path / "a.gguf").tensors.items():
        parts = name.split(".")
        common = name.replace(f"blk.{parts[1]}", "blk.{bid}") if parts[0] == "blk" else name
        assert common.rpartition(".")[0] in known, name
        assert tensor.kind == "F32"


@pytest.mark.parametrize(
    ("twin", "named"),
    [
        ("llama dynamic", "rope.scaling=DynamicRope"),
        ("llama llama3", "other factors than Llama 3's"),
        ("llama biases everywhere, gelu", "activation='gelu'"),
        ("mistral window", "attention.window=5"),
        ("qwen2 window in the last", "attention.window=5, attention.window_layers="),
        ("qwen2_moe", r"dense_layers=\(0,\)"),
        ("olmoe", "num_key_value_heads=2.*attention.clip_qkv=0.5"),
        ("deepseek_v2", "score='max'"),
        ("deepseek_v2 greedy, direct queries, yarn", "mscale=0.7, mscale_all_dim=1.1"),
        ("deepseek_v3 yarn, one group, biases", "attention_bias=True.*rope.interleaved=False"),
        ("dots1", "num_key_value_heads=2.*attention.window=5"),
        ("ernie4_5_moe untied, every second but the last, nothing shared", r"dense_layers=\(0, 2, 4, 5\)"),
        ("flex_olmo", "a flex_olmo model has no place in a GGUF file"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(twin, named, tmp_path):
    write(twin, tmp_path)
    with pytest.raises(UnsupportedError, match=named):
        gguf_metadata(read_config(tmp_path))


@torch.no_grad()
def test_names_of_older_and_newer_converters(tmp_path):
    """The latent vector's projection in one tensor, heads by their own sizes; gate and up of the experts in one."""
    write("deepseek_v3 groups, yarn", tmp_path / "theirs", GGUF_TWINS)
    sent = load_decoder(tmp_path / "theirs")
    write_gguf(sent, tmp_path / "a.gguf", "f32")
    file, sizes = GGUFFile(tmp_path / "a.gguf"), sent.config.mla
    tensors = {name: file.read(name) for name in file.tensors}
    for block in {name.rpartition(".attn_k_b")[0] for name in tensors if "attn_k_b" in name}:
        keys, values = tensors.pop(f"{block}.attn_k_b.weight"), tensors.pop(f"{block}.attn_v_b.weight")
        both = np.concatenate([keys.transpose(0, 2, 1), values], axis=1)
        tensors[f"{block}.attn_kv_b.weight"] = both.reshape(-1, sizes.kv_lora_rank)
        if f"{block}.ffn_up_exps.weight" in tensors:
            parts = [tensors.pop(f"{block}.ffn_{name}_exps.weight") for name in ("gate", "up")]
            tensors[f"{block}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    values = {
        key: value
        for key, value in file.metadata.items()
        if not key.startswith("general.") and not key.endswith(("_mla", "head_count_kv"))
    }
    values["deepseek2.attention.key_length"] = sizes.query_head_dim
    values["deepseek2.attention.value_length"] = sizes.value_head_dim
    values["deepseek2.attention.head_count_kv"] = sent.config.num_attention_heads
    write_raw(tmp_path / "b.gguf", "deepseek2", values, tensors)
    ids = tokens(1, 9)
    assert torch.equal(load_decoder(tmp_path / "b.gguf")(ids).logits, sent(ids).logits)


def write_raw(path, architecture, values, tensors):
    """By the gguf package alone."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_row_has_a_twin():
    assert {name.split()[0] for name in GGUF_TWINS} == set(GGUF_ARCHS)
