"""Quantised from disk one matrix at a time: the bytes and the report of the model that was quantised whole."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from twins import FAMILIES, write

import moekit
from moekit.adapt import QuantReport, load_packed, quantise, save_packed
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.quant_stream import QuantisedWeights
from moekit.config import ModelConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.models import SafetensorsFile, load_decoder, save_decoder, write_gguf, write_safetensors
from moekit.models.archs import ARCHS, write_config
from moekit.models.decoder import Decoder
from moekit.models.gguf_file import GGUFFile
from moekit.models.weights import StoredDecoder, stored_tensors
from same_folders import same
from tiny import tiny_config

OFTEN = {"llama tied", "mixtral", "qwen3_moe", "dbrx", "granitemoe", "gpt2", "gpt_oss", "deepseek_v3"}


def streamed(source: Path, out: Path, quant: str = "int4") -> QuantReport:
    maker = QuantisedWeights(source, Recipe.of(quant))
    return maker.report(write_packed(maker, out).notes)


def both(source: Path, tmp_path: Path, quant: str = "int4") -> None:
    """Compare the streamed folder and report with those of the whole model."""
    report = streamed(source, tmp_path / "streamed", quant)
    decoder = load_decoder(source)
    expected = quantise(decoder, quant)
    save_packed(decoder, tmp_path / "whole")
    same(tmp_path / "streamed", tmp_path / "whole")
    assert report.packed == expected.packed
    buffers = [each for each in report.kept if each.name.endswith("selection_bias")]  # which are no parameters
    assert set(report.kept) - set(buffers) == set(expected.kept)


def qwen(width: int = 32, hidden: int = 32, experts: int = 4) -> ModelConfig:
    """Of a family whose experts some programs write in one tensor."""
    config = tiny_config()
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_experts": experts}
    moe = dataclasses.replace(config.moe, **sizes, gate_order="softmax_topk", norm_topk_prob=True)
    return dataclasses.replace(config, arch="qwen3_moe", qk_norm=True, hidden_size=hidden, moe=moe)


def fused(decoder: Decoder, folder: Path) -> Path:
    """A folder in which the experts of a layer lie in one tensor, as some programs write them."""
    layout = ARCHS[decoder.config.arch].hf
    tensors = {}
    for name, value in stored_tensors(decoder).items():
        for piece in layout.pieces(name, decoder.config, fused=layout.fused_name(name) is not None):
            assert piece.index == ()
            tensors[piece.name] = value.detach()
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    write_config(decoder.config, folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.heavy) for name in FAMILIES],
)
def test_of_every_family(tmp_path, name):
    write(name, tmp_path / "model")
    both(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("quant", ["int8", "int4-g64-asym", "nf4", "mxfp4"])
def test_of_experts_in_one_tensor(tmp_path, quant):
    both(fused(Decoder(qwen()).bfloat16(), tmp_path / "model"), tmp_path, quant)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_of_a_gguf_file(tmp_path, kind):
    write_gguf(Decoder(qwen()), tmp_path / "model.gguf", kind)
    both(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "granitemoe", "gpt_oss"])
def test_one_expert_is_that_of_the_stack(tmp_path, name):
    write(name, tmp_path / "model")
    stored = StoredDecoder(tmp_path / "model")
    stacks = [each for each in stored.names if ".experts." in each]
    assert stacks
    for each in stacks:
        whole = stored.read(each)
        assert all(torch.equal(stored.read(each, expert=number), whole[number]) for number in range(len(whole)))


@pytest.mark.parametrize("form", ["one by one", "fused", "gguf"])
def test_no_read_is_larger_than_an_expert(tmp_path, monkeypatch, form):
    decoder = Decoder(qwen())
    source = tmp_path / "model"
    if form == "fused":
        fused(decoder, source)
    elif form == "gguf":
        source = tmp_path / "model.gguf"
        write_gguf(decoder, source, "f32")
    else:
        save_decoder(decoder, source)
    sizes = []
    for kind in (SafetensorsFile, GGUFFile):

        def read(self, name, rows=None, real=kind.read):
            value = real(self, name, rows)
            if "exp" in name:
                sizes.append(value.nbytes)
            return value

        monkeypatch.setattr(kind, "read", read)
    streamed(source, tmp_path / "out")
    moe = decoder.config.moe
    assert max(sizes) <= 2 * moe.intermediate_size * moe.hidden_size * 4
    assert (
        sum(sizes)
        == decoder.config.num_hidden_layers * moe.num_experts * 3 * moe.intermediate_size * moe.hidden_size * 4
    )


def test_numbers_that_are_none_name_the_expert(tmp_path):
    decoder = Decoder(tiny_config())
    with torch.no_grad():
        decoder.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    save_decoder(decoder, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"expert 2 of layers\.1\.mlp\.experts\.down_proj cannot be quantised: .*NaN"):
        streamed(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_folder_is_no_source(tmp_path):
    save_decoder(Decoder(tiny_config()), tmp_path / "model")
    streamed(tmp_path / "model", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="packed by moekit"):
        QuantisedWeights(tmp_path / "out", Recipe.of("int4"))


def stopped_after(source: Path, out: Path, tensors: int, recipe: Recipe) -> None:
    maker, made = QuantisedWeights(source, recipe), []
    make, maker.threads = maker.make, 1

    def stopping(name):
        if len(made) == tensors:
            raise KeyboardInterrupt
        made.append(name)
        return make(name)

    maker.make = stopping
    with pytest.raises(KeyboardInterrupt):
        write_packed(maker, out)


def test_resumed_work_has_the_same_bytes_and_report(tmp_path):
    save_decoder(Decoder(tiny_config()), tmp_path / "model")
    report = streamed(tmp_path / "model", tmp_path / "whole")
    stopped_after(tmp_path / "model", tmp_path / "out", 11, Recipe.of("int4"))
    assert streamed(tmp_path / "model", tmp_path / "out") == report
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("what", ["model", "--quant", "--head"])
def test_changed_arguments_or_files_begin_again(tmp_path, what):
    source, out = tmp_path / "model", tmp_path / "out"
    save_decoder(Decoder(tiny_config()), source)
    recipes = {"--quant": Recipe.of("nf4"), "--head": Recipe.of("int4", "int4")}
    stopped_after(source, out, 11, recipes.get(what, Recipe.of("int4")))
    if what == "model":
        save_decoder(Decoder(tiny_config()), source)
        stat = (source / "model.safetensors").stat()
        os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    lines = []
    done = write_packed(QuantisedWeights(source, Recipe.of("int4")), out, tell=lines.append)
    assert done.resumed == 0
    assert [line.rpartition(" is of another ")[2] for line in lines] == [f"{what}: beginning again"]
    decoder = load_decoder(source)
    quantise(decoder, "int4")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(load_packed(out)(ids).logits, decoder(ids).logits)


PEAK = """
import sys, torch
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.quant_stream import QuantisedWeights, load_quantised
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
source, small, out, way = sys.argv[1:]
write_packed(QuantisedWeights(small, Recipe.of("int4")), out + "-small")  # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")
before = high()
if way == "streamed":
    write_packed(QuantisedWeights(source, Recipe.of("int4")), out)
else:
    load_quantised(source, "int4")
print(high() - before)
"""


@pytest.mark.heavy
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """100 MB of experts in stacks of 67 MB: streamed, it is some experts of 0.5 MB."""
    fused(Decoder(qwen(512, 256, 128)).bfloat16(), tmp_path / "model")
    save_decoder(Decoder(tiny_config()), tmp_path / "small")
    used = {}
    for way in ("streamed", "loaded"):
        command = [sys.executable, "-c", PEAK, tmp_path / "model", tmp_path / "small", tmp_path / "out", way]
        used[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    packed = (tmp_path / "out" / "packed.safetensors").stat().st_size
    assert packed > 55e6
    assert used["loaded"] > packed
    assert used["streamed"] < packed / 2
    assert moekit.adapt.load_packed(tmp_path / "out").is_packed
