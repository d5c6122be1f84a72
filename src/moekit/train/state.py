"""Checkpoints of a run: folders that are whole or not there, without pickle, and checked before they are believed.

    run_dir/checkpoints/step-000123/
        model.safetensors       the fp32 master weights
        optimizer.safetensors   AdamW's moments, torch's RNG state, the routing counts so far
        state.json              step, configurations, data fingerprint, and the SHA-256 of the other two

The newest two are kept. A damaged one is passed over with a warning that names it and what is wrong; if none
is whole, loading fails, because starting over without a word would throw the run away.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.config import ModelConfig, TrainConfig
from moekit.errors import ConfigError, FormatError
from moekit.files import replacing_folder

__all__ = ["Checkpoint", "RunIdentity", "load_newest", "restore", "save_checkpoint"]

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
FREE = {"steps", "save_every", "eval_every", "log_every", "tensorboard", "checkpointing"}
"""Fields of TrainConfig that a resumed run may change: none of them alters what is learned from a step."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a run to go on from a checkpoint."""

    train: TrainConfig
    model: ModelConfig
    data: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For state.json."""
        return {
            "train": dataclasses.asdict(self.train),
            "model": dataclasses.asdict(self.model),
            "data": dict(self.data),
        }

    def check(self, saved: Mapping[str, Any], where: Path) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ConfigError: names the first field that differs, both values, and the way out.
        """
        # Through JSON, so that tuples compare equal to the lists they became.
        mine = json.loads(json.dumps(self.as_dict()))
        for part, fields in mine.items():
            for name, value in fields.items():
                before = saved[part].get(name)
                if before != value and not (part == "train" and name in FREE):
                    raise ConfigError(
                        f"{part}.{name} is {value!r} but the run in {where.parent.parent} has {before!r}: "
                        "give the same value, or another folder to start a new run"
                    )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A whole checkpoint, read and verified."""

    path: Path
    step: int
    identity: Mapping[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    @property
    def routing(self) -> dict[str, Tensor]:
        """The monitor's state, as it was given to `save_checkpoint`."""
        prefix = "routing."
        return {name.removeprefix(prefix): t for name, t in self.optimizer.items() if name.startswith(prefix)}


def save_checkpoint(
    run_dir: Path,
    step: int,
    identity: RunIdentity,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    routing: Mapping[str, Tensor],
) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest two. Returns its folder.

    Raises:
        FileError: it could not be written (a full disk, say); earlier checkpoints are untouched.
    """
    final = _folder(run_dir) / f"step-{step:06d}"
    files = {
        "model.safetensors": dict(model.state_dict()),
        "optimizer.safetensors": _optimizer_tensors(model, optimizer)
        | {"rng": torch.get_rng_state()}
        | {f"routing.{name}": tensor for name, tensor in routing.items()},
    }
    with replacing_folder(final, last="state.json") as folder:
        digests = {name: _write(folder / name, tensors) for name, tensors in files.items()}
        state = {"step": step, "sha256": digests} | identity.as_dict()
        (folder / "state.json").write_text(json.dumps(state, indent=1))
    for old in _checkpoints(run_dir)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None for a run that has none at all.

    Raises:
        FormatError: there are checkpoints, but every one is damaged.
    """
    for leftover in _folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = _checkpoints(run_dir)
    for folder in folders:
        try:
            return _read(folder)
        except FormatError as error:
            log.warning("%s: falling back to an older checkpoint", error)
    if folders:
        raise FormatError(f"no checkpoint in {_folder(run_dir)} is whole: remove that folder to start the run over")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights, the moments and torch's RNG back.

    Raises:
        ConfigError: the model has other tensors, or trains other ones, than the checkpoint.
    """
    _match(model.state_dict(), checkpoint.model, "weights")
    names = _trained(model, optimizer)
    wanted = {f"{moment}.{name}": parameter for name, parameter in names.items() for moment in MOMENTS}
    moments = {key: value for key, value in checkpoint.optimizer.items() if key.split(".")[0] in MOMENTS}
    _match(wanted, moments, "trained weights")
    model.load_state_dict(dict(checkpoint.model))
    for name, parameter in names.items():
        state: dict[str, Tensor] = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
        optimizer.state[parameter] = state | {"step": torch.tensor(float(checkpoint.step))}
    torch.set_rng_state(checkpoint.optimizer["rng"])


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(_folder(run_dir).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _trained(model, optimizer)
    return {f"{moment}.{name}": optimizer.state[p][moment] for name, p in names.items() for moment in MOMENTS}


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    try:
        save_file(tensors, path)
    except safetensors.SafetensorError as error:
        # The library's own error hides the operating system's, a full disk above all.
        raise OSError(_errno_of(error), str(error)) from error
    return _digest(path)


def _errno_of(error: Exception) -> int:
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, digest in state["sha256"].items():
            if _digest(folder / name) != digest:
                raise FormatError(f"{folder / name} is damaged: its SHA-256 is not the recorded one")
        model, optimizer = (load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors"))
        identity = {part: state[part] for part in ("train", "model", "data")}
        return Checkpoint(folder, int(state["step"]), identity, model, optimizer)
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise FormatError(f"{folder} is damaged ({type(error).__name__}: {error})") from error


def _match(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    for name in sorted(set(mine) | set(saved)):
        here, there = (tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (mine, saved))
        if here != there:
            raise ConfigError(f"the model's {what} differ from the checkpoint's: {name} is {here} here, {there} there")
