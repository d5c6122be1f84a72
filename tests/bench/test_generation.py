"""Decode and prefill of a tiny decoder: the same model in every program, and figures that add up."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from moekit import bench, cli
from moekit.bench import ModelFiles, Workload, decoders, generation
from moekit.bench.generation import llama_name
from moekit.bench.plot import draw
from moekit.kernels import cpu
from tiny_decoder import tiny_decoder

TINY = tiny_decoder(experts=8)
LIMITS = {"read_gb_s": 10.0, "gemm_fp32_gflop_s": 100.0, "gemm_bf16_gflop_s": 200.0, "gemm_int8_gflop_s": 400.0}
WORK = Workload(prompt=16, tokens=4, rounds=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(tmp_path_factory.mktemp("bench"), TINY)


def test_bf16_beside_transformers(files):
    rows = {(row.case, row.contender): row for row in generation(files, "bf16", LIMITS, work=WORK)}
    names = {"moekit", "transformers grouped_mm", "transformers eager"}
    assert rows.keys() == {(case, name) for case in ("prefill", "decode") for name in names}
    for (case, name), row in rows.items():
        tokens = WORK.prompt if case == "prefill" else 1
        assert row.tokens_per_second == pytest.approx(1e3 * tokens / row.p50_ms)
        peers = [rows[case, peer].p50_ms for peer in names - {"moekit"}]
        assert row.of_peer == pytest.approx(min(peers) / row.p50_ms)
        assert (row.p99_ms is None) == (case == "prefill")
        assert 0 <= abs(row.kl) < 0.01
        assert (row.memory is None) == (name != "moekit")


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_packed_without_the_peer(files, format, monkeypatch):
    monkeypatch.setattr("moekit.bench.peers.find_spec", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    said: list[str] = []
    (row,) = generation(files, format, LIMITS, cases=["decode"], work=WORK, missing=said.append)
    assert (row.contender, row.of_peer) == ("moekit", None)
    assert said == [f"{llama_name(format)} is left out: llama-cpp-python is not installed: pip install 'moekit[peers]'"]
    assert not (files.folder / f"{format}.gguf").exists()


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="pip install 'moekit[peers]', as `make test-all` does")
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_packed_beside_llama_cpp(files, format):
    rows = generation(files, format, LIMITS, work=WORK)
    assert [row.contender for row in rows] == ["moekit", llama_name(format)] * 2
    assert all(abs(row.kl) < 0.01 for row in rows)


def test_another_model_is_caught(files, monkeypatch):
    honest = bench.generation.__globals__["transformers_decoder"]

    def lazy(decoder, implementation):
        model = honest(decoder, implementation)
        model.lm_head.weight = torch.nn.Parameter(10 * model.lm_head.weight.flip(0))
        return model

    monkeypatch.setitem(bench.generation.__globals__, "transformers_decoder", lazy)
    with pytest.raises(AssertionError, match="transformers grouped_mm computes another model"):
        generation(files, "bf16", LIMITS, work=WORK)


def test_bytes_and_flops_by_hand(files):
    hidden, heads, width, vocabulary, past = 64, 64, 32, 512, 24
    attention = 4 * hidden * heads
    expert, router, norms = 3 * hidden * width, 8 * hidden, 2 * hidden + 2 * 32
    weights = 2 * (attention + 2 * expert + router + norms) + hidden + vocabulary * hidden
    cache = past * 2 * 2 * 2 * 32
    assert decoders.bytes_of_token(files.plain(), torch.bfloat16, past) == 2 * (weights + cache)
    matrices = 2 * (attention + 2 * expert + router)
    flops = 2 * 16 * matrices + 2 * vocabulary * hidden + 2 * 2 * 32 * 16 * 16 * 2
    assert decoders.flops_of_prompt(TINY, 16) == flops


def test_memory_is_read_whole():
    data = torch.arange(2 * 8 * 64 * 3, dtype=torch.int64)
    if cpu.unavailable() is None:
        for threads in (1, 2):
            assert cpu.native().read_memory(data.data_ptr(), data.nbytes, threads) == int(data.sum())


def test_a_plot(tmp_path):
    draw({"decode": [("moekit", 3.0), ("other", 1.0)], "prefill": [("moekit", 2.0)]}, tmp_path / "a" / "b.png", "more")
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "limits", lambda: LIMITS)
    monkeypatch.setattr(bench, "FAST", TINY)
    monkeypatch.setattr(bench, "Workload", lambda **_: WORK)
    out = tmp_path / "results.md"
    line = ["bench", "decode", "prefill", "--fast", "--formats", "bf16", "--cache", str(tmp_path), "--write", str(out)]
    assert cli.main([*line, "--plot", str(tmp_path / "a.png"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in report["generation"]] == ["prefill"] * 3 + ["decode"] * 3
    assert report["rows"] == []
    assert "× peer" in out.read_text()
    assert "`moekit bench decode prefill --fast`" in out.read_text()
    assert (tmp_path / "a.png").exists()
