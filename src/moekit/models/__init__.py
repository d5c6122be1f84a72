"""Models: one decoder, the rows of architectures it reads and writes, weights and tokenizers.

Names are imported when first used, so that `moekit plan` reads configurations without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ARCHS": "families",
    "Arch": "families",
    "Decoder": "decoder",
    "DecoderOutput": "decoder",
    "Features": "decoder",
    "GGUFFile": "gguf_file",
    "KVCache": "cache",
    "SafetensorsFile": "safetensors_file",
    "StoredDecoder": "weights",
    "TextStream": "tokenizer",
    "Tokenizer": "tokenizer",
    "load_decoder": "weights",
    "load_tokenizer": "tokenizer",
    "read_config": "archs",
    "save_decoder": "weights_write",
    "tokenizer_metadata": "gguf_tokenizer",
    "write_config": "archs",
    "write_gguf": "gguf_write",
    "write_safetensors": "safetensors_file",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moekit.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moekit.models.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
