"""Weights between disk and `Decoder`, one tensor at a time: safetensors both ways, GGUF in.

Loading first compares names and shapes with what the configuration asks for, then fills a decoder that was built
without memory: its peak is the model and one tensor. Weights published in fp8 or mxfp4 become plain on the way
(`dequantise.py`). Saving writes Hugging Face's layout the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekit.config import ModelConfig
from moekit.errors import FileError, FormatError, UnsafeFileError, UnsupportedError, shown
from moekit.files import file_errors, read_json, replacing_folder, stays_inside, write_atomic
from moekit.models.archs import ARCHS, config_to_hf, is_packed, read_config
from moekit.models.decoder import Decoder
from moekit.models.dequantise import Scheme
from moekit.models.gguf_archs import GGUF_ARCHS, gguf_config
from moekit.models.gguf_file import GGUFFile
from moekit.models.layout import Layout, Piece
from moekit.models.safetensors_file import SafetensorsFile, write_safetensors

__all__ = ["PACKED_WEIGHTS", "StoredDecoder", "empty_decoder", "load_decoder", "remove_stale", "save_decoder"]

PACKED_WEIGHTS = "packed.safetensors"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_LAYERS = 512  # each costs two milliseconds before the first tensor is read
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


class Source(Protocol):
    """Tensors on disk: their shapes, and one read at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A plain float tensor, as it is stored or in `dtype`."""
        ...


def load_decoder(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Decoder:
    """The model at `path`: a folder in Hugging Face layout (safetensors), or a .gguf file.

    Args:
        path: the folder or file.
        dtype: of every parameter; None keeps each as it is stored (GGUF: float32; fp8 and mxfp4: bfloat16).
    Returns:
        A decoder in evaluation mode on the CPU.
    Raises:
        FileError: something is missing or unreadable.
        FormatError: the files contradict themselves or the configuration; the message names the tensor.
        UnsafeFileError: there is only a pickle, or the index points out of the folder.
        UnsupportedError: the model is packed (`moekit.load` opens those), or as `read_config` has it.
        UnknownNameError: see `read_config`.
    """
    stored = StoredDecoder(path)
    for name in stored.names:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(stored.read(name, dtype))
        setattr(stored.empty.get_submodule(owner), leaf, parameter)
    return stored.empty.eval()


class StoredDecoder:
    """A model on disk whose names and shapes have been compared with its configuration, and that is read in parts.

    Args:
        path: as `load_decoder` takes it; it raises what that raises.

    Attributes:
        config: its configuration.
        empty: a decoder of that configuration without memory (on torch's meta device).
        names: of all parameters, in the decoder's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self._where = str(path)
        self._source: Source
        if path.suffix == ".gguf":
            file = GGUFFile(path)
            self.config, self._source = gguf_config(file), _GGUFSource(file)
            layout = GGUF_ARCHS[self.config.arch].layout
        else:
            _refuse_pickle(path)
            self.config = read_config(path)
            if is_packed(path):
                raise UnsupportedError(f"{path} is packed by moekit: this needs the unquantised model")
            self._source = _open_folder(path, Scheme.of(read_json(path / "config.json"), f"{path / 'config.json'}"))
            layout = ARCHS[self.config.arch].hf
        self.empty = empty_decoder(self.config, len(self._source.shapes), self._where)
        self._plan = _plan(self.empty, layout, self._source, self._where)
        self._shapes = {name: parameter.shape for name, parameter in self.empty.named_parameters()}
        self.names = list(self._plan)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter `name`, as it is stored (GGUF: float32; fp8 and mxfp4: bfloat16) or in `dtype`."""
        return _assemble(self._shapes[name], self._plan[name], self._source, self._where, dtype)


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
    config = decoder.config
    tensors = dict(_disk_tensors(decoder))
    stored = dtype or decoder.embed.weight.dtype
    values = config_to_hf(config, str(stored).removeprefix("torch."))
    shards = _shards(tensors, max_shard_bytes, dtype)
    with replacing_folder(folder, last="config.json") as temporary:
        for name, names in shards.items():
            part = {key: tensors[key] for key in names}
            write_safetensors(temporary / name, part, dtype=dtype, metadata={"format": "pt"})
        if len(shards) > 1:
            write_atomic(temporary / _INDEX, _index(tensors, shards, dtype))
        write_atomic(temporary / "generation_config.json", _json(_generation(values)))
        write_atomic(temporary / "config.json", _json(values))
    remove_stale(Path(folder), {*shards, *([_INDEX] if len(shards) > 1 else [])})


def empty_decoder(config: ModelConfig, num_tensors: int, where: str) -> Decoder:
    """A decoder without memory; sizes that the files cannot back are refused before it is built."""
    if config.num_hidden_layers > min(num_tensors, _MAX_LAYERS):
        raise FormatError(
            f"{where}: the configuration asks for {config.num_hidden_layers} layers, "
            f"but there are only {num_tensors} tensors, and no model has more than {_MAX_LAYERS} layers"
        )
    try:
        with torch.device("meta"), _Uninitialised():
            return Decoder(config)
    except RuntimeError as error:
        raise FormatError(f"{where}: a model of these sizes cannot exist: {str(error).splitlines()[0]}") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves new parameters as they are. Without memory there is nothing to fill, and the first random draw of that
    kind would import PyTorch's compiler: 1.3 s of every process that loads a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _plan(decoder: Decoder, layout: Layout, source: Source, where: str) -> dict[str, list[Piece]]:
    """Every parameter's pieces, after checking that the files hold exactly those, in the right shapes."""
    plan: dict[str, list[Piece]] = {}
    used: set[str] = set()
    for name, parameter in decoder.named_parameters():
        fused = layout.fused_name(name) in source.shapes
        plan[name] = []
        for piece in layout.pieces(name, decoder.config, fused=fused):
            if piece.name not in source.shapes:
                of = f" ({piece.where})" if piece.where else ""
                raise FormatError(f"{where}: the tensor {piece.name!r}{of} is missing")
            expected, found = tuple(parameter[piece.index].shape), source.shapes[piece.name]
            if expected != found:
                raise FormatError(
                    f"{where}: {piece.name!r} has shape {list(found)}, but the configuration asks for {list(expected)}"
                )
            plan[name].append(piece)
            used.add(piece.name)
    _refuse_extra(decoder, layout, set(source.shapes) - used, where)
    return plan


def _refuse_extra(decoder: Decoder, layout: Layout, extra: set[str], where: str) -> None:
    # A tied head is often stored a second time, and old Llama files carry the rotary frequencies.
    tied_head = {layout.outer["head.weight"]} if decoder.head is None else set()
    left = sorted(shown(name) for name in extra - tied_head if not name.endswith("rotary_emb.inv_freq"))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise FormatError(
            f"{where}: the configuration has no place for {', '.join(left[:3])}{more}; "
            "the model has more layers or experts than it says, or is of another family"
        )


def _assemble(shape: torch.Size, pieces: list[Piece], source: Source, where: str, dtype: torch.dtype | None) -> Tensor:
    """The parameter that `pieces` make up; one of them is in memory at a time."""
    whole: Tensor | None = None
    for piece in pieces:
        part = source.read(piece.name, dtype)
        if piece.rotary_heads:
            part = _deinterleave(part, piece.rotary_heads)
        if piece.index == ():
            return part.contiguous()
        if whole is None:
            whole = torch.empty(shape, dtype=part.dtype)
        if part.dtype != whole.dtype:
            raise FormatError(
                f"{where}: {piece.name!r} is {part.dtype}, the experts before it {whole.dtype}: give a dtype"
            )
        whole[piece.index] = part
    assert whole is not None
    return whole


def _deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order (pairs of rows side by side in each head): back to first half, second half."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


class _GGUFSource:
    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(self.file.read(name)).to(dtype or torch.float32)


class _SafetensorsSource:
    """The tensors of one or many safetensors files."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self.home: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.home:
                    raise FormatError(f"tensor {shown(name)} is in both {self.home[name].path} and {file.path}")
                self.home[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self.home.items()}
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def stored(self, name: str) -> Tensor:
        return self.home[name].read(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        kind = self.tensors[name].dtype
        if kind not in _FLOATS:
            path = self.home[name].path
            raise UnsupportedError(f"{path}: {shown(name)} is stored as {kind}; moekit loads plain floats")
        return self.stored(name).to(dtype or kind)


class _Dequantised:
    """The same, where some make up others; those are read together and bfloat16 unless told otherwise."""

    def __init__(self, source: _SafetensorsSource, scheme: Scheme, where: str) -> None:
        self._source, self._recipes = source, scheme.plan(source.tensors, where)
        used = {part for recipe in self._recipes.values() for part in recipe.parts}
        self.shapes = {name: shape for name, shape in source.shapes.items() if name not in used}
        self.shapes |= {name: recipe.shape for name, recipe in self._recipes.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        recipe = self._recipes.get(name)
        if recipe is None:
            return self._source.read(name, dtype)
        return recipe.make(*map(self._source.stored, recipe.parts), dtype=dtype or torch.bfloat16)


def _open_folder(folder: Path, scheme: Scheme | None) -> Source:
    if (folder / _SINGLE).exists():
        source = _SafetensorsSource([SafetensorsFile(stays_inside(folder, _SINGLE))])
    elif (folder / _INDEX).exists():
        source = _open_index(stays_inside(folder, _INDEX), folder)
    else:
        raise FileError(f"{folder} has no {_SINGLE} and no {_INDEX}")
    return _Dequantised(source, scheme, str(folder)) if scheme else source


def _open_index(path: Path, folder: Path) -> _SafetensorsSource:
    """The shards that the index at `path` lists; they must hold exactly the tensors it lists, each once."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{path}: weight_map must map tensors to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise UnsafeFileError(f"{path} names {shown(shard)}; only .safetensors files are opened")
    source = _SafetensorsSource([SafetensorsFile(folder / shard) for shard in shards if stays_inside(folder, shard)])
    for name in sorted({*weight_map, *source.home}):
        listed, found = weight_map.get(name), source.home[name].path.name if name in source.home else None
        if listed != found:
            raise FormatError(
                f"{path}: tensor {shown(name)} is listed in {shown(listed) if listed else 'no file'} "
                f"but stored in {shown(found) if found else 'none'}"
            )
    return source


def _refuse_pickle(path: Path) -> None:
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise UnsafeFileError(f"{path / pickles[0]} is a pickle, which can run code; convert it to safetensors")
    elif path.suffix in _PICKLES:
        raise UnsafeFileError(f"{path} is a pickle, which can run code; convert it to safetensors")
    elif path.is_file():
        raise FileError(f"{path}: give the folder that holds config.json and the weights, or a .gguf file")


def _disk_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Names on disk and views of the parameters, in the decoder's order."""
    layout = ARCHS[decoder.config.arch].hf
    parameters = dict(decoder.named_parameters())
    with torch.device("meta"):
        expected = dict(Decoder(decoder.config).named_parameters())
    odd = sorted(parameters.keys() ^ expected.keys())
    if odd:
        raise UnsupportedError(
            f"only a plain decoder is written in Hugging Face layout; this one differs at {odd[0]!r}: "
            "merge adapters and dequantise first"
        )
    for name, parameter in parameters.items():
        for piece in layout.pieces(name, decoder.config):
            yield piece.name, parameter.detach()[piece.index]


def _shards(tensors: Mapping[str, Tensor], limit: int, dtype: torch.dtype | None) -> dict[str, list[str]]:
    """File names to the tensors in them: as many in order as fit the limit, at least one."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]], dtype: torch.dtype | None) -> str:
    total = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())
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
        for path in [*folder.glob("model*.safetensors"), *folder.glob(_INDEX), *folder.glob(PACKED_WEIGHTS)]:
            if path.name not in kept:
                path.unlink()
