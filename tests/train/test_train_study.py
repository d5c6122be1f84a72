"""The study: every contender can be trained, an interrupted study goes on, the table is the mean over seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from tiny_training import write_corpus

from moekit import cli
from moekit.config import ROUTER_OPTIONS
from moekit.errors import FormatError
from moekit.models import Decoder
from moekit.train import study
from moekit.train.study import ROUTER_CONTENDERS, Outcome, Study, draw, model_config, summarise


def small(folder: Path, **changes) -> Study:
    corpus = write_corpus(folder / "corpus")
    held_out = write_corpus(folder / "held out", documents=3)
    values = {"steps": 2, "batch_size": 2} | changes
    return Study(folder / "out", [str(corpus)], [str(held_out)], **values)


def test_every_causal_router_is_compared():
    names = {(each.moe or {}).get("router", "topk") for each in ROUTER_CONTENDERS}
    of_a_model = {"switch", "sparsemixer"}  # to run those; not for new ones
    assert names == {name for name in ROUTER_OPTIONS if ROUTER_OPTIONS[name].causal} - of_a_model


def test_each_contender_runs_and_pays_for_no_more_than_the_dense_one(tmp_path):
    one = small(tmp_path)
    seen = one.run(ROUTER_CONTENDERS, [0], lambda outcome: None)
    assert [outcome.contender for outcome in seen] == [each.name for each in ROUTER_CONTENDERS]
    assert all(math.isfinite(outcome.loss) and outcome.tokens_per_s > 0 for outcome in seen)
    dropped = {outcome.contender: outcome.dropped for outcome in seen}
    assert dropped.pop("top-2, capacity 1.0") > 0
    assert set(dropped.values()) == {0.0}
    for contender in ROUTER_CONTENDERS[1:]:
        moe = model_config(contender).moe
        assert moe.intermediate_size * moe.options.mean_k(moe.top_k) <= 128


def test_an_interrupted_study_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    contenders, seen = ROUTER_CONTENDERS[:2], []

    def interrupt(outcome):
        seen.append(outcome)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path).run(contenders, [0, 1], interrupt)
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"key": [2, 2')  # a kill in the middle of a line
    again = small(tmp_path)
    trained = []
    honest = Study._train
    monkeypatch.setattr(Study, "_train", lambda *args: trained.append(args[1:]) or honest(*args))
    outcomes = again.run(contenders, [0, 1], lambda outcome: None)
    assert [(contender.name, seed) for contender, seed in trained] == [("top-2", 1)]
    assert outcomes[0] == seen[0]
    assert len(small(tmp_path).done) == 4


def test_same_seed_same_loss(tmp_path):
    torch.set_num_threads(1)
    one, two = (small(tmp_path / name).run(ROUTER_CONTENDERS[1:2], [3], lambda _: None)[0] for name in "ab")
    assert one.loss == two.loss


def test_results_of_another_budget_are_refused(tmp_path):
    small(tmp_path).run(ROUTER_CONTENDERS[:1], [0], lambda outcome: None)
    with pytest.raises(FormatError, match="another budget or text"):
        small(tmp_path, steps=3)
    (tmp_path / "out" / "results.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(FormatError, match=r"results\.jsonl is damaged"):
        small(tmp_path)


def test_summary_and_picture(tmp_path):
    outcomes = [Outcome(name, seed, seed + (name == "b"), 0.1, 0.0, 2.0, 100.0) for name in "ba" for seed in range(3)]
    rows = summarise(outcomes)
    assert [row["contender"] for row in rows] == ["a", "b"]
    assert rows[1]["loss"] == 2.0
    assert rows[1]["loss_sd"] == statistics.stdev([1, 2, 3])
    draw(rows, "a study", tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "ROUTER_CONTENDERS", ROUTER_CONTENDERS[:3])
    corpus, held_out = write_corpus(tmp_path / "corpus"), write_corpus(tmp_path / "held out", documents=3)
    flags = ["--out", tmp_path / "out", "--seeds", 2, "--steps", 2, "--batch-size", 2]
    code = cli.main(list(map(str, ["study", "routers", "--data", corpus, "--valid", held_out, *flags, "--json"])))
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert len(result["rows"]) == 3
    assert len(result["outcomes"]) == 6
    dense = next(row for row in result["rows"] if row["contender"] == "dense")
    assert dense["active"] == sum(p.numel() for p in Decoder(model_config(ROUTER_CONTENDERS[0])).parameters())
    assert {"loss", "loss_sd", "balance", "dropped", "mean_k", "tokens_per_s"} <= dense.keys()
    assert Path(result["picture"]).is_file()
    assert cli.main(["study", "routers", "--data", str(corpus)]) == 2
    assert "--data and --valid together" in capsys.readouterr().err
