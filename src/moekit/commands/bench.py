"""`moekit bench`: moekit beside its peers and the machine's limits, in one process, losing rows included."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moekit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.bench import GenerationRow, Row
    from moekit.bench.budget import BudgetResult

Case = Literal["limits", "layer", "experts", "prefill", "decode", "budget"]
CASES: tuple[Case, ...] = ("limits", "layer", "experts", "prefill", "decode", "budget")


@dataclass(frozen=True)
class Options:
    """Measure layers and decoders beside transformers, llama.cpp and the machine's limits; medians, ratios."""

    cases: Annotated[tuple[Case, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CASES")] = CASES
    """limits, layer, experts, prefill, decode, budget; all of them when none is named."""
    fast: bool = False
    """The first shape of the layer only; one layer of the decoder, and fewer rounds."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the layer's weights and activations."""
    repeats: int = 5
    """Timed rounds of the layer; each runs every contender once."""
    formats: tuple[Literal["int4", "int8", "bf16"], ...] = ("int4", "int8", "bf16")
    """Of the decoder."""
    cache: Path | None = None
    """Folder that keeps the decoder's files (23 GB; 4 with --fast) for the next run; else they are removed."""
    trace: Path | None = None
    """Of budget: a routing that `moekit inspect MODEL --text FILE --save-trace` kept, for the cache policies too."""
    plot: Path | None = None
    """PNG with a bar a row."""
    write: Path | None = None
    """Markdown file that gets what is printed, the machine named, as benchmarks/RESULTS.md."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the limits and a table for each thing measured; returns all rows."""
    import torch

    from moekit import bench

    if options.repeats < 1:
        raise ConfigError(f"repeats must be at least 1, not {options.repeats}")
    console.record = options.write is not None
    with console.status("measuring the machine"):
        limits = bench.limits()
    threads = torch.get_num_threads()
    console.print(
        f"{threads} threads; memory read {limits['read_gb_s']:.0f} GB/s, "
        f"matrix product {limits['gemm_bf16_gflop_s']:.0f} GFLOP/s bf16, {limits['gemm_fp32_gflop_s']:.0f} fp32, "
        f"{limits['gemm_int8_gflop_s']:.0f} int8",
        soft_wrap=True,
    )
    rows = _layers(options, console) if "layer" in options.cases else []
    rows += _experts(options, console) if "experts" in options.cases else []
    generation = _generation(options, limits, console) if {"prefill", "decode"} & {*options.cases} else []
    found = _budget(options, console) if "budget" in options.cases else None
    if options.plot is not None:
        _plot(rows, generation, found, options.plot)
    if options.write is not None:
        text = console.export_text()
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(_markdown(options, text))
    return {
        "threads": threads,
        "limits": limits,
        "rows": [dataclasses.asdict(row) for row in rows],
        "generation": [dataclasses.asdict(row) for row in generation],
        **({} if found is None else dataclasses.asdict(found)),
    }


def _layers(options: Options, console: Console) -> list[Row]:
    import torch

    from moekit import bench

    rows: list[Row] = []
    for shape in bench.LAYER_SHAPES[: 1 if options.fast else None]:
        for backward in (False, True):
            with console.status(str(shape)):
                new = bench.layer(shape, getattr(torch, options.dtype), backward, options.repeats)
            _print_layer(new, "of dense", console)
            rows += new
    return rows


def _experts(options: Options, console: Console) -> list[Row]:
    import torch

    from moekit import bench

    counts = bench.EXPERT_COUNTS[:: 4 if options.fast else 1]
    dtype, rows = getattr(torch, options.dtype), []
    for backward in (False, True):
        with console.status("more and more experts"):
            new = bench.experts(bench.EXPERT_SHAPE, counts, dtype, backward, options.repeats)
        _print_layer(new, f"of {counts[0]} experts", console)
        rows += new
    return rows


def _generation(options: Options, limits: dict[str, float], console: Console) -> list[GenerationRow]:
    from moekit.bench import FAST, FULL, ModelFiles, Workload, generation

    cases = [case for case in ("prefill", "decode") if case in options.cases]
    config = FAST if options.fast else FULL
    work = Workload(rounds=3) if options.fast else Workload()
    rows: list[GenerationRow] = []
    with ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moekit-bench-")))
        for format in options.formats:
            with console.status(f"the decoder in {format}") as status:
                files = ModelFiles(folder, config, status.update)
                missing: list[str] = []
                new = generation(files, format, limits, cases=cases, work=work, missing=missing.append)
            _print_generation(new, config.num_hidden_layers, work.prompt, console)
            for line in missing:
                console.print(line, soft_wrap=True, markup=False)
            rows += new
    return rows


def _budget(options: Options, console: Console) -> BudgetResult:
    from moekit.commands.bench_budget import run_budget

    return run_budget(options.cache, options.trace, options.fast, console)


def _print_layer(rows: list[Row], relative: str, console: Console) -> None:
    from rich.table import Table

    console.print(f"\n{rows[0].what}", highlight=False, soft_wrap=True)
    table = Table("contender")
    for column in ("ms", "GFLOP/s", relative):
        table.add_column(column, justify="right")
    for row in rows:
        style = "bold" if row.contender == "moekit" else ""
        table.add_row(row.contender, f"{row.milliseconds:.1f}", f"{row.gflops:.0f}", f"{row.ratio:.2f}", style=style)
    console.print(table)


def _print_generation(rows: list[GenerationRow], layers: int, prompt: int, console: Console) -> None:
    from rich.table import Table

    from moekit.machine import readable_bytes

    for case in dict.fromkeys(row.case for row in rows):
        chosen = [row for row in rows if row.case == case]
        what = f"prefill of {prompt} tokens" if case == "prefill" else f"decode after {prompt} tokens"
        console.print(f"\n{chosen[0].format} {what}, decoder of {layers} layers", highlight=False, soft_wrap=True)
        table = Table("contender", pad_edge=False)
        for column in ("tok/s", "P50 ms", "P99 ms", "bound", "× peer", "memory"):
            table.add_column(column, justify="right")
        for row in chosen:
            table.add_row(
                row.contender,
                f"{row.tokens_per_second:.1f}",
                f"{row.p50_ms:.1f}",
                "" if row.p99_ms is None else f"{row.p99_ms:.1f}",
                f"{row.of_bound:.2f}",
                "" if row.of_peer is None else f"{row.of_peer:.2f}",
                "" if row.memory is None else readable_bytes(row.memory),
                style="bold" if row.contender == "moekit" else "",
            )
        console.print(table)
    distances = {row.contender: f"{row.contender} {row.kl:.0e}" for row in rows if row.contender != "moekit"}
    if distances:
        console.print(f"KL of the next token from moekit's: {', '.join(distances.values())}", soft_wrap=True)


def _plot(rows: list[Row], generation: list[GenerationRow], found: BudgetResult | None, path: Path) -> None:
    from moekit.bench.plot import draw
    from moekit.commands.bench_budget import curve_bars

    bars: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        bars.setdefault(f"{row.what}: GFLOP/s", []).append((row.contender, row.gflops))
    for line in generation:
        bars.setdefault(f"{line.case} {line.format}: tokens/s", []).append((line.contender, line.tokens_per_second))
    draw(bars | ({} if found is None else curve_bars(found)), path, "more is better")


def _markdown(options: Options, text: str) -> str:
    import datetime

    command = " ".join(["moekit bench", *options.cases, *(["--fast"] if options.fast else [])])
    return (
        f"# Results\n\n`{command}`, printed by it on {datetime.date.today()}. Machine: {_machine()}.\n\n"
        "Times of a virtual machine drift from hour to hour; read the ratios. The bound is what reading memory\n"
        "(decode) or the fastest matrix product (prefill) would allow, as a share; the peer is the fastest of them.\n\n"
        f"```\n{text.strip()}\n```\n"
    )


def _machine() -> str:
    """The machine and the versions of everybody."""
    from importlib.metadata import PackageNotFoundError, version

    from moekit.machine import cores, instruction_sets, processor, readable_bytes, total_memory

    versions = []
    for package in ("torch", "transformers", "llama-cpp-python"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    sets = ", ".join(instruction_sets())
    return f"{cores()} cores of {processor()} ({sets}), {readable_bytes(total_memory())}, {', '.join(versions)}"
