"""`moekit export`: a model's folder in, a GGUF file for llama.cpp out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moekit.commands.options import ModelPath
from moekit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


@dataclass(frozen=True)
class Options:
    """Write a model as a GGUF file, which llama.cpp and the programs built on it read."""

    model: ModelPath
    """Folder in Hugging Face layout, a folder of `moekit pack`, or a .gguf file."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.gguf")]
    """File to write."""
    type: Type = "f16"
    """Of the matrices; norms, biases and routers stay f32."""
    head: Type | None = None
    """Of the embedding and the output head; q8_0 where --type is quantised, else the same."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for how the tokenizer cuts words, where moekit does not know it."""
    no_tokenizer: bool = False
    """Leave the tokenizer out: programs can then only feed token ids."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Read and write parameter by parameter; returns the sizes and the types."""
    from moekit.adapt import load_packed
    from moekit.commands.progress import ShareProgress
    from moekit.machine import readable_bytes
    from moekit.models import StoredDecoder, tokenizer_metadata, write_gguf
    from moekit.models.archs import is_packed
    from moekit.models.gguf_archs import gguf_metadata

    if Path(options.out).suffix != ".gguf":
        raise ConfigError(f"the file to write must end in .gguf, and {options.out!r} does not")
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
            options.type,
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
