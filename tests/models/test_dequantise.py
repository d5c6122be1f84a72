"""fp8 and mxfp4 as published: against plain loops over the definition, against transformers, and as whole folders."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from twins import tokens, write

from moekit.errors import FormatError, UnsupportedError
from moekit.models import StoredDecoder, load_decoder
from moekit.models.dequantise import Scheme, dequantise_fp8, dequantise_mxfp4

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}


def random_fp8(rows, columns, block):
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.1


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (130, 5), (1, 129), (64, 200)])
def test_fp8_is_its_definition(rows, columns):
    """The sizes that do not divide are those of DeepSeek-V3's kv_a_proj_with_mqa: 576 rows in blocks of 128."""
    weight, scale = random_fp8(rows, columns, (128, 128))
    got = dequantise_fp8(weight, scale, dtype=torch.float32)
    for r, c in itertools.product(range(rows), range(columns)):
        assert got[r, c].item() == (weight[r, c].float() * scale[r // 128, c // 128]).item()
    assert torch.equal(dequantise_fp8(weight, scale), got.bfloat16())


def test_fp8_is_what_transformers_makes_of_it():
    weight, scale = random_fp8(256, 384, (128, 128))
    want = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    assert torch.equal(dequantise_fp8(weight, scale), want)


def test_every_e4m3_number():
    """Sign, four bits of exponent with a bias of 7, three of mantissa; all ones are NaN (OCP 8-bit formats, v1.0)."""
    for byte in range(256):
        got = dequantise_fp8(
            torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(1, 1), dtype=torch.float32
        ).item()
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        assert got == (-value if byte & 128 else value) or (byte & 127 == 127 and got != got)  # noqa: PLR0124


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (2, 64, 3)])
def test_mxfp4_is_its_definition_and_transformers_own(shape):
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, shape, dtype=torch.uint8)
    got = dequantise_mxfp4(blocks, scales)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for e, r, g, k in itertools.product(*map(range, (*shape, 32))):
        byte = int(blocks[e, r, g, k // 2])
        code = byte >> 4 if k % 2 else byte & 15
        value = numbers[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[e, r, g]) - 127)
        assert got[e, r, 32 * g + k].item() == value
    assert torch.equal(got.transpose(1, 2), convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(dequantise_mxfp4(blocks, scales, torch.float32), got.float())


def test_scales_at_the_ends_of_their_range():
    byte = torch.full((1, 3, 1, 16), 0x22, dtype=torch.uint8)
    scales = torch.tensor([[[0], [254], [255]]], dtype=torch.uint8)
    assert dequantise_mxfp4(byte, scales, torch.float32)[0, :2, 0].tolist() == [2.0**-127, 2.0**127]
    assert dequantise_mxfp4(byte, scales)[0, 2].isnan().all()


def test_numbers_of_another_kind_are_refused():
    weight, scale = random_fp8(4, 4, (2, 2))
    with pytest.raises(FormatError, match=r"scales of shape \[2, 2\], and one a block would be \[1, 1\]"):
        dequantise_fp8(weight, scale)
    with pytest.raises(FormatError, match=r"stored as torch\.uint8"):
        dequantise_fp8(weight.view(torch.uint8), scale)
    with pytest.raises(FormatError, match=r"scales of shape \[1, 1, 1\]"):
        dequantise_mxfp4(torch.zeros(1, 1, 2, 16, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8))


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def fp8_folder(tmp_path):
    """A Mixtral whose matrices are quantised as DeepSeek-V3's are: all but embedding, head, norms and routers."""

    def make(edit=lambda tensors: None, **quantisation):
        write("mixtral", tmp_path)
        tensors, block = load_file(tmp_path / "model.safetensors"), FP8["weight_block_size"]
        for name in [name for name in tensors if "proj" in name or "experts" in name]:
            tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(*tensors[name].shape, block)
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        set_config(tmp_path, quantization_config=FP8 | quantisation)
        return tmp_path, tensors

    return make


def test_an_fp8_folder_loads_as_the_plain_one_it_stands_for(fp8_folder, tmp_path_factory):
    folder, tensors = fp8_folder()
    plain = tmp_path_factory.mktemp("plain")
    write("mixtral", plain)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = tensors[name.removesuffix("_scale_inv")], tensors.pop(name)
        rows, columns = weight.shape
        wide = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(8, 1)[:, :columns]
        tensors[name.removesuffix("_scale_inv")] = weight.float() * wide
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    want, got = load_decoder(plain), load_decoder(folder, torch.float32)
    for (name, one), two in zip(want.named_parameters(), got.parameters(), strict=True):
        assert torch.equal(one, two), name
    ids = tokens(1, 7)
    assert torch.equal(got(ids).logits, want(ids).logits)
    assert StoredDecoder(folder).read("layers.0.attn.q_proj.weight").dtype == torch.bfloat16


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(Q), rf"'{Q}_scale_inv' has no '{Q}' beside it"),
        (lambda t: t.update({Q: t[Q].float()}), rf"'{Q}' is stored as torch.float32, and its format asks for"),
        (lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1)}), rf"'{Q}' has scales of shape \[1, 1\], and one a"),
        (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}), "fp8 blocks lie in matrices"),
    ],
)
def test_fp8_folders_that_contradict_themselves(fp8_folder, edit, words):
    folder, _ = fp8_folder(edit)
    with pytest.raises(FormatError, match=words):
        load_decoder(folder)


def test_fp8_without_a_scale_and_other_schemes_are_refused(fp8_folder):
    folder, _ = fp8_folder(lambda t: t.pop(f"{Q}_scale_inv"))
    with pytest.raises(UnsupportedError, match=rf"'{Q}' is stored as torch.float8_e4m3fn"):
        load_decoder(folder)
    for quantisation, words in (
        ({**FP8, "weight_block_size": None}, "weight_block_size must be two whole numbers"),
        ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size must be two whole numbers"),
        ({**FP8, "fmt": "e5m2"}, "fp8 weights in 'e5m2'"),
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported; moekit computes plain floats, fp8, mxfp4"),
        ({}, "quant_method '.none.'"),
        (7, "quant_method 7"),
    ):
        set_config(folder, quantization_config=quantisation)
        with pytest.raises((FormatError, UnsupportedError), match=words):
            load_decoder(folder)


def stored(**shapes):
    kind = type("Stored", (), {})
    found = {}
    for name, shape in shapes.items():
        found[name] = kind()
        found[name].dtype, found[name].shape = torch.uint8, shape
    return found


def test_the_plan_of_gpt_oss_names_what_transformers_names():
    plan = Scheme("mxfp4").plan(stored(x_blocks=(3, 10, 2, 16), x_scales=(3, 10, 2), bias=(3, 10)), "a")
    assert plan.keys() == {"x"}
    assert (plan["x"].parts, plan["x"].shape) == (("x_blocks", "x_scales"), (3, 64, 10))
    blocks, scales = torch.randint(256, (3, 10, 2, 16)).byte(), torch.randint(90, 160, (3, 10, 2)).byte()
    got = plan["x"].make(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(got, convert_moe_packed_tensors(blocks, scales))
    assert got.shape == plan["x"].shape


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x_scales": (1, 2, 3)}, "'x_scales' has no 'x_blocks' beside it"),
        ({"x_scales": (1, 2, 3), "x_blocks": (1, 2, 3, 8)}, r"not \(experts, rows, groups, 16\)"),
        ({"x_scales": (1, 2, 2), "x_blocks": (1, 2, 3, 16)}, r"scales of shape \[1, 2, 2\]"),
        ({"x_scales": (1, 2, 3), "x_blocks": (1, 2, 3, 16), "x": (3,)}, "'x' is stored both plain and as 'x_blocks'"),
    ],
)
def test_plans_that_contradict_themselves(shapes, words):
    with pytest.raises(FormatError, match=words):
        Scheme("mxfp4").plan(stored(**shapes), "a")
