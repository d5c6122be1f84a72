"""GGUF files that moekit writes: read back by its own reader and by the gguf package, block by block."""

from __future__ import annotations

import dataclasses
import errno
import os

import gguf
import numpy as np
import pytest
import torch
from twins import tokens, twin, write

from moekit.adapt import quantise
from moekit.config import ModelConfig, MoEConfig
from moekit.errors import ConfigError, FileError, UnsupportedError
from moekit.kernels.formats import Format, pack, unpack
from moekit.models import Decoder, GGUFFile, StoredDecoder, load_decoder, read_config, write_gguf

FAMILIES = ["llama", "mixtral", "qwen3_moe"]


def config(arch, **changes):
    gate = {"gate_order": "softmax_topk", "norm_topk_prob": True} if arch == "qwen3_moe" else {}
    moe = MoEConfig(hidden_size=64, intermediate_size=32, num_experts=5, top_k=2, **gate)
    return ModelConfig(
        **{
            "arch": arch,
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 64,
            "rope_theta": 5000.0,
            "rms_norm_eps": 2.0**-17,  # GGUF keeps fp32, and this comes back as it was
            "qk_norm": arch == "qwen3_moe",
            "moe": None if arch == "llama" else moe,
            "bos_token_id": 1,
            "eos_token_ids": (2, 3),
            **changes,
        }
    )


def random_decoder(arch, **changes):
    """Every parameter random, norms and biases too, wide enough that a wrong order or rotation shows."""
    decoder = Decoder(config(arch, **changes)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return decoder


def parameters(decoder):
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def dequantised(path, name):
    """The tensor by the gguf package's own reader."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_f32_comes_back_bit_for_bit(arch, tied, tmp_path):
    decoder = random_decoder(arch, tie_word_embeddings=tied, attention_bias=arch != "qwen3_moe")
    report = write_gguf(decoder, tmp_path / "a.gguf", "f32")
    again = load_decoder(tmp_path / "a.gguf")
    back, sent = again.config, decoder.config
    unused = sent.moe.intermediate_size if arch == "mixtral" else 96  # Mixtral has one width in GGUF
    assert back == dataclasses.replace(sent, intermediate_size=unused)
    for (name, want), got in zip(parameters(decoder).items(), again.parameters(), strict=True):
        assert torch.equal(want, got), name
    assert report.nbytes == (tmp_path / "a.gguf").stat().st_size
    assert report.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert (set(report.tensors), report.rounded_twice) == ({"F32"}, ())


@pytest.mark.parametrize("name", ["mixtral", "llama tied", "qwen3_moe"])
def test_a_stored_model_is_written_as_a_loaded_one(name, tmp_path):
    write(name, tmp_path / "theirs")
    stored = StoredDecoder(tmp_path / "theirs")
    if stored.config.dense_layers:
        with pytest.raises(UnsupportedError, match=r"cannot express dense_layers=\(1,\)"):
            write_gguf(stored, tmp_path / "a.gguf", "f32")
        assert not (tmp_path / "a.gguf").exists()
        return
    write_gguf(stored, tmp_path / "a.gguf", "f32")
    write_gguf(load_decoder(tmp_path / "theirs"), tmp_path / "b.gguf", "f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path / "a.gguf")(ids).logits, load_decoder(tmp_path / "theirs")(ids).logits)
    assert twin(name) is not None


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_those_of_the_gguf_package(kind, tmp_path):
    decoder = random_decoder("qwen3_moe")
    write_gguf(decoder, tmp_path / "a.gguf", kind)
    own = {name: tensor.kind for name, tensor in GGUFFile(tmp_path / "a.gguf").tensors.items()}
    assert {own["token_embd.weight"], own["output.weight"]} == {"Q8_0"}
    assert {own["blk.0.ffn_gate_inp.weight"], own["blk.1.attn_norm.weight"], own["blk.0.attn_q_norm.weight"]} == {"F32"}
    assert own["blk.0.ffn_down_exps.weight"] == kind.upper()
    experts = parameters(decoder)["layers.1.mlp.experts.gate_up_proj"]
    for name, rows in (("gate", experts[:, :32]), ("up", experts[:, 32:])):
        blocks = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind.upper()])
        got = dequantised(tmp_path / "a.gguf", f"blk.1.ffn_{name}_exps.weight")
        want = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()]))
        assert torch.equal(got, want), name


def test_f16_and_the_type_of_the_vocabulary(tmp_path):
    decoder = random_decoder("llama")
    report = write_gguf(decoder, tmp_path / "a.gguf", "f16", vocabulary="f32")
    assert report.tensors == {"F32": 2 + 5, "F16": 14}
    got = parameters(load_decoder(tmp_path / "a.gguf"))
    assert torch.equal(got["embed.weight"], decoder.embed.weight)
    for name, want in parameters(decoder).items():
        exact = want.dim() == 1 or name in ("embed.weight", "head.weight")
        assert torch.equal(got[name], want if exact else want.half().float()), name


class Packing(torch.nn.Module):
    """What `moekit pack` leaves of a linear, as far as the writer looks at it."""

    def __init__(self, weight, format):
        super().__init__()
        self.packed = pack(weight, format)


@pytest.mark.parametrize(
    ("format", "kind"), [("int8-g32", "q8_0"), ("int8", "q8_0"), ("int4", "q4_0"), ("int4-g64", "q4_0")]
)
@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe"])
def test_packed_models_keep_their_codes(arch, format, kind, tmp_path):
    moe = config(arch).moe
    moe = moe and dataclasses.replace(moe, hidden_size=128, intermediate_size=128)
    decoder = random_decoder(arch, hidden_size=128, intermediate_size=128, moe=moe, num_key_value_heads=4)
    format, plain = Format.parse(format), {name: value.clone() for name, value in parameters(decoder).items()}
    quantise(decoder, format)
    report = write_gguf(decoder, tmp_path / "a.gguf", kind)
    assert report.rounded_twice == ()
    for name, got in parameters(load_decoder(tmp_path / "a.gguf")).items():
        used = Format.parse("int8") if name in ("embed.weight", "head.weight") else format
        kept = got.dim() == 1 or "router" in name
        want = plain[name] if kept else unpack(pack(plain[name], used, 2 if "gate_up" in name else 1))
        assert torch.equal(got, want), name


def test_another_format_is_rounded_once_more_and_named(tmp_path):
    decoder = random_decoder("llama")
    weight = decoder.layers[1].attn.v_proj.weight.detach()
    decoder.layers[1].attn.v_proj = Packing(weight, Format.parse("nf4"))
    for kind, twice in (("q8_0", ("blk.1.attn_v.weight",)), ("f16", ("blk.1.attn_v.weight",)), ("f32", ())):
        assert write_gguf(decoder, tmp_path / "a.gguf", kind).rounded_twice == twice
    got = load_decoder(tmp_path / "a.gguf").layers[1].attn.v_proj.weight
    assert torch.equal(got, unpack(pack(weight, Format.parse("nf4"))))


def test_what_a_type_cannot_hold_is_refused_with_the_tensors_name(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'token_embd.weight' has rows of 40 numbers, and Q8_0 needs a multiple of 32"
    ):
        write_gguf(random_decoder("llama", hidden_size=40), tmp_path / "a.gguf", "q4_0")
    decoder = random_decoder("llama")
    decoder.layers[1].mlp.down_proj.weight.data[3, 4] = 1e5
    with pytest.raises(ConfigError, match=r"'blk.1.ffn_down.weight'.*F16 does not hold"):
        write_gguf(decoder, tmp_path / "a.gguf", "f16")
    decoder.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ConfigError, match=r"'blk.1.ffn_down.weight'.*NaN"):
        write_gguf(decoder, tmp_path / "a.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arch", "changes", "named"),
    [
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
        (
            "qwen3_moe",
            {"moe": dataclasses.replace(config("qwen3_moe").moe, norm_topk_prob=False)},
            "norm_topk_prob=False",
        ),
        ("qwen3_moe", {"qk_norm": False}, "qk_norm=False"),
        ("mixtral", {"moe": dataclasses.replace(config("mixtral").moe, num_shared_experts=1)}, "num_shared_experts=1"),
        ("mixtral", {"moe": None}, "write it as llama"),
        ("llama", {"eos_token_ids": (1, 2, 3, 4)}, "eos_token_ids="),
        ("llama", {"arch": "other"}, "other model has no place in a GGUF file"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(arch, changes, named, tmp_path):
    decoder = random_decoder(arch)
    decoder.config = dataclasses.replace(decoder.config, **changes)
    with pytest.raises(UnsupportedError, match=named):
        write_gguf(decoder, tmp_path / "a.gguf", "f32")


def test_the_gate_may_be_written_either_way(tmp_path):
    moe = dataclasses.replace(config("mixtral").moe, gate_order="softmax_topk", norm_topk_prob=True)
    write_gguf(random_decoder("mixtral", moe=moe), tmp_path / "a.gguf", "f32")
    assert read_config(tmp_path / "a.gguf").moe.gate_order == "topk_softmax"


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_an_interrupted_export_leaves_nothing(ending, tmp_path):
    calls = []

    def interrupt(done, total):
        calls.append((done, total))
        if len(calls) == 5:
            raise ending

    with pytest.raises(FileError if isinstance(ending, OSError) else KeyboardInterrupt):
        write_gguf(random_decoder("llama"), tmp_path / "a.gguf", "f32", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_metadata_is_what_llama_cpp_reads(tmp_path):
    write_gguf(random_decoder("qwen3_moe"), tmp_path / "a.gguf", "q4_0")
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    want = {
        "general.architecture": "qwen3moe",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "qwen3moe.block_count": 2,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.expert_count": 5,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 32,
        "qwen3moe.rope.freq_base": 5000.0,
        "qwen3moe.vocab_size": 97,
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }
    assert {key: metadata.get(key) for key in want} == want
    assert np.isclose(metadata["qwen3moe.attention.layer_norm_rms_epsilon"], 2.0**-17)
