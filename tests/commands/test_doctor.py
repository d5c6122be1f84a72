"""`moekit doctor`: its verdict, and the table of extras against the package's own metadata."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from moekit import bench, machine
from moekit.cli import main
from moekit.commands import doctor

RATES = {"read_gb_s": 48.0, "gemm_fp32_gflop_s": 187.0, "gemm_bf16_gflop_s": 865.0, "gemm_int8_gflop_s": 4.0}


def test_it_reports_and_measures(capsys):
    assert main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert result["problems"] == {}
    assert set(result["measured"]) == set(RATES)
    assert all(rate > 0 for rate in result["measured"].values())
    assert {choice["op"] for choice in result["kernels"]} >= {"grouped_mm", "moe_decode"}


def test_people_get_the_verdict(capsys, monkeypatch):
    monkeypatch.setattr(bench, "limits", lambda: RATES)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "48 GB/s" in out
    assert "865 GFLOP/s" in out
    assert "moekit can work here." in out


def test_too_little_memory_is_a_problem_with_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr(bench, "limits", lambda: RATES)
    monkeypatch.setattr(doctor, "available_memory", lambda: 1000)
    assert main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert "1.0 GiB" in result["problems"]["memory"]


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"train": ("no_such_package",)})
    (fact,) = doctor._extras()
    assert fact.value == "lacks no_such_package; pip install 'moekit[train]'"


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in doctor.EXTRAS.items():
        assert [re.split("[>=]=", line)[0] for line in project["optional-dependencies"][extra]] == list(packages)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_for_people(count, text):
    assert machine.readable_bytes(count) == text


def test_memory_is_plausible():
    assert 0 < machine.available_memory() <= machine.total_memory()
    assert machine.cores() >= 1
    assert machine.instruction_sets()
