"""`moekit train` and `moekit eval` on a tiny checkpoint: what they write, print and return."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_training import tiny_decoder, write_corpus

from moekit import cli
from moekit.models import load_decoder, save_decoder
from tolerances import rel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Mixtral with a byte-level tokenizer, in Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab | {"<eos>": 256}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    save_decoder(tiny_decoder(), tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def moekit(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict, str]:
    code = cli.main([*map(str, args), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def flags(tmp_path: Path) -> list[object]:
    corpus = write_corpus(tmp_path / "corpus")
    held_out = write_corpus(tmp_path / "held_out", 2)
    data = ["--data.train", corpus, "--data.valid", held_out, "--data.sequence-length", 32]
    return [*data, "--out", tmp_path / "run", "--train.lr", 3e-3, "--train.autocast", "none"]


def test_train_writes_a_model_that_eval_reads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = moekit(capsys, "train", model, *flags(tmp_path), "--train.steps", 6)
    assert code == 0, err
    run = tmp_path / "run"
    assert {"checkpoints", "metrics.jsonl", "model", "routing.png", "tokens"} <= {p.name for p in run.iterdir()}
    assert result["last"]["step"] == 6
    assert "loss" in err
    before = load_decoder(model).get_parameter("layers.0.mlp.router.weight")
    assert not torch.equal(load_decoder(run / "model").get_parameter("layers.0.mlp.router.weight"), before)
    code, measured, err = moekit(
        capsys, "eval", run / "model", "--data", tmp_path / "held_out", "--sequence-length", 32, "--autocast", "none"
    )
    assert code == 0, err
    assert measured["nll"] == pytest.approx(result["valid"]["nll"], rel=rel("fp32 scalar"))
    assert "MaxVio" in err
    assert [layer["layer"] for layer in measured["routing"]] == [0, 1]


def test_the_same_command_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, said in ((3, "text"), (6, "from step 3 of 6")):
        code, result, err = moekit(
            capsys, "train", model, *flags(tmp_path), "--train.steps", steps, "--train.warmup-steps", 0
        )
        assert code == 0, err
        assert said in err
    assert result["steps"] == 6


def test_a_dense_model_trains_without_a_routing_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for old in model.glob("*.safetensors"):
        old.unlink()
    save_decoder(tiny_decoder(moe=None, router_aux_loss_coef=0.0), model)
    code, result, err = moekit(capsys, "train", model, *flags(tmp_path), "--train.steps", 2)
    assert code == 0, err
    assert result["routing"] == []
    assert not (tmp_path / "run" / "routing.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.train", "gone.txt"], "gone.txt: no such file"),
        ([], "no training text"),
        (["--data.train", "CORPUS", "--data.sequence-length", "65"], "context holds 64"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    corpus = str(write_corpus(tmp_path / "corpus"))
    args = [corpus if arg == "CORPUS" else arg for arg in args]
    code, result, _ = moekit(capsys, "train", model, "--out", tmp_path / "run", *args)
    assert code == 2
    assert message in result["error"]


def test_progress_draws_and_disappears() -> None:
    from moekit.commands.progress import TrainingProgress
    from moekit.train import StepMetrics

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    metrics = StepMetrics(1, 2.5, 2.5, 1.25, 3.0, 1e-4, 1.0, 128, 1234.0, 7, 0.5)
    with TrainingProgress(console, 4, title="moe") as progress:
        progress.on_step(metrics)
        progress._progress.refresh()
    shown = screen.getvalue()
    for part in ("moe", "1/4", "loss 2.500", "balance 1.250", "1,234 tokens/s", "7 experts in use"):
        assert part in shown
