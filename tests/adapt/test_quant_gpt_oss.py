"""gpt-oss packed: its biased, limited experts, and its published mxfp4 numbers, every one of which packing keeps."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from twins import randomised

from moekit.adapt import load_packed, load_quantised, quantise, save_packed
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import QuantExperts, Recipe
from moekit.adapt.quant_stream import QuantisedWeights
from moekit.errors import ConfigError
from moekit.kernels.formats import Format, pack, unpack
from moekit.models import KVCache, load_decoder
from moekit.models.dequantise import dequantise_mxfp4
from moekit.moe import RoutingRecord
from tolerances import rel

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}
EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture
def folder(tmp_path):
    """A tiny gpt-oss as transformers writes it."""
    randomised(transformers.GptOssForCausalLM(transformers.GptOssConfig(**CONFIG))).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def published(folder):
    """The same with random experts as OpenAI publishes them: blocks whose largest number is any of the format's."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, cols, rows = tensors.pop(name).shape
        codes = torch.randint(256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
        small = torch.randint(8, (experts, rows, cols // 32, 1), dtype=torch.uint8)  # the largest code of a block
        codes = (codes & 7).minimum(small) | (codes & 0x88) | (codes >> 4 & 7).minimum(small) << 4
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(118, 126, codes.shape[:-1], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder, tensors


def packed_experts(decoder):
    return [part for part in decoder.modules() if isinstance(part, QuantExperts)]


def stacks(experts):
    """gate_up (E, 2F, D) and down (E, D, F) in fp32."""
    pairs = zip(*map(experts.packed_expert, range(len(experts.formats))), strict=True)
    return [torch.stack([unpack(each) for each in side]) for side in pairs]


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "mxfp4"])
@torch.no_grad()
def test_packed_it_is_its_dequantised_self(format, folder, tmp_path):
    plain = load_decoder(folder, torch.float32)
    decoder, report = load_quantised(folder, format, head=format)
    assert report.expert_bytes[0] == report.expert_bytes[1] > 0
    for name, value in decoder.state_dict().items():
        if getattr(value, "is_floating_point", bool)() and name in dict(plain.named_parameters()):
            plain.get_parameter(name).copy_(value)
    for name, module in decoder.named_modules():
        if isinstance(module, QuantExperts):
            gate_up, down = stacks(module)
            plain.get_submodule(name).gate_up_proj.copy_(gate_up)
            plain.get_submodule(name).down_proj.copy_(down)
        elif hasattr(module, "packed"):
            plain.get_submodule(name).weight.copy_(unpack(module.packed))
    ids, record = torch.randint(61, (1, 24)), RoutingRecord()
    with record.recording():
        want = plain(ids).logits
    with record.replaying():
        got = decoder(ids).logits
    bound = rel("int8 activations, nf4" if format == "nf4" else "int8 activations")
    assert (got - want).norm() < bound * want.norm()
    save_packed(decoder, tmp_path / "packed")
    again = load_packed(tmp_path / "packed")
    assert torch.equal(again(ids).logits, decoder(ids).logits)
    cache = KVCache(decoder.config, batch=1, capacity=24, dtype=decoder.cache_dtype)
    steps = torch.cat([decoder(piece, cache=cache).logits for piece in ids.split(1, dim=1)], dim=1)
    assert (steps - decoder(ids).logits).norm() < bound * want.norm()


@torch.no_grad()
def test_published_mxfp4_experts_keep_every_number(published):
    folder, tensors = published
    decoder, report = load_quantised(folder, "mxfp4")
    assert all(each.error == 0 for each in report.packed if "experts" in each.name)
    for layer, experts in enumerate(packed_experts(decoder)):
        gate_up, down = stacks(experts)
        name = f"model.layers.{layer}.mlp.experts"
        wanted = [
            dequantise_mxfp4(tensors[f"{name}.{part}_blocks"], tensors[f"{name}.{part}_scales"], torch.float32)
            for part in EXPERTS
        ]
        assert torch.equal(gate_up, torch.cat([wanted[0][:, 0::2], wanted[0][:, 1::2]], dim=1))
        assert torch.equal(down, wanted[1])
    write_packed(QuantisedWeights(folder, Recipe.of("mxfp4")), folder / "packed")  # what `moekit pack` does
    for other in (quantised(folder, layer), packed_experts(load_packed(folder / "packed"))[layer]):
        assert all(torch.equal(a, b) for a, b in zip(stacks(experts), stacks(other), strict=True))


def quantised(folder, layer):
    """The same by way of the whole plain model."""
    decoder = load_decoder(folder)
    quantise(decoder, "mxfp4")
    return packed_experts(decoder)[layer]


def test_every_block_of_mxfp4_survives_packing():
    """Each largest number, each exponent: packing may take another exponent, in which all numbers are exact as well."""
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1).expand(255, 8, 1, 16)
    lower = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16).remainder(8).minimum(codes)
    blocks = codes | (lower | 8 * (lower > 0).byte()) << 4  # the largest, and lower ones of the other sign
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 8, 1)
    numbers = dequantise_mxfp4(blocks.contiguous(), scales.contiguous()).float()
    inside = numbers[:253]  # above, 4 and 6 times 2^126 leave the range of bf16 and fp32
    assert torch.equal(unpack(pack(inside.bfloat16(), Format.parse("mxfp4"))), inside)
    assert numbers[253:].isinf().any()
    with pytest.raises(ConfigError, match="NaN or infinity"):
        pack(numbers[253:], Format.parse("mxfp4"))
