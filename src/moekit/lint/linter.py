"""`lint`: tells what kind of configuration a mapping is, and has its mistakes found.

It reads a transformers config.json of any family, a PEFT adapter's configuration, or one of our own configurations as
JSON (an `MoEConfig`, a `ModelConfig`, an `UpcycleConfig`, a `TrainConfig`, or the state.json of a checkpoint, which
says both the model and how it is trained).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moekit.config import TrainConfig
from moekit.errors import FileError, FormatError
from moekit.files import read_json
from moekit.lint import ours, stored, theirs
from moekit.lint.findings import Finding

__all__ = ["lint", "lint_file"]

_TRAIN = {field.name for field in fields(TrainConfig)}


def lint_file(path: str | os.PathLike[str]) -> list[Finding]:
    """The findings of a model folder, the headers of its weights included, or of a JSON file that `lint` knows.

    Raises:
        FileError: there is no such file, or the folder has no config.json.
        FormatError: it is not JSON, or not a configuration; or a file of weights lies about itself.
    """
    path = Path(path)
    if not path.is_dir():
        return lint(read_json(path), source=str(path))
    file = next((path / name for name in ("config.json", "adapter_config.json") if (path / name).exists()), None)
    if file is None:
        raise FileError(f"{path} has no config.json: give a model folder, or a JSON file")
    return _sorted([*lint(read_json(file), source=str(file)), *stored.of_folder(path)])


def lint(values: Mapping[str, Any], *, source: str = "configuration") -> list[Finding]:
    """The findings of a configuration, errors first.

    Raises:
        FormatError: the mapping is no configuration of a kind that is known.

    >>> mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 1}
    >>> [finding.name for finding in lint(mixtral | {"router_aux_loss_coef": 0.02})]
    ['k1_renormalised', 'aux_switched_off']
    """
    keys = values.keys()
    if "model_type" in keys:
        found = theirs.of_model(values)
    elif "peft_type" in keys:
        found = theirs.of_adapter(values)
    elif {"train", "model"} <= keys:
        found = ours.of_run(values["model"], values["train"], source)
    elif {"num_hidden_layers", "arch"} <= keys:
        found = ours.of_run(values, {}, source)
    elif {"hidden_size", "num_experts", "top_k"} <= keys:
        found = ours.of_layer(values, source)
    elif {"method", "num_experts"} <= keys:
        found = ours.of_upcycling(values, source)
    elif keys and keys <= _TRAIN:
        found = ours.of_training(values, source)
    else:
        raise FormatError(
            f"{source} is no configuration of transformers or PEFT, no MoEConfig, ModelConfig, UpcycleConfig or "
            "TrainConfig, and no checkpoint's state"
        )
    return _sorted(list(found))


def _sorted(found: list[Finding]) -> list[Finding]:
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))
