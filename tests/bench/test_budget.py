"""A decoder within a limit of memory: the figures follow from what was counted, the processes do the same work."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from moekit import cli
from moekit.adapt.expert_probe import ReaderChoice
from moekit.adapt.packed_folder import load_packed
from moekit.bench import ModelFiles, budget_child, budget_curve, budget_runs
from moekit.bench.budget import budget, ratio, share_of_bound
from moekit.bench.budget_runs import BudgetRuns, Steps
from moekit.bench.memory_group import memory_group
from moekit.commands import bench_budget
from moekit.engine.trace import TraceHead, TraceRow, TraceWriter
from moekit.errors import MoekitError, UnsupportedError
from moekit.machine import total_memory
from tiny_decoder import tiny_decoder

TINY = tiny_decoder(experts=16)
STEPS = Steps(cold=4, settle=2, warm=6, peer=2, trace=24, prompt=16, sequences=4, rounds=2)
READER = dataclasses.asdict(ReaderChoice("cached", 2, 1 << 20, 1.0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = ModelFiles(tmp_path_factory.mktemp("bench"), TINY)
    files.random_packed()
    return files


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def in_process(monkeypatch):
    """Children without processes: the same functions, arguments through JSON."""

    def run(command, env, **_):
        task, given = command[-2:]
        monkeypatch.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])
        done = budget_child.TASKS[task](**json.loads(given))
        return SimpleNamespace(returncode=0, stdout=json.dumps(done), stderr="")

    monkeypatch.setattr(budget_runs, "subprocess", SimpleNamespace(run=run))


def no_group(monkeypatch):
    def refuse(limit):
        raise UnsupportedError("a memory control group needs root: Permission denied")

    monkeypatch.setattr(budget_runs, "memory_group", refuse)


def test_share_and_ratio():
    assert share_of_bound(194e6, 1.9, 1 / 8.1) == pytest.approx(0.8271, abs=1e-4)
    assert ratio({"cold": 6.0, "warm": 8.0}, {"cold": 0.5, "warm": 1.0}) == 8.0
    assert ratio({"cold": 6.0, "warm": 8.0}, {"cold": 1.0, "warm": 0.5}) == 6.0


def test_steps_within_a_budget_are_those_of_the_whole_model(files):
    folder, ids = str(files.random_packed()), list(range(100, 112))
    whole = budget_child.whole(folder, ids)
    with torch.inference_mode():
        expected = load_packed(folder)(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert whole["best"] == expected
    done = budget_child.alone(folder, total_memory(), READER, ids, cold=5, warm=3, most=8)
    assert done["best"] == expected
    assert (done["slots"], done["total_slots"], len(done["seconds"])) == (8, 32, 8)
    uses = [len(part) * TINY.num_hidden_layers * TINY.moe.top_k for part in (ids[:5], ids[-3:])]
    assert [sum(both) for both in zip(done["hits"], done["misses"], strict=True)] == uses
    keys = {(layer, expert) for step in whole["trace"][:5] for layer, chosen in enumerate(step) for expert in chosen}
    assert done["misses"][0] >= len(keys)  # each has to come once


def test_prompt_and_sequences_read_less(files):
    given = {"ids": list(range(32)), "sequences": 8, "rounds": 2, "most": 8}
    done = budget_child.together(str(files.random_packed()), total_memory(), READER, **given)
    assert done["prompt_reads"] == done["prompt_experts"] > 8
    assert done["together_reads_per_token"] < done["alone_reads_per_token"]


def test_without_a_group_the_peer_is_left_out_and_why_is_said(files, monkeypatch, tmp_path, capsys):
    in_process(monkeypatch)
    no_group(monkeypatch)
    monkeypatch.setattr("moekit.bench.FAST", TINY)
    monkeypatch.setattr(bench_budget, "FAST_LIMIT", total_memory())
    monkeypatch.setattr("moekit.bench.budget.Steps", lambda: STEPS)
    monkeypatch.setattr("moekit.bench.budget_runs._DISK_SECONDS", 0.05)
    monkeypatch.setattr("moekit.bench.limits", lambda: dict.fromkeys(
        ("read_gb_s", "gemm_fp32_gflop_s", "gemm_bf16_gflop_s", "gemm_int8_gflop_s"), 1.0))  # fmt: skip
    monkeypatch.setattr("moekit.bench.budget.LlamaCpp", SimpleNamespace(installed=lambda: False))
    plot = tmp_path / "curve.png"
    command = ["bench", "budget", "--fast", "--json", "--cache", str(files.folder.parent), "--plot", str(plot)]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ratio_to_llama_cpp_mmap"] is None
    assert found["limited_by"] == "itself"
    assert found["missing"] == ["llama.cpp is left out: llama-cpp-python is not installed: pip install 'moekit[peers]'"]
    assert found["tokens_identical"] is True
    assert found["disk_gb_s"] > 0
    assert {"cold", "warm"} == found["tokens_per_second"]["moekit"].keys()
    assert [point["share"] for point in found["curve"]] == [0.25, 0.5, 0.75, 1.0]
    assert found["curve"][-1]["tokens_per_second"] > 0
    assert found["prompt_reads_per_expert"] == 1
    assert plot.stat().st_size > 0


def test_refusal_without_root_is_the_reason(files, monkeypatch, tmp_path):
    no_group(monkeypatch)
    runs = BudgetRuns(files.random_packed(), 1 << 30, STEPS, 512, tmp_path, lambda _: None)
    assert runs.peer(tmp_path / "model.gguf") is None
    assert runs.missing == ["llama.cpp is left out: a memory control group needs root: Permission denied"]


def test_the_last_words_of_a_process(files, monkeypatch, tmp_path):
    no_group(monkeypatch)
    runs = BudgetRuns(files.random_packed(), 1 << 20, STEPS, 512, tmp_path, lambda _: None)
    with pytest.raises(MoekitError, match=r"process for alone ended with 1: 1\.0 MiB of memory are too little"):
        runs.alone()


def test_curve_of_a_trace(tmp_path):
    path = tmp_path / "trace.safetensors"
    tokens = torch.arange(40, dtype=torch.int32)
    experts = torch.stack([(tokens * step) % 8 for step in (1, 3)], dim=1).unsqueeze(-1).to(torch.int16)
    with TraceWriter(path) as writer:
        writer.add(TraceRow(0, tokens, experts))
        writer.finish(TraceHead((1, 4), 8, ("text",), {}), {int(token): "x" for token in tokens})
    steps, total = budget_curve.trace_steps(path)
    assert total == 16
    assert steps[:4] == [[(1, 0)], [(4, 0)], [(1, 1)], [(4, 3)]]
    points = budget_curve.curve(steps, total, "text")
    assert all(max(point.hits.values()) == point.hits["belady"] for point in points)
    assert all(point.misses_of_belady >= 1 for point in points)
    assert points[-1].hits == dict.fromkeys(points[-1].hits, pytest.approx(1 - 16 / 80))
    assert points[1].hits["lru"] == 0  # all come in turn, and half of them fit


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")
def test_in_a_control_group(files):
    with memory_group(700_000_000) as group:
        assert group.kills == 0
    assert not group.folder.exists()
    found = budget(files, 700_000_000, STEPS)
    assert (found.limited_by, found.kills, found.tokens_identical) == ("cgroup", 0, True)
    assert 0 < (found.peak_memory or 0) <= 700_000_000
    assert (found.ratio_to_llama_cpp_mmap is None) == (find_spec("llama_cpp") is None)
