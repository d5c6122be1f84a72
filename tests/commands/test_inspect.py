"""`moekit inspect`: its counts against the routings of the model itself."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import moekit
from moekit.cli import main
from moekit.commands.heat import heat_table
from tiny import VOCABULARY, tiny_model

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
    work, (text,) = result["work"], result["work"]["texts"]
    assert [layer["counts"] for layer in work["layers"]] == [r.counts_E.tolist() for r in routings]
    assert (text["name"], text["count"], text["left_out"]) == ("text", len(TEXT), 0)
    assert "".join(text["tokens"]) == TEXT
    for layer, routing in enumerate(routings):
        assert [token[layer] for token in text["experts"]] == routing.expert_ids_TK.tolist()
    assert work["specialisation"] == []


def test_a_text_longer_than_the_context_is_cut_into_rows(folders, capsys):
    code, result = run_json(capsys, folders / "base", "--prompt", "y" * 600, "--max-tokens", 500)
    assert code == 0
    assert [sum(layer["counts"]) for layer in result["work"]["layers"]] == [1000, 1000]
    assert len(result["work"]["texts"][0]["tokens"]) == 500


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model whose token t takes experts t % 4 and (t + 1) % 4, in every layer, and a writer of such texts."""
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()  # what a token carries stays its embedding
            if name.endswith("router.weight"):
                parameter.copy_(torch.eye(4, 32))
        one, two = torch.arange(VOCABULARY) % 4, (torch.arange(VOCABULARY) + 1) % 4
        model.decoder.embed.weight.copy_(2 * torch.eye(4, 32)[one] + torch.eye(4, 32)[two])
    folder = tmp_path_factory.mktemp("known")
    model.save(folder / "model")

    def text(name, ids):
        (folder / name).write_text(model.tokenizer.decode(ids))
        return folder / name

    return folder / "model", text


def test_known_routes_give_known_figures(known, capsys):
    model, text = known
    a, b = text("a.txt", [32, 36, 40] * 40), text("b.txt", [34, 38] * 500)
    code, result = run_json(capsys, model, "--text", f"second={b}", a)
    assert code == 0
    work = result["work"]
    assert [layer["counts"] for layer in work["layers"]] == [[120, 120, 1000, 1000]] * 2
    assert [one["name"] for one in work["texts"]] == ["second", "a"]
    assert [one["count"] for one in work["texts"]] == [1000, 120]
    assert work["texts"][1]["experts"] == [[[0, 1], [0, 1]]] * 120
    for one in work["specialisation"]:
        assert one["bits"] == pytest.approx(1.0)
        assert one["domains"] == pytest.approx([1.0, 1.0])
        assert one["shares"] == [[0, 0, 1, 1], [1, 1, 0, 0]]
        assert one["chance"] == pytest.approx(3 / (8 * math.log(2)) * (1 / 2000 + 1 / 240))
    together = [[120, 120, 0, 0], [120, 120, 0, 0], [0, 0, 1000, 1000], [0, 0, 1000, 1000]]
    assert work["together"] == [together] * 2
    assert {tuple(pair["experts"]) for pair in work["pairs"]} == {(0, 1), (2, 3)}


def test_texts_of_one_routing_are_not_apart(known, capsys):
    model, text = known
    a, b = text("a.txt", [32, 33, 34, 35] * 30), text("b.txt", [36, 37, 38, 39] * 11)
    code, result = run_json(capsys, model, "--text", a, b)
    assert code == 0
    assert [one["bits"] for one in result["work"]["specialisation"]] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_files_of_one_name_are_one_text_and_begin_their_own_rows(folders, capsys, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"import {name}\n" * 30)
    files = [f"code={tmp_path / name}.py" for name in "ab"]
    code, both = run_json(capsys, folders / "moe", "--text", *files)
    assert code == 0
    alone = [run_json(capsys, folders / "moe", "--text", file)[1]["work"]["texts"][0] for file in files]
    (text,) = both["work"]["texts"]
    assert text["name"] == "code"
    assert text["experts"] == alone[0]["experts"] + alone[1]["experts"]
    _, short = run_json(capsys, folders / "moe", "--text", *files, "--max-tokens", "400")
    assert short["work"]["texts"][0]["experts"] == text["experts"][:400]


def test_a_trace_shows_the_same_without_the_model(folders, capsys, tmp_path):
    model, trace = tmp_path / "model", tmp_path / "new" / "trace.safetensors"
    shutil.copytree(folders / "moe", model)
    (tmp_path / "a$^$.txt").write_text(TEXT * 40)
    (tmp_path / "b.txt").write_text("ümläut \U0001f600 " * 30)
    texts = ["--text", str(tmp_path / "a$^$.txt"), str(tmp_path / "b.txt")]
    code, live = run_json(capsys, model, *texts, "--save-trace", trace)
    assert code == 0
    assert main(["inspect", str(model), *texts]) == 0
    printed = capsys.readouterr().out
    shutil.rmtree(model)
    code, again = run_json(capsys, "--trace", trace, "--png", tmp_path / "map.png")
    assert code == 0
    assert again == live
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "--trace", str(trace)]) == 0
    assert capsys.readouterr().out == printed


def test_counts_are_of_all_tokens_where_not_all_are_listed(folders, capsys, monkeypatch):
    monkeypatch.setattr("moekit.commands.routes.LISTED_TOKENS", 30)
    code, result = run_json(capsys, folders / "base", "--prompt", "y" * 300)
    assert code == 0
    (text,) = result["work"]["texts"]
    assert (len(text["tokens"]), text["count"], text["left_out"]) == (30, 300, 270)
    assert sum(text["layers"][0]["counts"]) == 600
    assert main(["inspect", str(folders / "base"), "--prompt", "y" * 300]) == 0
    assert "the first 24 of 300 tokens; --json has 30, --save-trace all" in capsys.readouterr().out


def test_a_long_text_is_read_as_far_as_it_is_routed(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.train.data.PIECE", 100)
    (tmp_path / "long.txt").write_text("0123456789abcde\n" * 100)
    with (tmp_path / "long.txt").open("ab") as file:
        file.write(b"\xff\n")  # refused where it is reached
    code, result = run_json(capsys, folders / "moe", "--text", tmp_path / "long.txt", "--max-tokens", 200)
    assert code == 0
    assert "".join(result["work"]["texts"][0]["tokens"]) == ("0123456789abcde\n" * 100)[:200]
    code, result = run_json(capsys, folders / "moe", "--text", tmp_path / "long.txt")
    assert code == 2
    assert "not UTF-8" in result["error"]


def test_a_foreign_file_is_no_trace(folders, capsys):
    assert main(["inspect", "--trace", str(folders / "moe" / "model.safetensors")]) == 2
    err = capsys.readouterr().err
    assert "is not a routing trace" in err
    assert err.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(folders, capsys, tmp_path, monkeypatch):
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["inspect", str(folders / "moe"), "--prompt", TEXT, "--png", str(tmp_path / "a.png")]) == 2
    assert "pip install 'moekit[train]'" in capsys.readouterr().err


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
        (["--save-trace", "a"], "give --text or --prompt"),
        (["--trace", "a"], "give no MODEL"),
        (["--text", "x/a.txt", "y/a.txt"], "several texts are called a"),
        (["--text", "a=b.txt", "a.txt"], "several texts are called a"),
        (["--text", "a\x1bb=b.txt"], "can be printed"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--text", "/nowhere.txt"], "cannot read /nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(folders, flags, words, capsys):
    assert main(["inspect", str(folders / "moe"), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_model_or_a_trace_is_needed(capsys):
    assert main(["inspect"]) == 2
    assert "give a MODEL, or --trace" in capsys.readouterr().err


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
