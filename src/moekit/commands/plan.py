"""`moekit plan`: what a model costs, before it is downloaded or run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moekit.commands.machine import available_memory, readable_bytes
from moekit.commands.options import ModelPath
from moekit.config import ModelConfig
from moekit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.plan import ParameterCount

KV_TOKENS = 1000


@dataclass(frozen=True)
class Options:
    """Count a model's parameters, memory and work from its configuration alone; no weight is read."""

    model: ModelPath
    """Folder in Hugging Face layout, its config.json, or a .gguf file."""
    context: int = 4096
    """Positions a conversation may hold, for the cache's memory and the work of attention."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the tables; returns every figure."""
    from moekit.models.archs import read_config
    from moekit.plan import flops_per_token, kv_cache_bytes, parameters, weight_bytes

    if options.context < 1:
        raise ConfigError(f"context must be at least 1, not {options.context}")
    config = read_config(options.model)
    count = parameters(config)
    context = min(options.context, config.max_position_embeddings)
    memory, weights = available_memory(), weight_bytes(config)
    cache = kv_cache_bytes(config, context)
    fits = {name: size + cache <= memory for name, size in weights.items()}
    _print_parameters(config, count, console)
    _print_costs(config, weights, fits, context, console)
    return {
        "arch": config.arch,
        "total_params": count.total,
        "active_params": count.active,
        "parts": dict(count.parts),
        "active_parts": dict(count.active_parts),
        "context": context,
        "flops_per_token": flops_per_token(config),
        "flops_per_token_at_context": flops_per_token(config, context),
        "training_flops_per_token": 3 * flops_per_token(config),
        "weight_bytes": weights,
        "kv_cache_bytes_per_1000_tokens": kv_cache_bytes(config, KV_TOKENS),
        "kv_cache_bytes": cache,
        "available_memory_bytes": memory,
        "fits": fits,
    }


def _print_parameters(config: ModelConfig, count: ParameterCount, console: Console) -> None:
    from rich.table import Table

    table = Table("part", title=f"{config.arch}: {_count(count.total)} parameters", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("work on a token", justify="right")
    for part, number in count.parts.items():
        if number:
            table.add_row(part, f"{number:,}", f"{count.active_parts[part]:,}")
    table.add_section()
    table.add_row("all", f"{count.total:,}", f"{count.active:,}", style="bold")
    console.print(table)
    if config.moe is not None:
        share = count.active / count.total
        console.print(
            f"{len(config.moe_layers)} of {config.num_hidden_layers} layers have {config.moe.num_experts} experts, "
            f"of which {config.moe.top_k} work on a token: {share:.0%} of the parameters."
        )


def _print_costs(
    config: ModelConfig, weights: dict[str, int], fits: dict[str, bool], context: int, console: Console
) -> None:
    from rich.table import Table

    from moekit.plan import flops_per_token, kv_cache_bytes

    cache = kv_cache_bytes(config, context)
    table = Table("weights as")
    for column in ("weights", f"with a cache of {context:,} tokens"):
        table.add_column(column, justify="right")
    table.add_column("fits here")
    for name, size in weights.items():
        verdict = "[green]yes[/]" if fits[name] else "[red]no[/]"
        table.add_row(name, readable_bytes(size), readable_bytes(size + cache), verdict)
    console.print(table)
    near, far = flops_per_token(config), flops_per_token(config, context)
    console.print(f"Cache: {readable_bytes(kv_cache_bytes(config, KV_TOKENS))} for 1,000 tokens (16-bit).")
    console.print(
        f"Work: {_count(near)} FLOPs a token, {_count(far)} after {context:,} tokens; training {_count(3 * near)}."
    )
    console.print(f"This machine has {readable_bytes(available_memory())} of memory free.")


def _count(number: float) -> str:
    """46,702,792,704 → 46.7 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(int(number))
