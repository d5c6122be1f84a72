"""Weights from `Decoder` to disk, in Hugging Face's layout, a shard at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit.errors import UnsupportedError
from moekit.files import file_errors, replacing_folder, write_atomic
from moekit.models.archs import ARCHS, config_to_hf
from moekit.models.decoder import Decoder
from moekit.models.layout import Piece, stored_shape
from moekit.models.safetensors_file import write_safetensors
from moekit.models.weights import INDEX, PACKED_WEIGHTS, SINGLE, stored_tensors

__all__ = ["remove_stale", "save_decoder"]


def save_decoder(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors to `folder`, so that transformers loads them.

    A new folder appears whole or not at all; in one that exists, each file is replaced whole, config.json last,
    and weights of an earlier save are removed.

    Args:
        decoder: plain parameters only.
        folder: where to.
        max_shard_bytes: more than this is written as several files and an index.
        dtype: to store; None keeps each parameter's own.
    Raises:
        UnsupportedError: the layout cannot express the model.
        FileError: it could not be written.
    """
    stored = dtype or decoder.norm.weight.dtype
    values = config_to_hf(decoder.config, str(stored).removeprefix("torch."))
    tensors = _disk_tensors(decoder)
    shards = _shards(tensors, max_shard_bytes, dtype)
    with replacing_folder(folder, last="config.json") as temporary:
        for name, names in shards.items():
            part = {key: tensors[key].tensor() for key in names}
            write_safetensors(temporary / name, part, dtype=dtype, metadata={"format": "pt"})
        if len(shards) > 1:
            write_atomic(temporary / INDEX, _index(tensors, shards, dtype))
        write_atomic(temporary / "generation_config.json", _json(_generation(values)))
        write_atomic(temporary / "config.json", _json(values))
    remove_stale(Path(folder), {*shards, *([INDEX] if len(shards) > 1 else [])})


@dataclass(frozen=True, eq=False)
class _DiskTensor:
    """A tensor as it is stored: the pieces of it that our parameters hold."""

    shape: tuple[int, ...]
    parts: list[tuple[Piece, Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][1].dtype

    def tensor(self) -> Tensor:
        """A view of our parameter, or a copy where it is joined of several."""
        piece, part = self.parts[0]
        if not piece.stored:
            return part.transpose(-1, -2) if piece.transposed else part
        whole = part.new_empty(self.shape)
        for piece, part in self.parts:
            whole[piece.stored] = part.transpose(-1, -2) if piece.transposed else part
        return whole


def _disk_tensors(decoder: Decoder) -> dict[str, _DiskTensor]:
    """What is written under which name, in the decoder's order."""
    layout = ARCHS[decoder.config.arch].hf
    parameters = stored_tensors(decoder)
    with torch.device("meta"):
        expected = stored_tensors(Decoder(decoder.config))
    odd = sorted(parameters.keys() ^ expected.keys())
    if odd:
        raise UnsupportedError(
            f"only a plain decoder is written in Hugging Face layout; this one differs at {odd[0]!r}: "
            "merge adapters and dequantise first"
        )
    found: dict[str, _DiskTensor] = {}
    for name, parameter in parameters.items():
        for piece in layout.pieces(name, decoder.config):
            part, known = parameter.detach()[piece.index], found.get(piece.name)
            shape = stored_shape(piece, part.shape, known.shape if known else None)
            found[piece.name] = _DiskTensor(shape, [*(known.parts if known else []), (piece, part)])
    return found


def _shards(tensors: Mapping[str, _DiskTensor], limit: int, dtype: torch.dtype | None) -> dict[str, list[str]]:
    """File names to the tensors in them: as many in order as fit the limit, at least one."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = _nbytes(tensor, dtype)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _nbytes(tensor: _DiskTensor, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def _index(tensors: Mapping[str, _DiskTensor], shards: Mapping[str, list[str]], dtype: torch.dtype | None) -> str:
    total = sum(_nbytes(tensor, dtype) for tensor in tensors.values())
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _generation(values: Mapping[str, object]) -> dict[str, object]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True, **{key: values[key] for key in keys if values[key] is not None}}


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def remove_stale(folder: Path, kept: set[str]) -> None:
    """Remove weights of an earlier save, which a loader could take for this one's."""
    with file_errors(folder):
        for path in [*folder.glob("model*.safetensors"), *folder.glob(INDEX), *folder.glob(PACKED_WEIGHTS)]:
            if path.name not in kept:
                path.unlink()
