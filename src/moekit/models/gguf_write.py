"""Models to GGUF files, one parameter in memory at a time, in the block formats of llama.cpp.

The header is the `gguf` package's work; the data is written here in pieces of a few megabytes, because its writer takes
whole tensors and quantises 16 rows at a time in numpy. Norms, biases and routers stay F32, as llama.cpp expects them.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.files import replacing
from moekit.kernels.formats import Format, Packed, integers, pack, unpack
from moekit.kernels.quant import Matrices
from moekit.models.decoder import Decoder
from moekit.models.gguf_archs import GGUF_ARCHS, gguf_metadata
from moekit.models.layout import Piece

__all__ = ["GGUFType", "Written", "write_gguf"]

GGUFType = Literal["f32", "f16", "q8_0", "q4_0"]

_ALIGNMENT = 32
_BLOCK = 32
_FORMATS = {"Q8_0": Format("int8", _BLOCK), "Q4_0": Format("int4", _BLOCK)}
_CHUNK = 1 << 18
"""Elements that are converted and written at once: their temporaries stay in cache."""


Value = Tensor | list[Packed]
"""A parameter: plain, or packed matrices, which are the experts where there are several."""


class Source(Protocol):
    """A model whose parameters can be read one by one: a `StoredDecoder`, or a `Decoder` in memory."""

    config: ModelConfig

    def read(self, name: str) -> Value: ...


@dataclass(frozen=True)
class Written:
    """What `write_gguf` wrote.

    Attributes:
        nbytes: of the file.
        tensors: their numbers by the name of their type.
        parameters: numbers in all of them.
        rounded_twice: names of tensors that were packed in a format which their type does not hold as it is.
    """

    nbytes: int
    tensors: Mapping[str, int]
    parameters: int
    rounded_twice: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: the piece of our parameter it holds, its shape there, its type and size."""

    piece: Piece
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    nbytes: int


def write_gguf(
    model: Source | Decoder,
    path: str | os.PathLike[str],
    kind: GGUFType,
    *,
    vocabulary: GGUFType | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write `model` to the file `path`, which appears whole or not at all.

    Matrices that are packed as int8 become Q8_0, and those of symmetric int4 become Q4_0, with the same codes: larger
    groups repeat their scale. Plain ones are rounded by the same rule, that of `kernels.formats` (and of ggml).

    Args:
        model: a decoder, or a stored one that is read parameter by parameter.
        kind: type of the matrices.
        vocabulary: type of embedding and head; None is Q8_0 where `kind` is quantised, else `kind`.
        tokenizer: from `tokenizer_metadata`; None says that the file has no vocabulary.
        progress: called with (bytes of tensors written, in all).
    Raises:
        UnsupportedError: llama.cpp has no architecture for the model.
        ConfigError: rows that do not divide into the type's blocks, or numbers that it does not hold.
        FileError: the file could not be written.
    """
    source = _InMemory(model) if isinstance(model, Decoder) else model
    vocabulary = vocabulary or ("q8_0" if kind in _QUANTISED else kind)
    metadata = {
        **(tokenizer or {"tokenizer.ggml.model": "no_vocab"}),
        **gguf_metadata(source.config),
        "general.file_type": int(_FILE_TYPES[kind]),
        **({"general.quantization_version": 2} if {kind, vocabulary} & _QUANTISED else {}),
    }
    plan = _plan(source.config, kind, vocabulary)
    tensors = [tensor for group in plan.values() for tensor in group]
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    rounded_twice: list[str] = []
    with replacing(path) as temporary:
        _write_header(temporary, metadata, tensors)
        with temporary.open("ab") as file:
            for name, group in plan.items():
                value = source.read(name)
                for tensor in group:
                    if not _holds(tensor.kind.name, value):
                        rounded_twice.append(tensor.piece.name)
                    _align(file)
                    for data in _encoded(value, tensor):
                        file.write(data.numpy().data)
                        done += data.numel()
                        if progress is not None:
                            progress(done, total)
            _align(file)
        nbytes = temporary.stat().st_size
    kinds = Counter(tensor.kind.name for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return Written(nbytes, dict(kinds), parameters, tuple(rounded_twice))


_QUANTISED = {"q8_0", "q4_0"}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}


class _InMemory:
    def __init__(self, decoder: Decoder) -> None:
        self.config, self._decoder = decoder.config, decoder

    def read(self, name: str) -> Value:
        owner, _, leaf = name.rpartition(".")
        module = self._decoder.get_submodule(owner)
        if isinstance(packed := getattr(module, "packed", None), Packed) and leaf == "weight":
            return [packed]
        matrices = getattr(module, leaf.removesuffix("_proj"), None)  # packed experts: gate_up and down
        if isinstance(matrices, Matrices):
            return [matrix for matrix in matrices.weights if isinstance(matrix, Packed)]
        return self._decoder.get_parameter(name).detach()


def _plan(config: ModelConfig, kind: str, vocabulary: str) -> dict[str, list[_Tensor]]:
    """Our parameters, in order, to the tensors that are made of each."""
    layout, plan = GGUF_ARCHS[config.arch].layout, dict[str, list[_Tensor]]()
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    for name, parameter in parameters.items():
        plan[name] = []
        for piece in layout.pieces(name, config):
            shape = tuple(parameter[piece.index].shape)
            wanted = vocabulary if name in ("embed.weight", "head.weight") else kind
            small = len(shape) == 1 or name.endswith("router.weight")
            kept = GGMLQuantizationType["F32" if small else wanted.upper()]
            block, size = GGML_QUANT_SIZES[kept]
            if shape[-1] % block:
                raise ConfigError(
                    f"{piece.name!r} has rows of {shape[-1]} numbers, and {kept.name} needs a multiple of {block}; "
                    "take f16 or f32"
                )
            plan[name].append(_Tensor(piece, shape, kept, math.prod(shape) // block * size))
    return plan


def _write_header(path: Path, metadata: Mapping[str, Any], tensors: list[_Tensor]) -> None:
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor in tensors:
        # The writer asks for numpy's dtype as well, and looks at it only where the type is not given.
        writer.add_tensor_info(tensor.piece.name, tensor.shape, None, tensor.nbytes, tensor.kind)  # type: ignore[arg-type]
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:  # a list, or numpy's array as GGUFFile returns it
        writer.add_array(key, getattr(value, "tolist", lambda: value)())


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _holds(kind: str, value: Value) -> bool:
    """Whether the type holds the numbers of a packed value as they are."""
    if isinstance(value, Tensor) or kind == "F32":
        return True
    return kind in _FORMATS and all(
        matrix.format.kind == _FORMATS[kind].kind and matrix.format.symmetric for matrix in value
    )


def _encoded(value: Value, tensor: _Tensor) -> Iterator[Tensor]:
    """The tensor's bytes, uint8, a few rows at a time."""
    kind, heads = tensor.kind.name, tensor.piece.rotary_heads
    for matrix in _matrices(value, tensor.piece.index, kind):
        parts = tuple(_interleave(part, heads) for part in matrix) if heads else matrix
        if len(parts) == 2:
            yield _blocks(parts[0], parts[1], kind)
            continue
        for chunk in parts[0].split(max(1, _CHUNK // parts[0].shape[-1])):
            try:
                yield _plain(chunk, kind).flatten().view(torch.uint8)
            except ConfigError as error:
                raise ConfigError(f"{tensor.piece.name!r}: {error}") from None


def _matrices(value: Value, index: tuple[int | slice | None, ...], kind: str) -> Iterator[tuple[Tensor, ...]]:
    """Each matrix (or vector) of a piece: (numbers,), or (codes, scales) of a packed one that the type holds."""
    if isinstance(value, Tensor):
        part = value[index]
        yield from ((matrix,) for matrix in (part if part.dim() == 3 else part[None]))
        return
    rows = index[-1] if index else slice(None)
    for packed in value:
        own = kind in _FORMATS and _holds(kind, [packed])
        yield tuple(part[rows] for part in (integers(packed) if own else (unpack(packed),)))


def _plain(rows: Tensor, kind: str) -> Tensor:
    if kind == "F32":
        return rows.float()
    if kind == "F16":
        half = rows.half()
        if not half.isfinite().all():
            raise ConfigError("it has weights that F16 does not hold; take f32")
        return half
    return _blocks(*integers(pack(rows, _FORMATS[kind])), kind)


def _blocks(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """ggml's blocks of 32 numbers: the scale, fp16, and then 32 bytes (Q8_0) or 16 (Q4_0: i and i + 16 share one)."""
    blocks = codes.view(-1, _BLOCK)
    scale = scales.repeat_interleave(codes.shape[1] // scales.shape[1] // _BLOCK, dim=1)
    data = blocks.view(torch.uint8)
    if kind == "Q4_0":
        nibbles = (blocks + 8).view(torch.uint8)
        data = nibbles[:, : _BLOCK // 2] | nibbles[:, _BLOCK // 2 :] << 4
    return torch.cat([scale.reshape(-1, 1).view(torch.uint8), data], dim=1).flatten()


def _interleave(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order for its llama: of each head, row i of the first half beside row i of the second."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape)
