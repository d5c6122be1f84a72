"""`moekit inspect`: its counts against the routings of the model itself."""

import json

import numpy as np
import pytest
import torch

import moekit
from moekit.cli import main
from moekit.commands.heat import heat_table

TEXT = "Shall I compare thee to a summer's day?"


def run_json(capsys, *args):
    code = main(["inspect", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_counts_and_tokens_are_the_models_own(folders, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, result = run_json(capsys, folders / "moe", "--text", tmp_path / "text.txt")
    assert code == 0
    model = moekit.load(folders / "moe")
    routings = model(torch.tensor([model.tokenizer.encode(TEXT)])).routings
    assert [layer["counts"] for layer in result["work"]["layers"]] == [r.counts_E.tolist() for r in routings]
    assert "".join(result["work"]["tokens"]) == TEXT
    for layer, routing in enumerate(routings):
        assert [token[layer] for token in result["work"]["experts"]] == routing.expert_ids_TK.tolist()


def test_a_text_longer_than_the_context_is_cut_into_rows(folders, capsys):
    code, result = run_json(capsys, folders / "base", "--prompt", "y" * 600, "--max-tokens", 500)
    assert code == 0
    assert [sum(layer["counts"]) for layer in result["work"]["layers"]] == [1000, 1000]
    assert len(result["work"]["tokens"]) == 500


def test_facts(folders, capsys):
    code, result = run_json(capsys, folders / "moe")
    assert code == 0
    assert result["work"] is None
    facts = result["facts"]
    model = moekit.load(folders / "moe")
    assert facts["parameters"] == sum(p.numel() for p in model.decoder.parameters())
    assert facts["weights"].endswith("of float32")
    assert facts["chat template"] == "yes"
    assert facts["experts a token"] == 2


def test_people_see_a_map_and_the_tokens(folders, capsys, tmp_path):
    png = tmp_path / "new" / "map.png"
    assert main(["inspect", str(folders / "moe"), "--prompt", TEXT, "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "share of the work of each expert" in out
    assert "'S'" in out
    assert f"the first 24 of {len(TEXT)} tokens" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_has_only_facts(folders, capsys, tmp_path):
    assert main(["inspect", str(folders / "dense"), "--prompt", TEXT]) == 0
    out = capsys.readouterr().out
    assert "every parameter works on every token" in out
    code, result = run_json(capsys, folders / "dense", "--prompt", TEXT, "--png", tmp_path / "x.png")
    assert code == 2
    assert result["type"] == "UnsupportedError"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", "a", "--prompt", "b"], "not both"),
        (["--png", "a.png"], "give --text or --prompt"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--text", "/nowhere.txt"], "cannot read /nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(folders, flags, words, capsys):
    assert main(["inspect", str(folders / "moe"), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_an_empty_text_has_nothing_to_route(folders, capsys):
    assert main(["inspect", str(folders / "moe"), "--prompt", ""]) == 2
    assert "empty" in capsys.readouterr().err


def test_the_heat_of_a_layer():
    table = heat_table([[0, 1, 50, 100], [0, 0, 0, 0]], layers=[1, 3])
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["1", "3"]
    assert [cell.plain for cell in cells[1]] == [" ▁▄█", "    "]
    assert cells[2] == [f"{np.std([0, 1, 50, 100]) / np.mean([0, 1, 50, 100]):.2f}", "-"]
    assert cells[3] == ["3: 66%", "-"]
    assert cells[4] == ["1", "4"]
