"""A model's `config.json` read and written, by the row of its family (`models.families`).

Names and numbers, no tensors: torch is never imported here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.config import ModelConfig
from moekit.errors import ConfigError, FileError, FormatError
from moekit.files import read_json, write_atomic
from moekit.models.families import ARCHS, Arch
from moekit.models.families.common import read_rope, write_rope
from moekit.models.gguf_archs import gguf_config
from moekit.models.gguf_file import GGUFFile
from moekit.models.keys import ACTIVATION_NAMES, Keys, packed_by_us, refuse_inexpressible, refuse_unread

__all__ = ["ARCHS", "Arch", "config_from_hf", "config_to_hf", "is_packed", "read_config", "write_config"]


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of the model at `path`: a folder with config.json, that file itself, or a .gguf file.

    Raises:
        FileError: there is no such file.
        FormatError: a key is missing or has a value of the wrong kind.
        UnknownNameError: a family that `ARCHS` does not hold.
        UnsupportedError: the model has something that the decoder would compute wrongly.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_config(GGUFFile(path))
    if path.is_dir() and not (path / "config.json").exists():
        raise FileError(f"{path} has no config.json: give a folder in Hugging Face layout, or a .gguf file")
    file = path / "config.json" if path.is_dir() else path
    return config_from_hf(read_json(file), str(file))


def config_from_hf(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The configuration that the keys of config.json say; `source` is what errors call it. Raises as `read_config`."""
    arch = ARCHS[Keys(values, source).values.get("model_type") or "(no model_type)"]
    keys = Keys(values, source, arch.defaults, arch.names)
    if keys.whole("num_hidden_layers") > _MAX_LAYERS:
        raise FormatError(f"{source}: num_hidden_layers must be at most {_MAX_LAYERS}")
    try:
        config = ModelConfig(**{"arch": arch.model_type, **_common(keys), **arch.read(keys)})
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None
    refuse_unread(keys)
    return config


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether the folder at `path` holds a model that `moekit pack` wrote, as its config.json says."""
    file = Path(path) / "config.json"
    return file.exists() and packed_by_us(read_json(file))


def write_config(config: ModelConfig, folder: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Write `folder`/config.json so that transformers loads it, naming `dtype` as the weights' own.

    Raises:
        UnsupportedError: the family cannot express the model; the message names the fields.
        FileError: it could not be written.
    """
    import json

    write_atomic(Path(folder) / "config.json", json.dumps(config_to_hf(config, dtype), indent=2) + "\n")


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The keys and values of config.json. Raises `UnsupportedError` as `write_config` does."""
    arch = ARCHS[config.arch]
    eos = config.eos_token_ids
    common = {
        **{key: getattr(config, key) for key in _SAME},
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "rope_theta": config.rope_theta,
        "rope_parameters": write_rope(config),
    }
    values = {
        "architectures": [arch.architecture],
        "model_type": arch.model_type,
        "dtype": dtype,
        **{arch.names.get(key, key): value for key, value in common.items() if key not in arch.absent},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        "pad_token_id": config.pad_token_id,
        **arch.write(config),
    }
    refuse_inexpressible(config, config_from_hf(values, "config.json"))
    return values


_MAX_LAYERS = 10_000  # layers are counted out one by one, so a lying number must not get that far
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def _common(keys: Keys) -> dict[str, Any]:
    """The fields that every family has."""
    heads = keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", keys.whole("hidden_size") // max(heads, 1))
    return {
        "vocab_size": keys.whole("vocab_size"),
        "hidden_size": keys.whole("hidden_size"),
        "num_hidden_layers": keys.whole("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("max_position_embeddings"),
        **read_rope(keys, head_dim),
        "activation": keys.activation(),
        "rms_norm_eps": keys.real("rms_norm_eps"),
        "tie_word_embeddings": keys.flag("tie_word_embeddings"),
        "bos_token_id": keys.token("bos_token_id"),
        "eos_token_ids": keys.tokens("eos_token_id"),
        "pad_token_id": keys.token("pad_token_id"),
    }
