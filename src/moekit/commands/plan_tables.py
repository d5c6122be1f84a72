"""What `moekit plan` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit.config import ModelConfig
from moekit.machine import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.plan import SwitchConfig

__all__ = ["print_costs", "print_parameters"]


def print_parameters(config: ModelConfig | SwitchConfig, result: Mapping[str, Any], console: Console) -> None:
    """Parameters by part, and beside them what was published."""
    from rich.table import Table

    total, active = result["total_params"], result["active_params"]
    table = Table("part", title=f"{result['arch']}: {_count(total)} parameters", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("work on a token", justify="right")
    for part, number in result["parts"].items():
        if number:
            table.add_row(part, f"{number:,}", f"{result['active_parts'][part]:,}")
    table.add_section()
    table.add_row("all", f"{total:,}", f"{active:,}", style="bold")
    without = (result[f"{kind}_params_without_embeddings"] for kind in ("total", "active"))
    table.add_row("without input embeddings", *(f"{number:,}" for number in without))
    console.print(table)
    if isinstance(config, ModelConfig) and config.moe is not None:
        console.print(
            f"{len(config.moe_layers)} of {config.num_hidden_layers} layers have {config.moe.num_experts} experts, "
            f"of which {config.moe.top_k} work on a token: {active / total:.0%} of the parameters."
        )
    if result["published"] is not None:
        _print_published(result["published"], console)


def _print_published(known: Mapping[str, Any], console: Console) -> None:
    figures = []
    for kind in ("total", "active"):
        if known[f"{kind}_params"] is not None:
            convention = "" if known[f"{kind}_counts"] == "all" else f" {known[f'{kind}_counts']}"
            ours = known[f"{kind}_difference"]
            figures.append(f"{_count(known[f'{kind}_params'])} {kind}{convention} (counted {ours:+.1%})")
    console.print(f"Published: {', '.join(figures)}; {known['source']}.", highlight=False)
    console.print(known["note"], markup=False, highlight=False)


def print_costs(config: ModelConfig | SwitchConfig, result: Mapping[str, Any], console: Console) -> None:
    """Bytes by part and format, what fits, how fast at most; then cache, work, advice and training."""
    from rich.table import Table

    formats = list(result["weight_bytes"])
    table = Table("", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for format in formats:
        table.add_column(format, justify="right", no_wrap=True)
    for part, number in result["parts"].items():
        if number:
            table.add_row(part, *(readable_bytes(result["part_bytes"][format][part]) for format in formats))
    table.add_row("all", *(readable_bytes(result["weight_bytes"][format]) for format in formats), style="bold")
    if isinstance(config, ModelConfig):
        context = result["context"]
        table.add_row(f"cache of {context:,}", *(readable_bytes(result["kv_cache_bytes"][f]) for f in formats))
    fits = ("[green]yes[/]" if result["fits"][format] else "[red]no[/]" for format in formats)
    table.add_row("fits", *fits)
    if isinstance(config, ModelConfig):
        for what in ("decode", "prefill"):
            bounds = (result[f"{what}_tokens_per_second_at_most"][format] for format in formats)
            table.add_row(f"{what} tok/s ≤", *("" if bound is None else f"{bound:,.1f}" for bound in bounds))
    console.print(f"\nBytes as each format stores them, for {readable_bytes(result['memory_bytes'])} of memory:")
    console.print(table)
    if isinstance(config, ModelConfig):
        _print_work(config, result, console)
    else:
        console.print("An encoder–decoder: counted, but moekit has no decoder that runs it.")


def _print_work(config: ModelConfig, result: Mapping[str, Any], console: Console) -> None:
    limits = result["measured"]
    products = ", ".join(f"{limits[name] / 1e9:.0f} in {name}" for name in ("float32", "bfloat16", "int8"))
    console.print(
        f"Bounds, not promises: reading memory at {limits['read'] / 1e9:.0f} GB/s, products at {products} GFLOP/s, "
        "measured just now, beside whatever else runs here."
    )
    for format, figures in result["offload"].items():
        if figures["slots"] < figures["total_slots"]:
            console.print(f"{format}, experts on disk: {_offload(figures, result['disk_gb_s'])}.", highlight=False)
    kept, read = (result[f"kv_cache_bytes{read}_per_1000_tokens"] for read in ("", "_read"))
    windows = f", of which windows leave {readable_bytes(read)} to be read" if read < kept else ""
    console.print(f"Cache: {readable_bytes(kept)} for 1,000 tokens (16-bit){windows}.")
    near, far, training = (
        _count(result[key]) for key in ("flops_per_token", "flops_per_token_at_context", "training_flops_per_token")
    )
    console.print(f"Work: {near} FLOPs a token, {far} after {result['context']:,} tokens; training {training}.")
    _print_advice(result["advice"], console)
    if result["training"] is not None:
        _print_training(result["training"], console)


def _offload(figures: Mapping[str, Any], disk: float | None) -> str:
    if not figures["slots"]:
        return f"{readable_bytes(figures['least'])} is the least for the whole process"
    kept = f"{figures['slots']:,} of {figures['total_slots']:,} in memory beside {readable_bytes(figures['base'])}"
    missed = f"{readable_bytes(figures['missed_bytes'])} a token missed"
    if disk is None:
        return f"{kept}, {missed} (--disk-gb-s says how fast these come)"
    return f"{kept}, {missed}: about {figures['tokens_per_second']:.1f} tok/s with a disk of {disk:.1f} GB/s"


def _print_advice(advice: Mapping[str, Any], console: Console) -> None:
    choice = {"moe": "MoE", "dense": "dense", "neither": "neither"}[advice["choice"]]
    console.print(f"MoE or dense, in {advice['format']}: [bold]{choice}[/].")
    for reason in advice["reasons"]:
        console.print(f"- {reason}", markup=False, highlight=False)


def _print_training(training: Mapping[str, Any], console: Console) -> None:
    price = "" if training["price"] is None else f", {training['price']:,.0f} at {training['price_per_hour']:g} an hour"
    console.print(
        f"Training on {_count(training['tokens'])} tokens: {training['flops']:.2e} FLOPs, {training['hours']:,.1f} "
        f"hours at {training['flops_per_second']:.1e} FLOP/s{price}.",
        highlight=False,
    )


def _count(number: float) -> str:
    """46,702,792,704 → 46.7 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(int(number))
