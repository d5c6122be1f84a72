"""Checkpoints: killed runs go on bit for bit, damage is told, other runs are refused, a full disk costs nothing."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import tiny_data, tiny_decoder

from moekit.config import TrainConfig
from moekit.errors import ConfigError, FileError, FormatError
from moekit.train import Trainer, TrainingData
from moekit.train import state as state_module

STEPS = 24
CHILD = """
import sys, time, torch
from pathlib import Path
from tiny_training import tiny_data, tiny_decoder
from moekit.config import TrainConfig
from moekit.train import Trainer
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def told(metrics):
    print(metrics.step, flush=True)
    time.sleep(0.01)
config = TrainConfig(steps=24, lr=3e-3, batch_size=3, save_every=3, autocast=sys.argv[2])
Trainer(tiny_decoder(), tiny_data(folder), config, folder / "run", on_step=told).run()
"""


def config(**changes: object) -> TrainConfig:
    values = {"steps": STEPS, "lr": 3e-3, "batch_size": 3, "save_every": 3, "autocast": "none"}
    return TrainConfig(**(values | changes))


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_s"]
    return lines


def child(folder: Path, autocast: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), autocast],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_killed_anywhere_and_resumed_gives_the_same_bits(tmp_path: Path, autocast: str) -> None:
    """Also across epochs: 24 steps of 3 rows are one and a half times the corpus."""
    data, step = tiny_data(tmp_path), random.SystemRandom().randint(1, STEPS - 2)
    assert len(data.train) < STEPS * 3
    with child(tmp_path, autocast) as process:
        for line in process.stdout:
            if int(line) == step:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    resumed = Trainer(tiny_decoder(), data, config(autocast=autocast), tmp_path / "run")
    assert step - 3 <= resumed.step <= STEPS
    whole = Trainer(tiny_decoder(), data, config(autocast=autocast), tmp_path / "whole")
    first, second = resumed.run(), whole.run()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole"), f"killed at step {step}"
    assert torch.equal(first.routing.chosen_ME, second.routing.chosen_ME)
    assert first.routing.totals()[0].tokens == second.routing.totals()[0].tokens > 0
    for (name, mine), theirs in zip(resumed.decoder.named_parameters(), whole.decoder.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def run_to(data: TrainingData, folder: Path, steps: int = 6) -> None:
    Trainer(tiny_decoder(), data, config(steps=steps), folder).run()


def test_the_newest_two_are_kept_without_pickle(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path, steps=10)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-000009", "step-000010"]
    assert sorted(f.name for f in folders[0].iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    data: TrainingData, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    run_to(data, tmp_path)
    newest = tmp_path / "checkpoints" / "step-000006"
    model, state = newest / "model.safetensors", newest / "state.json"
    raw = bytearray(model.read_bytes())
    if damage == "truncate":
        model.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[-5] ^= 1
        model.write_bytes(raw)
    elif damage == "missing":
        model.unlink()
    else:
        state.write_text(state.read_text()[:40])
    with caplog.at_level(logging.WARNING):
        assert Trainer(tiny_decoder(), data, config(steps=6), tmp_path).step == 3
    assert "step-000006" in caplog.text
    assert "older checkpoint" in caplog.text


def test_when_none_is_whole_it_says_so(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"no checkpoint in .* is whole"):
        Trainer(tiny_decoder(), data, config(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"train\.lr is 0\.001 but the run in .* has 0\.003"),
        ({"batch_size": 4}, r"train\.batch_size"),
        ({"seed": 4}, r"train\.seed"),
        ({"steps": 5}, r"train\.steps is 5 but 6 are done"),
    ],
)
def test_another_configuration_is_refused(data: TrainingData, tmp_path: Path, changes: dict, message: str) -> None:
    run_to(data, tmp_path)
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny_decoder(), data, config(**({"steps": 6} | changes)), tmp_path)


def test_another_corpus_or_model_is_refused(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.seed"):
        Trainer(tiny_decoder(), tiny_data(tmp_path, seed=3), config(), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.fingerprint"):
        Trainer(tiny_decoder(), tiny_data(tmp_path / "other", documents=20), config(), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.num_hidden_layers is 3"):
        Trainer(tiny_decoder(num_hidden_layers=3), data, config(), tmp_path)
    frozen = tiny_decoder()
    frozen.embed.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"trained weights differ.*embed\.weight"):
        Trainer(frozen, data, config(), tmp_path)


def test_what_changes_nothing_learned_may_change(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path)
    result = Trainer(tiny_decoder(), data, config(steps=8, save_every=5, checkpointing="block"), tmp_path).run()
    assert result.steps == 8
    again = Trainer(tiny_decoder(), data, config(steps=8), tmp_path).run()
    assert again.last is None


def test_save_every_0_writes_none_at_the_end(data: TrainingData, tmp_path: Path) -> None:
    Trainer(tiny_decoder(), data, config(steps=2, save_every=0), tmp_path).run()
    assert not (tmp_path / "checkpoints").exists()


def test_metrics_are_cut_to_the_checkpoint(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path, steps=6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0, "tokens_per_s": 1.0}\n{"step": 8, "lo')
    Trainer(tiny_decoder(), data, config(steps=7), tmp_path).run()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 8))
    assert metrics(tmp_path)[-1]["loss"] != 1.0


def no_space(tensors: dict, path: Path) -> None:
    """What safetensors says on a full disk, word for word."""
    Path(path).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@contextmanager
def small_files() -> Iterator[None]:
    """The system refuses to write more than 20 kB to a file; the model's weights are 50."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("full", "message"), [(True, "the disk is full"), (False, "cannot write .*File too large")])
def test_a_checkpoint_that_cannot_be_written_costs_no_other(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, message: str
) -> None:
    run_to(data, tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    trainer = Trainer(tiny_decoder(), data, config(steps=9), tmp_path)
    if full:
        monkeypatch.setattr(state_module, "save_file", no_space)
    with pytest.raises(FileError, match=message), nullcontext() if full else small_files():
        trainer.run()
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before


def test_leftovers_of_a_kill_are_removed(data: TrainingData, tmp_path: Path) -> None:
    run_to(data, tmp_path)
    leftover = tmp_path / "checkpoints" / ".step-000009.abcd.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    Trainer(tiny_decoder(), data, config(steps=6), tmp_path)
    assert not leftover.exists()
