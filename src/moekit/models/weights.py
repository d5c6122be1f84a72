"""Weights from disk to `Decoder`, one tensor at a time: safetensors and GGUF.

Loading first compares names and shapes with what the configuration asks for, then fills a decoder that was built
without memory: its peak is the model and one tensor. Weights published in fp8 or mxfp4 become plain on the way
(`dequantise.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekit.config import ModelConfig
from moekit.errors import FileError, FormatError, UnsafeFileError, UnsupportedError, shown
from moekit.files import read_json, stays_inside
from moekit.models.archs import ARCHS, is_packed, read_config
from moekit.models.decoder import Decoder
from moekit.models.dequantise import Scheme
from moekit.models.gguf_archs import GGUF_ARCHS, gguf_config
from moekit.models.gguf_file import GGUFFile
from moekit.models.layout import Layout, Piece, of_expert, stored_shape
from moekit.models.safetensors_file import SafetensorsFile

__all__ = [
    "INDEX",
    "PACKED_WEIGHTS",
    "SINGLE",
    "StoredDecoder",
    "empty_decoder",
    "load_decoder",
    "put",
    "stored_tensors",
]

PACKED_WEIGHTS = "packed.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_LAYERS = 512  # each costs two milliseconds before the first tensor is read
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


Rows = tuple[int, int]
"""[first, last)."""


class Source(Protocol):
    """Tensors on disk: their shapes, and one read at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows | None = None) -> Tensor:
        """A plain float tensor, as it is stored or in `dtype`; of its first axis, one of several, only `rows`."""
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
        put(stored.empty, name, stored.read(name, dtype))
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
            source = _open_folder(path, Scheme.of(read_json(path / "config.json"), f"{path / 'config.json'}"))
            layout = ARCHS[self.config.arch].hf
            self._source = _with_base(source, layout.base)
        self.empty = empty_decoder(self.config, len(self._source.shapes), self._where)
        self._plan = _plan(self.empty, layout, self._source, self._where)
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(self.empty).items()}
        self._buffers = self._shapes.keys() - dict(self.empty.named_parameters())
        self.names = list(self._plan)

    def read(self, name: str, dtype: torch.dtype | None = None, expert: int | None = None) -> Tensor:
        """The tensor `name`, as it is stored (GGUF: float32; fp8 and mxfp4: bfloat16) or in `dtype`; a router's
        buffer always in float32. Of a stack of experts only the matrix of `expert`, where that is given."""
        dtype = torch.float32 if name in self._buffers else dtype
        shape, pieces = self._shapes[name], self._plan[name]
        if expert is not None:
            shape, pieces = shape[1:], list(of_expert(pieces, expert))
        return _assemble(shape, pieces, self._source, self._where, dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        return tuple(self._shapes[name])


def put(decoder: Decoder, name: str, tensor: Tensor) -> None:
    """Make `tensor` the decoder's parameter or buffer of this name."""
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))


def stored_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """What is read and written: parameters, and what routers learn without a gradient."""
    buffers = {name: tensor for name, tensor in decoder.state_dict().items() if isinstance(tensor, Tensor)}
    parameters = dict(decoder.named_parameters())
    return parameters | {name: tensor for name, tensor in buffers.items() if name not in parameters}


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
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parameter in stored_tensors(decoder).items():
        fused = layout.fused_name(name) in source.shapes
        plan[name] = []
        for piece in layout.pieces(name, decoder.config, fused=fused):
            if piece.name not in source.shapes:
                of = f" ({piece.where})" if piece.where else ""
                raise FormatError(f"{where}: the tensor {piece.name!r}{of} is missing")
            wanted[piece.name] = stored_shape(piece, parameter[piece.index].shape, wanted.get(piece.name))
            plan[name].append(piece)
    for name, expected in wanted.items():
        if expected != (found := source.shapes[name]):
            raise FormatError(
                f"{where}: {name!r} has shape {list(found)}, but the configuration asks for {list(expected)}"
            )
    _refuse_extra(decoder, layout, set(source.shapes) - wanted.keys(), where)
    return plan


def _refuse_extra(decoder: Decoder, layout: Layout, extra: set[str], where: str) -> None:
    # A tied head is often stored a second time, and old files carry buffers such as the rotary frequencies.
    tied_head = {layout.outer["head.weight"]} if decoder.head is None else set()
    kept = (name for name in extra - tied_head if not _is_ignored(name, layout, decoder.config))
    left = sorted(map(shown, kept))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise FormatError(
            f"{where}: the configuration has no place for {', '.join(left[:3])}{more}; "
            "the model has more layers or experts than it says, or is of another family"
        )


def _is_ignored(name: str, layout: Layout, config: ModelConfig) -> bool:
    return any(fnmatchcase(name, each.format(layers=config.num_hidden_layers)) for each in layout.ignored)


def _assemble(shape: torch.Size, pieces: list[Piece], source: Source, where: str, dtype: torch.dtype | None) -> Tensor:
    """The parameter that `pieces` make up; one of them is in memory at a time."""
    whole: Tensor | None = None
    last: tuple[tuple[str, Rows | None], Tensor] | None = None  # many pieces may come from one tensor
    for piece in pieces:
        name, rows, inside = _stored_part(piece)
        if last is None or last[0] != (name, rows):
            last = (name, rows), source.read(name, dtype, rows)
        part = last[1][inside]
        part = part.transpose(-1, -2) if piece.transposed else part
        if piece.rotary_heads:
            part = _deinterleave(part, piece.rotary_heads)
        if piece.index == ():
            return part.clone(memory_format=torch.contiguous_format) if piece.stored else part.contiguous()
        if whole is None:
            whole = torch.empty(shape, dtype=part.dtype)
        if part.dtype != whole.dtype:
            raise FormatError(
                f"{where}: {piece.name!r} is {part.dtype}, the experts before it {whole.dtype}: give a dtype"
            )
        whole[piece.index] = part
    assert whole is not None
    return whole


def _stored_part(piece: Piece) -> tuple[str, Rows | None, tuple[int | slice, ...]]:
    """The tensor on disk, which rows of it are read, and what to index those with."""
    if piece.one_of is not None:
        return piece.name, (piece.one_of, piece.one_of + 1), (0, *piece.stored[1:])
    first = piece.stored[0] if piece.stored else slice(None)
    if first.stop is None or first.step is not None:
        return piece.name, None, piece.stored
    return piece.name, (first.start, first.stop), (slice(None), *piece.stored[1:])


def _deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order (pairs of rows side by side in each head): back to first half, second half."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


class _GGUFSource:
    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows | None = None) -> Tensor:
        return torch.from_numpy(self.file.read(name, rows)).to(dtype or torch.float32)


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

    def stored(self, name: str, rows: Rows | None = None) -> Tensor:
        return self.home[name].read(name, rows)

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows | None = None) -> Tensor:
        kind = self.tensors[name].dtype
        if kind not in _FLOATS:
            path = self.home[name].path
            raise UnsupportedError(f"{path}: {shown(name)} is stored as {kind}; moekit loads plain floats")
        return self.stored(name, rows).to(dtype or kind)


class _Dequantised:
    """The same, where some make up others; those are read together and bfloat16 unless told otherwise."""

    def __init__(self, source: _SafetensorsSource, scheme: Scheme, where: str) -> None:
        self._source, self._recipes = source, scheme.plan(source.tensors, where)
        used = {part for recipe in self._recipes.values() for part in recipe.parts}
        self.shapes = {name: shape for name, shape in source.shapes.items() if name not in used}
        self.shapes |= {name: recipe.shape for name, recipe in self._recipes.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows | None = None) -> Tensor:
        recipe = self._recipes.get(name)
        if recipe is None:
            return self._source.read(name, dtype, rows)
        parts = [self._source.stored(part, rows if recipe.stack else None) for part in recipe.parts]
        whole = recipe.make(*parts, dtype=dtype or torch.bfloat16)
        return whole if recipe.stack or rows is None else whole[slice(*rows)]


class _Prefixed:
    """A source whose names all lack `base`."""

    def __init__(self, source: Source, base: str) -> None:
        self._source, self._base = source, base
        self.shapes = {base + name: shape for name, shape in source.shapes.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows | None = None) -> Tensor:
        return self._source.read(name.removeprefix(self._base), dtype, rows)


def _with_base(source: Source, base: str) -> Source:
    return source if any(name.startswith(base) for name in source.shapes) else _Prefixed(source, base)


def _open_folder(folder: Path, scheme: Scheme | None) -> Source:
    if (folder / SINGLE).exists():
        source = _SafetensorsSource([SafetensorsFile(stays_inside(folder, SINGLE))])
    elif (folder / INDEX).exists():
        source = _open_index(stays_inside(folder, INDEX), folder)
    else:
        raise FileError(f"{folder} has no {SINGLE} and no {INDEX}")
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
