"""`moekit inspect`: what a model is made of, and which experts take which tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.commands.heat import heat_table
from moekit.commands.machine import readable_bytes
from moekit.commands.options import DType, ModelPath
from moekit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.engine import Model
    from moekit.train.monitor import RoutingMonitor

ROW_TOKENS = 1024
SHOWN_TOKENS = 24


@dataclass(frozen=True)
class Options:
    """Show a model's shape and, for a text, the work of its experts."""

    model: ModelPath
    """Folder in Hugging Face layout, or a .gguf file."""
    text: Path | None = None
    """A text file to route."""
    prompt: str | None = None
    """A text to route, instead of a file."""
    max_tokens: int = 4096
    """How much of the text to route."""
    png: Path | None = None
    """Also draw the work of the experts to this file."""
    dtype: DType | None = None
    """Compute in this format; the stored one when not given."""


@dataclass(frozen=True)
class Work:
    """Which experts worked: the counts of each MoE layer, and for each token one row of expert ids a layer."""

    monitor: RoutingMonitor
    tokens: list[str]
    experts: list[list[list[int]]]


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print facts, heat map and tokens; returns them all."""
    import moekit

    _check(options)
    text = options.prompt if options.text is None else _read_text(options.text)
    model = moekit.load(options.model, dtype=options.dtype)
    result: dict[str, Any] = {"facts": _facts(model), "work": None}
    for name, value in result["facts"].items():
        console.print(f"[bold]{name:<18}[/] ", end="")
        console.print(f"{value:,}" if isinstance(value, int) else str(value), markup=False, highlight=False)
    if text is None:
        return result
    if not model.config.moe_layers:
        if options.png is not None:
            raise UnsupportedError("this model is dense: it has no experts to draw")
        console.print("This model is dense: every parameter works on every token.")
        return result
    work = _route(model, text, options.max_tokens)
    console.print(heat_table(work.monitor.counts_ME.tolist(), work.monitor.layers))
    _print_tokens(work, console)
    if options.png is not None:
        work.monitor.save_heatmap(options.png)
        console.print(f"drawn to {options.png}", markup=False, highlight=False)
    result["work"] = {"layers": work.monitor.as_dict(), "tokens": work.tokens, "experts": work.experts}
    return result


def _check(options: Options) -> None:
    if options.text is not None and options.prompt is not None:
        raise ConfigError("give --text or --prompt, not both")
    if options.png is not None and options.text is None and options.prompt is None:
        raise ConfigError("--png draws the experts' work on a text: give --text or --prompt too")
    if options.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {options.max_tokens}")


def _facts(model: Model) -> dict[str, Any]:
    from moekit.adapt import packed_formats
    from moekit.plan import parameters

    config, count = model.config, parameters(model.config)
    formats = packed_formats(model.decoder)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.decoder.parameters()} | {*formats.values()})
    tensors = [*model.decoder.parameters(), *(model.decoder.get_buffer(name) for name in formats)]
    stored = sum(tensor.nbytes for tensor in tensors)
    facts: dict[str, Any] = {
        "architecture": config.arch,
        "parameters": count.total,
        "active parameters": count.active,
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads}, sharing {config.num_key_value_heads} keys and values",
        "context": config.max_position_embeddings,
        "weights": f"{readable_bytes(stored)} of {', '.join(dtypes)}",
        "vocabulary": config.vocab_size,
        "tokenizer": f"{model.tokenizer.vocab_size} tokens, end of text {list(model.tokenizer.eos_ids)}",
        "chat template": "yes" if model.can_chat else "no",
    }
    if config.moe is not None:
        moe = config.moe
        facts["experts"] = f"{moe.num_experts} of width {moe.intermediate_size} in {len(config.moe_layers)} layers"
        facts["experts a token"] = moe.top_k
        facts["shared experts"] = moe.num_shared_experts
    return facts


def _read_text(path: Path) -> str:
    from moekit.files import file_errors

    with file_errors(path, "read"):
        return path.read_text(errors="replace")


def _route(model: Model, text: str, max_tokens: int) -> Work:
    """Run the text through the model in rows that fit its context, and keep who took what."""
    import torch

    from moekit.train.monitor import RoutingMonitor

    assert model.config.moe is not None
    ids = model.tokenizer.encode(text)[:max_tokens]
    if not ids:
        raise ConfigError("the text is empty: there is nothing to route")
    row = min(ROW_TOKENS, model.config.max_position_embeddings)
    monitor = RoutingMonitor(model.config.moe_layers, model.config.moe.num_experts)
    experts: list[list[list[int]]] = []
    with torch.inference_mode():
        for start in range(0, len(ids), row):
            features = model.decoder.features(torch.tensor([ids[start : start + row]]))
            monitor.update(features.routings)
            experts += torch.stack([routing.expert_ids_TK for routing in features.routings], dim=1).tolist()
    tokens = [model.tokenizer.decode([token]) for token in ids]
    return Work(monitor, tokens, experts)


def _print_tokens(work: Work, console: Console) -> None:
    """The first tokens and their experts, in the first, middle and last MoE layer."""
    from rich.table import Table
    from rich.text import Text

    last = len(work.monitor.layers) - 1
    columns = sorted({0, last // 2, last})
    table = Table(
        "token", *(f"layer {work.monitor.layers[column]}" for column in columns), title="experts of each token"
    )
    for token, rows in list(zip(work.tokens, work.experts, strict=True))[:SHOWN_TOKENS]:
        table.add_row(Text(repr(token)), *(", ".join(map(str, rows[column])) for column in columns))
    console.print(table)
    if len(work.tokens) > SHOWN_TOKENS:
        console.print(f"the first {SHOWN_TOKENS} of {len(work.tokens):,} tokens; --json has them all", highlight=False)
