"""`moekit pack`: what it writes, what it prints, what it refuses before any work."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

import moekit
from moekit import cli
from moekit.adapt import packed_formats
from moekit.adapt.quant_stream import QuantisedWeights


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("To be, or not to be, that is the question.\n" * 60)
    return path


def pack(capsys, *args) -> tuple[int, dict]:
    code = cli.main(["pack", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_folder_is_the_quantised_model(folders, tmp_path, capsys):
    code, result = pack(capsys, folders / "moe", tmp_path / "out", "--quant", "nf4", "--head", "int4")
    assert (code, result["quality"]) == (0, None)
    loaded = moekit.load(tmp_path / "out")
    formats = packed_formats(loaded.decoder)
    assert (formats["layers.0.attn.q_proj.data"], formats["head.data"]) == ("nf4", "int4-g32")
    assert result["expert_bytes"] == result["expert_bytes_packed"] > 0
    assert loaded.generate("ab", max_new_tokens=4) == moekit.load(tmp_path / "out").generate("ab", max_new_tokens=4)


def test_quality_and_hot_experts(folders, tmp_path, capsys, text):
    args = ("--quant", "int4", "--per-expert", "int8:0.25", "--text", text, "--rows", "4")
    code, result = pack(capsys, folders / "moe", tmp_path / "out", *args)
    assert code == 0
    quality = result["quality"]
    assert quality["rise"] == pytest.approx(quality["after"] / quality["before"] - 1)
    assert 0 < quality["kl"] < 1
    formats = packed_formats(moekit.load(tmp_path / "out").decoder)
    hot = [name for name, format in formats.items() if ".expert_" in name and format == "int8-g64"]
    assert [name.split(".")[1] for name in hot] == ["0", "1"]  # one of four experts in each layer
    report = cli.main(["eval", str(tmp_path / "out"), "--data", str(text)])
    assert report == 0


def test_what_people_read(folders, tmp_path, capsys, text):
    assert cli.main(["pack", str(folders / "dense"), str(tmp_path / "out"), "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "mlp.up_proj",
        "int4-g32",
        "bits a weight",
        "perplexity",
        "mean KL",
        "norms and biases",
    ):
        assert word in printed
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "int4-g32" in capsys.readouterr().out
    assert cli.main(["plan", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--quant", "int5"], "unknown format 'int5'"),
        (["--head", "half"], "unknown format 'half'"),
        (["--per-expert", "int8"], "FORMAT:SHARE"),
        (["--per-expert", "int8:0.5"], "give --text too"),
    ],
)
def test_refusals_come_before_any_work(folders, tmp_path, capsys, args, error):
    code, result = pack(capsys, folders / "moe", tmp_path / "out", *args)
    assert code == 2
    assert error in result["error"]
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_not_packed_again(folders, tmp_path, capsys):
    pack(capsys, folders / "dense", tmp_path / "out")
    code, result = pack(capsys, tmp_path / "out", tmp_path / "again")
    assert (code, result["type"]) == (2, "UnsupportedError")
    assert "packed by moekit" in result["error"]


def test_interrupted(folders, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moekit.models.safetensors_file._bytes", stop)
    assert cli.main(["pack", str(folders / "dense"), str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT"])
def test_stopped_and_gone_on_with(folders, tmp_path, capsys, monkeypatch, end):
    """By a signal in the middle: one line that says where the work is; the same command ends it."""
    make, made, ended = QuantisedWeights.make, [], []

    def stopping(self, name):
        made.append(name)
        if len(made) == 12:
            for _ in range(2):  # impatiently; the main thread has each after a while
                os.kill(os.getpid(), getattr(signal, end))
                time.sleep(0.2)
        value = make(self, name)
        ended.append(name)
        return value

    args = ["pack", str(folders / "moe"), str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(QuantisedWeights, "make", stopping)
        assert cli.main(args) == 130
    assert sorted(ended) == sorted(made)  # no thread is left behind
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"moekit: interrupted: \d+% is done and kept in .*/\.out\.packing: the same command .*\n", error
    )
    assert [path.name for path in tmp_path.iterdir()] == [".out.packing"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert cli.main(args) == 0
    assert re.match(r"going on with what .*/\.out\.packing holds: \d+% is done\n", capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert moekit.load(tmp_path / "out").generate("ab", max_new_tokens=2)


def test_random_weights_from_a_configuration_alone(folders, tmp_path, capsys):
    config = folders / "moe" / "config.json"
    code, result = pack(capsys, "--random", config, tmp_path / "out", "--quant", "nf4", "--seed", "3")
    assert code == 0
    assert result["bytes"] == (tmp_path / "out" / "packed.safetensors").stat().st_size
    assert result["parameters"] == sum(
        parameter.numel() for parameter in moekit.load(folders / "moe").decoder.parameters()
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "packed.safetensors"]
    for verb in ("generate", "chat", "inspect"):
        args = ["hello"] if verb == "generate" else []
        assert cli.main([verb, str(tmp_path / "out"), *args]) == 2
        assert "has no tokenizer" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "out")]) == 0


def test_random_weights_have_no_quality(folders, tmp_path, capsys, text):
    code, result = pack(capsys, folders / "moe", tmp_path / "out", "--random", "--text", text)
    assert (code, list(tmp_path.iterdir())) == (2, [text])
    assert "--random and --text exclude each other" in result["error"]
