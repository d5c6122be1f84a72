"""`moekit upcycle` from folder to folder: the written model has the dense model's logits, also in transformers."""

from __future__ import annotations

import json

import pytest
import torch

from moekit import cli, load
from tiny import tiny_model
from tolerances import near


@pytest.fixture
def dense(tmp_path):
    tiny_model(moe=False).save(tmp_path / "dense")
    return tmp_path / "dense"


def upcycle(capsys, *args: str) -> tuple[int, dict]:
    code = cli.main(["upcycle", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["copy", "split"])
def test_output_is_kept_in_the_file_too(dense, tmp_path, capsys, method):
    transformers = pytest.importorskip("transformers")
    code, result = upcycle(capsys, dense, tmp_path / "moe", "--method", method)
    assert (code, result["arch"], result["exact"]) == (0, "mixtral", True)
    ids = torch.randint(50, (2, 12))
    with torch.no_grad():
        expected = load(dense)(ids).logits
        ours = load(tmp_path / "moe")(ids).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids).logits
    torch.testing.assert_close(ours, expected, **near("fp32 model"))
    torch.testing.assert_close(theirs, expected, **near("fp32 model"))


def test_what_changes_is_said_and_what_cannot_be_written_is_refused_first(dense, tmp_path, capsys):
    code, result = upcycle(capsys, dense, tmp_path / "drop", "--method", "drop", "--drop-fraction", "0.25")
    assert (code, result["exact"], result["changes_output"]) == (0, False, "25% of every expert is drawn anew")
    ids = torch.randint(50, (1, 8))
    with torch.no_grad():
        assert not torch.allclose(load(tmp_path / "drop")(ids).logits, load(dense)(ids).logits)
    assert cli.main(["upcycle", str(dense), str(tmp_path / "noise"), "--method", "noise"]) == 0
    assert "not the dense model's: every expert is perturbed" in capsys.readouterr().out
    code, result = upcycle(capsys, dense, tmp_path / "raw", "--gate-order", "softmax_topk")
    assert (code, result["type"]) == (2, "UnsupportedError")
    assert "cannot express moe.gate_order" in result["error"]
    assert not (tmp_path / "raw").exists()


def test_counts_are_those_of_the_written_model(dense, tmp_path, capsys):
    _, result = upcycle(capsys, dense, tmp_path / "moe", "--num-experts", "4", "--top-k", "2")
    decoder = load(tmp_path / "moe").decoder
    assert result["total_params"] == sum(p.numel() for p in decoder.parameters())
    assert result["dense_params"] == sum(p.numel() for p in load(dense).decoder.parameters())
    assert 1.0 < result["flops_ratio"] < 1.1


def test_refusals_come_before_any_work(dense, tmp_path, capsys):
    assert upcycle(capsys, dense, tmp_path / "moe", "--num-experts", "7")[0] == 2
    assert upcycle(capsys, tmp_path / "nothing", tmp_path / "moe")[0] == 2
    upcycle(capsys, dense, tmp_path / "moe")
    code, result = upcycle(capsys, tmp_path / "moe", tmp_path / "again")
    assert (code, result["type"]) == (2, "UnsupportedError")
    assert not (tmp_path / "again").exists()
