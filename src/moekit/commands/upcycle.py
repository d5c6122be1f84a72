"""`moekit upcycle`: a dense model's folder in, a Mixture of Experts' folder out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.options import ModelPath
from moekit.config import UpcycleConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Options:
    """Turn a dense model into a Mixture of Experts whose experts are made of its MLPs."""

    model: ModelPath
    """Folder in Hugging Face layout, or a .gguf file."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the new model to, in Hugging Face layout."""
    upcycle: Annotated[UpcycleConfig, tyro.conf.arg(name="")] = field(default_factory=UpcycleConfig)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Read, upcycle, write; returns the parameter counts of both models."""
    from moekit.adapt import upcycle, upcycled_config
    from moekit.models import load_decoder, load_tokenizer, read_config, save_decoder
    from moekit.models.archs import config_to_hf
    from moekit.plan import flops_per_token, parameters

    # Refuse before reading gigabytes: what cannot be made, and what could not be written.
    config_to_hf(upcycled_config(read_config(options.model), options.upcycle))
    with console.status("reading the dense model"):
        dense, tokenizer = load_decoder(options.model), load_tokenizer(options.model)
    with console.status("upcycling"):
        sparse = upcycle(dense, options.upcycle)
    with console.status(f"writing {options.out}"):
        save_decoder(sparse, options.out)
        tokenizer.save(options.out)
    before, after = parameters(dense.config), parameters(sparse.config)
    work = flops_per_token(sparse.config) / flops_per_token(dense.config)
    why = options.upcycle.changes_output
    keeps = "equal to the dense model's, up to rounding" if why is None else f"not the dense model's: {why}"
    console.print(f"{options.out}: {sparse.config.arch}, {options.upcycle.num_experts} experts a layer")
    console.print(f"parameters  {before.total:,} → {after.total:,}, {after.active:,} active")
    console.print(f"work        {work:.2f} × the dense model's FLOPs a token")
    console.print(f"output      {keeps}", markup=False)
    console.print(f"next        moekit train {options.out} --data.train FILES --out runs/mine", markup=False)
    return {
        "out": options.out,
        "arch": sparse.config.arch,
        "method": options.upcycle.method,
        "exact": why is None,
        "changes_output": why,
        "dense_params": before.total,
        "total_params": after.total,
        "active_params": after.active,
        "flops_ratio": work,
    }
