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
from typing import Any, BinaryIO, Literal, Protocol, cast

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.files import replacing
from moekit.kernels.formats import Format, Packed, integers, pack, unpack
from moekit.kernels.quant import Matrices
from moekit.models.decoder import Decoder
from moekit.models.gguf_archs import GGUF_ARCHS, gguf_constants, gguf_metadata
from moekit.models.layout import Piece, stored_shape
from moekit.models.weights import stored_tensors

__all__ = ["GGUFType", "Written", "write_gguf"]

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

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
    """One tensor of the file: the parts of our parameters that lie in it one after the other, its type and size."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: tuple[tuple[str, Piece], ...]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


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
    constants = {name: torch.tensor(values) for name, values in gguf_constants(source.config).items()}
    made = [_Tensor(name, tuple(value.shape), GGMLQuantizationType.F32, ()) for name, value in constants.items()]
    tensors = [*made, *_plan(source.config, kind, vocabulary)]
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    rounded_twice: dict[str, None] = {}
    latest = _Latest(source)
    with replacing(path) as temporary:
        _write_header(temporary, metadata, tensors)
        with temporary.open("ab") as file:
            for tensor in tensors:
                _align(file)
                if not tensor.parts:
                    file.write(constants[tensor.name].numpy().data)
                for name, piece in tensor.parts:
                    value = latest.read(name)
                    if not _holds(tensor.kind.name, value, piece):
                        rounded_twice[tensor.name] = None
                    for data in _encoded(value, piece, tensor.kind.name):
                        file.write(data.numpy().data)
                        done += data.numel()
                        if progress is not None:
                            progress(done, total)
            _align(file)
        nbytes = temporary.stat().st_size
    kinds = Counter(tensor.kind.name for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors if tensor.parts)
    return Written(nbytes, dict(kinds), parameters, tuple(rounded_twice))


_QUANTISED = {"q8_0", "q4_0"}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
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
        value: Tensor = getattr(module, leaf)
        return value.detach()


class _Latest:
    """Keeps the parameter that was read last: several tensors may be made of one."""

    def __init__(self, source: Source) -> None:
        self._source, self._name, self._value = source, "", cast(Value, [])

    def read(self, name: str) -> Value:
        if name != self._name:
            self._value = []  # the one before is let go first
            self._name, self._value = name, self._source.read(name)
        return self._value


def _plan(config: ModelConfig, kind: str, vocabulary: str) -> list[_Tensor]:
    """The tensors of the file in the order of our parameters."""
    layout = GGUF_ARCHS[config.arch].layout
    with torch.device("meta"):
        stored = stored_tensors(Decoder(config))
    parts, shapes = dict[str, list[tuple[str, Piece]]](), dict[str, tuple[int, ...]]()
    for name, value in stored.items():
        for piece in layout.pieces(name, config):
            before = shapes.get(piece.name)
            assert not piece.stored or piece.stored[0].start == (before[0] if before else 0), "parts follow each other"
            shapes[piece.name] = stored_shape(piece, value[piece.index].shape, before)
            parts.setdefault(piece.name, []).append((name, piece))
    return [_tensor(name, shapes[name], tuple(found), kind, vocabulary) for name, found in parts.items()]


def _tensor(
    name: str, shape: tuple[int, ...], parts: tuple[tuple[str, Piece], ...], kind: str, vocabulary: str
) -> _Tensor:
    parameter = parts[0][0]
    wanted = vocabulary if parameter in ("embed.weight", "head.weight") else kind
    small = len(shape) == 1 or parameter == "positions" or parameter.endswith(("router.weight", "_bias"))
    kept = GGMLQuantizationType["F32" if small else wanted.upper()]
    block, _ = GGML_QUANT_SIZES[kept]
    if shape[-1] % block:
        raise ConfigError(
            f"{name!r} has rows of {shape[-1]} numbers, and {kept.name} needs a multiple of {block}; take f16 or f32"
        )
    return _Tensor(name, shape, kept, parts)


def _write_header(path: Path, metadata: Mapping[str, Any], tensors: list[_Tensor]) -> None:
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor in tensors:
        # The writer asks for numpy's dtype as well, and looks at it only where the type is not given.
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, tensor.kind)  # type: ignore[arg-type]
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


def _holds(kind: str, value: Value, piece: Piece) -> bool:
    """Whether the type holds the numbers of a packed value as they are."""
    if isinstance(value, Tensor) or kind == "F32":
        return True
    return all(_same_codes(kind, matrix, piece) for matrix in value)


def _same_codes(kind: str, matrix: Packed, piece: Piece) -> bool:
    same = kind in _FORMATS and matrix.format.kind == _FORMATS[kind].kind
    return same and matrix.format.symmetric and not piece.transposed


def _encoded(value: Value, piece: Piece, kind: str) -> Iterator[Tensor]:
    """The bytes of a piece, uint8, a few rows at a time."""
    heads = piece.rotary_heads
    for matrix in _matrices(value, piece, kind):
        parts = tuple(_interleave(part, heads) for part in matrix) if heads else matrix
        if len(parts) == 2:
            yield _blocks(parts[0], parts[1], kind)
            continue
        for chunk in parts[0].split(max(1, _CHUNK // parts[0].shape[-1])):
            try:
                yield _plain(chunk, kind).flatten().view(torch.uint8)
            except ConfigError as error:
                raise ConfigError(f"{piece.name!r}: {error}") from None


def _matrices(value: Value, piece: Piece, kind: str) -> Iterator[tuple[Tensor, ...]]:
    """Each matrix (or vector) of a piece: (numbers,), or (codes, scales) of a packed one that the type holds."""
    if isinstance(value, Tensor):
        part = value[piece.index]
        part = part.transpose(-1, -2).contiguous() if piece.transposed else part
        yield from ((matrix,) for matrix in (part if part.dim() == 3 else part[None]))
        return
    rows = piece.index[-1] if piece.index else slice(None)
    for packed in value:
        own = _same_codes(kind, packed, piece)
        parts = (part[rows] for part in (integers(packed) if own else (unpack(packed),)))
        yield tuple(part.T.contiguous() if piece.transposed else part for part in parts)


def _plain(rows: Tensor, kind: str) -> Tensor:
    if kind == "F32":
        return rows.float()
    if kind == "F16":
        half = rows.half()
        if not half.isfinite().all():
            raise ConfigError("it has weights that F16 does not hold; take f32")
        return half
    if kind == "BF16":
        return rows.bfloat16()
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
