"""`moekit export`: what it prints, and that it reads back."""

from __future__ import annotations

import dataclasses
import json

import torch

from moekit import cli
from moekit.adapt import quantise, save_packed
from moekit.kernels.formats import unpack
from moekit.models import Decoder, load_decoder
from tiny import tiny_config, tiny_model


def test_export_and_read_back(tmp_path, capsys):
    model = tiny_model()
    model.save(tmp_path / "model")
    out = tmp_path / "new" / "model.gguf"
    line = ["export", str(tmp_path / "model"), str(out), "--type", "f32"]
    assert cli.main([*line, "--pre-tokenizer", "gpt-2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out.stat().st_size
    assert (report["architecture"], report["pre_tokenizer"]) == ("llama", "gpt-2")
    for want, got in zip(model.decoder.parameters(), load_decoder(out).parameters(), strict=True):
        assert torch.equal(want, got)
    assert cli.main([*line[:3], "--type", "f16", "--head", "f32", "--no-tokenizer"]) == 0
    printed = capsys.readouterr().out
    assert "tokenizer   none" in printed
    assert "14 F16" in printed


def test_a_packed_folder(tmp_path, capsys):
    config = dataclasses.replace(tiny_config(), moe=dataclasses.replace(tiny_config().moe, intermediate_size=32))
    decoder = Decoder(dataclasses.replace(config, intermediate_size=32))
    quantise(decoder, "int8")
    save_packed(decoder, tmp_path / "packed")
    line = ["export", str(tmp_path / "packed"), str(tmp_path / "a.gguf"), "--type", "q8_0", "--no-tokenizer", "--json"]
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["rounded_twice"] == []
    want = unpack(decoder.layers[1].mlp.experts.down.weights[3])
    assert torch.equal(load_decoder(tmp_path / "a.gguf").layers[1].mlp.experts.down_proj[3], want)


def test_refusals_are_one_line(tmp_path, capsys):
    tiny_model().save(tmp_path / "model")
    for arguments, said in (
        (["model", "model.bin"], "must end in .gguf"),
        (["model", "model.gguf"], "give llama.cpp's name for it with --pre-tokenizer"),
        (["missing", "model.gguf"], "missing"),
    ):
        assert cli.main(["export", *(str(tmp_path / name) for name in arguments)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
