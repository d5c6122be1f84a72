"""`moekit export`: a model in the layout that other programs read: a GGUF file, or a folder of Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moekit.commands.options import ModelPath
from moekit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_DTYPES: dict[Type, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Options:
    """Write a model as a GGUF file for llama.cpp, or as a folder in Hugging Face layout for transformers."""

    model: ModelPath
    """Folder in Hugging Face layout, a .gguf file, or for --to gguf a folder of `moekit pack`."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File.gguf or folder to write."""
    to: Literal["hf", "gguf"]
    """Layout to write."""
    type: Type | None = None
    """Of the matrices. gguf: f16 unless given; norms, biases and routers stay f32. hf: of everything, and plain; as
    stored unless given (f32 from a .gguf file)."""
    head: Type | None = None
    """gguf: of the embedding and the output head; q8_0 where --type is quantised, else the same."""
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name for how the tokenizer cuts words, where moekit does not know it."""
    no_tokenizer: bool = False
    """Leave the tokenizer out: programs can then only feed token ids."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Read and write; returns the sizes and the types."""
    named = Path(options.out).suffix == ".gguf"
    if named != (options.to == "gguf"):
        wanted = "a file, whose name ends in .gguf" if options.to == "gguf" else "a folder, whose name does not end so"
        raise ConfigError(f"--to {options.to} writes {wanted}: not {options.out!r}")
    return _to_gguf(options, console) if options.to == "gguf" else _to_hf(options, console)


def _to_hf(options: Options, console: Console) -> dict[str, Any]:
    from moekit.machine import readable_bytes
    from moekit.models import ARCHS, load_decoder, read_config, save_decoder
    from moekit.models.archs import config_to_hf
    from moekit.plan import parameters

    dtype = _dtype(options)
    config_to_hf(read_config(options.model))  # what the layout cannot express is refused before anything is read
    tokenizer = _tokenizer(options)
    with console.status("reading the model"):
        decoder = load_decoder(options.model, dtype)
    with console.status(f"writing {options.out}"):
        save_decoder(decoder, options.out, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save(options.out)
    architecture, count = ARCHS[decoder.config.arch].architecture, parameters(decoder.config).total
    nbytes = sum(file.stat().st_size for file in Path(options.out).glob("*.safetensors"))
    kind = type(tokenizer.hf).__name__ if tokenizer else None
    stored = str(decoder.norm.weight.dtype).removeprefix("torch.")
    console.print(f"{options.out}: {architecture}, {readable_bytes(nbytes)}", soft_wrap=True)
    console.print(f"parameters  {count:,} in {stored}")
    console.print(f"tokenizer   {kind or 'none'}")
    return {
        "out": options.out,
        "architecture": architecture,
        "bytes": nbytes,
        "parameters": count,
        "dtype": stored,
        "tokenizer": kind,
    }


def _dtype(options: Options) -> torch.dtype | None:
    """The one that --type names; flags of the other layout are refused."""
    import torch

    for flag, value in (("--head", options.head), ("--pre-tokenizer", options.pre_tokenizer)):
        if value is not None:
            raise ConfigError(f"{flag} is for --to gguf alone")
    if options.type is None:
        return None
    if options.type not in _DTYPES:
        raise ConfigError(f"--to hf writes {', '.join(_DTYPES)}, not {options.type}")
    dtype: torch.dtype = getattr(torch, _DTYPES[options.type])
    return dtype


def _tokenizer(options: Options) -> Any:
    from moekit.models import load_tokenizer

    if options.no_tokenizer:
        return None
    try:
        return load_tokenizer(options.model)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}, and so it cannot be written; --no-tokenizer leaves it out") from None


def _to_gguf(options: Options, console: Console) -> dict[str, Any]:
    """Parameter by parameter."""
    from moekit.adapt import load_packed
    from moekit.commands.progress import ShareProgress
    from moekit.machine import readable_bytes
    from moekit.models import StoredDecoder, tokenizer_metadata, write_gguf
    from moekit.models.archs import is_packed
    from moekit.models.gguf_archs import gguf_metadata

    stored = load_packed(options.model) if is_packed(options.model) else StoredDecoder(options.model)
    metadata = gguf_metadata(stored.config)  # what llama.cpp cannot compute is refused before anything is read
    tokenizer = None
    if not options.no_tokenizer:
        with console.status("reading the tokenizer"):
            tokenizer = tokenizer_metadata(options.model, stored.config.vocab_size, options.pre_tokenizer)
    with ShareProgress(console, "writing") as bar:
        written = write_gguf(
            stored,
            options.out,
            options.type or "f16",
            vocabulary=options.head,
            tokenizer=tokenizer,
            progress=bar.on_part,
        )
    architecture = metadata["general.architecture"]
    kind, cut = ((tokenizer or {}).get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(written.tensors.items()))
    console.print(f"{options.out}: {architecture}, {readable_bytes(written.nbytes)}", soft_wrap=True)
    console.print(f"parameters  {written.parameters:,}, {8 * written.nbytes / written.parameters:.2f} bits each")
    console.print(f"tensors     {types}")
    console.print(f"tokenizer   {kind or 'none'}{f', words cut as {cut}' if cut else ''}")
    if written.rounded_twice:
        console.print(f"rounded twice, from another packed format: {', '.join(written.rounded_twice)}", soft_wrap=True)
    return {
        "out": options.out,
        "architecture": architecture,
        "bytes": written.nbytes,
        "parameters": written.parameters,
        "tensors": dict(written.tensors),
        "tokenizer": kind,
        "pre_tokenizer": cut,
        "rounded_twice": list(written.rounded_twice),
    }
