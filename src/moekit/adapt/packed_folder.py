"""A packed model on disk: config.json, the tokenizer, and one safetensors file in the kernels' own layout.

Its tensors are the state_dict of the quantised decoder: uint8 buffers of whole pages, first and page-aligned, an
expert in one of them, then what is not packed, in float32. The header's notes give each buffer's format. config.json
is Hugging Face's with a `quantization_config` whose method only moekit knows, and the weights have a name of their own:
transformers warns of the one and stops at the other, where it would otherwise fill the model at random.
Nothing is converted on the way in or out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.adapt.packed_file import CHECKSUM, VERSION, VERSION_NOTE, PackedWriter, packed_formats, packed_state
from moekit.adapt.quant import replace_modules
from moekit.adapt.quant_modules import PAGE, empty_twin, is_experts
from moekit.errors import ConfigError, FormatError
from moekit.files import replacing_folder, write_atomic
from moekit.kernels.formats import Format
from moekit.models.archs import config_to_hf, read_config
from moekit.models.decoder import Decoder
from moekit.models.keys import PACKED_METHOD
from moekit.models.safetensors_file import SafetensorsFile
from moekit.models.tokenizer import Tokenizer
from moekit.models.weights import PACKED_WEIGHTS, empty_decoder
from moekit.models.weights_write import remove_stale

__all__ = ["empty_packed", "load_packed", "put_packed", "save_packed", "write_beside"]


def save_packed(decoder: Decoder, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a quantised decoder, and its tokenizer, to `folder`.

    A new folder appears whole or not at all; in one that exists each file is replaced whole, config.json last, and
    weights of an earlier save are removed. At no time is a second copy of a tensor in memory.

    Raises:
        UnsupportedError: nothing in it is packed, or the family cannot express the model.
        FileError: it could not be written.
    """
    with replacing_folder(folder, last="config.json") as temporary:
        write_beside(decoder, temporary, tokenizer)
        with PackedWriter(temporary / PACKED_WEIGHTS, decoder) as writer:
            for name, value in packed_state(decoder).items():
                writer.write(name, value)
            writer.finish()
    remove_stale(Path(folder), {PACKED_WEIGHTS})


def write_beside(decoder: Decoder, folder: Path, tokenizer: Tokenizer | None) -> None:
    """What lies beside the weights: config.json, and the tokenizer's files. Raises as `save_packed` does."""
    kinds = sorted(set(packed_formats(decoder).values()))
    values = config_to_hf(decoder.config) | {
        "quantization_config": {"quant_method": PACKED_METHOD, "version": VERSION, "formats": kinds}
    }
    if tokenizer is not None:
        tokenizer.save(folder)
    write_atomic(folder / "config.json", json.dumps(values, indent=2) + "\n")


def load_packed(folder: str | os.PathLike[str]) -> Decoder:
    """The decoder in a folder of `save_packed`, in evaluation mode; its tensors are slices of the mapped file.

    Raises:
        FileError: a file is missing or unreadable.
        FormatError: the file contradicts itself or the configuration; the message names the tensor.
    """
    decoder, file = empty_packed(folder)
    for name, value in file.map_all().items():
        put_packed(decoder, name, value)
    return decoder.eval()


def empty_packed(folder: str | os.PathLike[str]) -> tuple[Decoder, SafetensorsFile]:
    """The decoder in such a folder without its tensors (on torch's meta device), and the file that holds exactly
    those. Raises as `load_packed` does."""
    folder = Path(folder)
    config = read_config(folder)
    file = SafetensorsFile(folder / PACKED_WEIGHTS)
    where = str(file.path)
    if file.metadata.get(VERSION_NOTE) != VERSION:
        raise FormatError(
            f"{where} is packed as version {file.metadata.get(VERSION_NOTE)}, and this moekit reads {VERSION}: "
            "pack the model again (moekit pack MODEL OUT)"
        )
    if config.moe is not None and config.moe.num_experts > len(file.tensors):
        raise FormatError(f"{where}: {config.moe.num_experts} experts, but only {len(file.tensors)} tensors")
    decoder = empty_decoder(config, len(file.tensors), where)
    _make_room(decoder, file, where)
    _check(decoder, file, where)
    return decoder, file


def put_packed(decoder: Decoder, name: str, value: Tensor) -> None:
    """Make `value` the parameter (without a gradient) or buffer of this name."""
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if leaf in module._parameters else value)


def _make_room(decoder: Decoder, file: SafetensorsFile, where: str) -> None:
    """Replace what the file holds packed by quantised modules without memory."""
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in decoder.named_modules():
        if is_experts(module):
            assert decoder.config.moe is not None
            leaves = [f"{name}.expert_{number}" for number in range(decoder.config.moe.num_experts)]
        elif isinstance(module, nn.Linear | nn.Embedding):
            leaves = [f"{name}.data"]
        else:
            continue
        if leaves[0] in file.tensors:
            formats = [_format(file.metadata, leaf, where) for leaf in leaves]
            with torch.device("meta"):
                twins[module] = empty_twin(module, formats)
    replace_modules(decoder, twins)


def _format(notes: Mapping[str, str], name: str, where: str) -> Format:
    if name not in notes:
        raise FormatError(f"{where}: the header gives no format for {name!r}")
    try:
        return Format.parse(notes[name])
    except ConfigError as error:
        raise FormatError(f"{where}: the format of {name!r}: {error}") from None


def _check(decoder: Decoder, file: SafetensorsFile, where: str) -> None:
    """The file must hold exactly what the decoder has, in its sizes; floats as float32."""
    wanted: dict[str, Any] = {name: value for name, value in decoder.state_dict().items() if isinstance(value, Tensor)}
    for name in sorted(wanted.keys() - file.tensors.keys()):
        raise FormatError(f"{where}: the tensor {name!r} is missing")
    for name in sorted(file.tensors.keys() - wanted.keys()):
        raise FormatError(f"{where}: the configuration has no place for {name!r}")
    for name, value in wanted.items():
        stored = file.tensors[name]
        if (stored.dtype, stored.shape) != (value.dtype, tuple(value.shape)):
            raise FormatError(
                f"{where}: {name!r} is {stored.dtype} of shape {list(stored.shape)}, "
                f"the configuration asks for {value.dtype} of {list(value.shape)}"
            )
        if stored.dtype == torch.uint8 and stored.start % PAGE:
            raise FormatError(f"{where}: {name!r} does not start at a page")
        if not re.fullmatch("[0-9a-f]{16}", file.metadata.get(name + CHECKSUM, "")):
            raise FormatError(f"{where}: the header gives no checksum for {name!r}")
