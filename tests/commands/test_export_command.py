"""`moekit export`: what it prints, and that other programs read it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from gguf_twins import WORDS
from twins import write

from moekit import cli
from moekit.adapt import quantise, save_packed
from moekit.kernels.formats import unpack
from moekit.models import Decoder, load_decoder, write_gguf
from tiny import tiny_config, tiny_model


def test_export_and_read_back(tmp_path, capsys):
    model = tiny_model()
    model.save(tmp_path / "model")
    out = tmp_path / "new" / "model.gguf"
    line = ["export", str(tmp_path / "model"), str(out), "--to", "gguf", "--type", "f32"]
    assert cli.main([*line, "--pre-tokenizer", "gpt-2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out.stat().st_size
    assert (report["architecture"], report["pre_tokenizer"]) == ("llama", "gpt-2")
    for want, got in zip(model.decoder.parameters(), load_decoder(out).parameters(), strict=True):
        assert torch.equal(want, got)
    assert cli.main([*line[:5], "--type", "f16", "--head", "f32", "--no-tokenizer"]) == 0
    printed = capsys.readouterr().out
    assert "tokenizer   none" in printed
    assert "14 F16" in printed


def test_a_packed_folder(tmp_path, capsys):
    config = dataclasses.replace(tiny_config(), moe=dataclasses.replace(tiny_config().moe, intermediate_size=32))
    decoder = Decoder(dataclasses.replace(config, intermediate_size=32))
    quantise(decoder, "int8")
    save_packed(decoder, tmp_path / "packed")
    line = ["export", str(tmp_path / "packed"), str(tmp_path / "a.gguf"), "--to", "gguf", "--type", "q8_0"]
    assert cli.main([*line, "--no-tokenizer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounded_twice"] == []
    want = unpack(decoder.layers[1].mlp.experts.down.weights[3])
    assert torch.equal(load_decoder(tmp_path / "a.gguf").layers[1].mlp.experts.down_proj[3], want)


def test_to_hugging_faces_layout(tmp_path, capsys):
    """From a GGUF file with its tokenizer; transformers' model and tokenizer are the original ones."""
    write("mixtral", tmp_path / "theirs")
    write_gguf(load_decoder(tmp_path / "theirs"), tmp_path / "a.gguf", "f32", tokenizer=WORDS)
    line = ["export", str(tmp_path / "a.gguf"), str(tmp_path / "hf"), "--to", "hf"]
    assert cli.main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["architecture"], report["dtype"]) == ("MixtralForCausalLM", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert report["parameters"] == model.num_parameters()
    for (name, want), got in zip(original.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode("abcdA") == [94, 95, 32]
    assert cli.main([*line, "--type", "bf16", "--no-tokenizer"]) == 0
    assert "in bfloat16\ntokenizer   none" in capsys.readouterr().out
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("model model.bin --to gguf", "a file, whose name ends in .gguf"),
        ("model model.gguf --to hf", "a folder, whose name does not end so"),
        ("model model.gguf --to gguf", "give llama.cpp's name for it with --pre-tokenizer"),
        ("missing model.gguf --to gguf", "missing"),
        ("model out --to hf --type q4_0", "--to hf writes f32, f16, bf16, not q4_0"),
        ("model out --to hf --head f32", "--head is for --to gguf alone"),
        ("unigram.gguf out --to hf", "and so it cannot be written; --no-tokenizer leaves it out"),
    ],
)
def test_refusals_are_one_line(arguments, said, tmp_path, capsys):
    tiny_model().save(tmp_path / "model")
    decoder = load_decoder(tmp_path / "model")
    write_gguf(decoder, tmp_path / "unigram.gguf", "f32", tokenizer={"tokenizer.ggml.model": "t5"})
    model, out, *flags = arguments.split()
    assert cli.main(["export", str(tmp_path / model), str(tmp_path / out), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "unigram.gguf"]
