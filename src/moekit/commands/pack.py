"""`moekit pack`: a model is quantised once, into the kernels' own layout, and the price is printed."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.options import ModelPath
from moekit.errors import ConfigError
from moekit.machine import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moekit.adapt import QuantReport
    from moekit.adapt.packing import Maker, Packing
    from moekit.adapt.quant import Recipe
    from moekit.models import Decoder
    from moekit.train.quality import Quality

WORST = 3


@dataclass(frozen=True)
class Options:
    """Quantise a model and write it to a folder that loads at once."""

    model: ModelPath
    """Unquantised: a folder in Hugging Face layout, or a .gguf file; with --random, a config.json will do."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the packed model to."""
    quant: str = "int4"
    """Format of the matrices: int8, int4, nf4 or mxfp4, then -g32, -g64 or -g128, then -asym (int4-g64-asym)."""
    head: str = "int8"
    """Format of the embedding and the head."""
    per_expert: str | None = None
    """FORMAT:SHARE gives the busiest share of each layer's experts on --text another format (int8:0.25)."""
    text: tuple[str, ...] = ()
    """Files, folders or globs to measure perplexity on, before and after; the model is then read whole."""
    rows: int = 32
    """How much of the text: rows of --sequence-length tokens, spread evenly over it."""
    sequence_length: int = 256
    """Tokens in a row."""
    random: bool = False
    """Only MODEL's configuration is read, and the weights are random: for sizing and tests. No tokenizer is written."""
    seed: int = 0
    """Of --random."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Quantise, write, print the report; returns it whole."""
    from moekit.adapt import save_packed
    from moekit.adapt.quant import Recipe
    from moekit.adapt.quant_stream import QuantisedWeights
    from moekit.models import load_tokenizer, read_config
    from moekit.models.archs import config_to_hf

    # Refuse before reading gigabytes: what is misspelt, and what could not be written.
    recipe = Recipe.of(options.quant, options.head)
    hot = _hot(options)
    if options.random:
        return _random(options, recipe, console)
    config_to_hf(read_config(options.model))
    tokenizer = load_tokenizer(options.model)
    quality = None
    if options.text:
        decoder, report, quality = _measured(options, hot, tokenizer, console)
        with console.status(f"writing {options.out}"):
            save_packed(decoder, options.out, tokenizer)
    else:
        maker = QuantisedWeights(options.model, recipe)
        report = maker.report(_write(maker, options, tokenizer, console).notes)
    _tell(options, report, quality, console)
    result = {"out": options.out, "quant": options.quant, "head": options.head, **report.to_dict()}
    return result | {"quality": None if quality is None else quality.to_dict()}


def _write(maker: Maker, options: Options, tokenizer: Any, console: Console) -> Packing:
    """Tensor by tensor: in memory is one of them."""
    from moekit.adapt.packing import write_packed
    from moekit.commands.progress import BytesProgress

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with BytesProgress(console, "packing") as bar:
        return write_packed(maker, options.out, tokenizer, progress=bar.on_bytes, tell=tell)


def _random(options: Options, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Random weights straight into the file."""
    from moekit.adapt.random_weights import RandomWeights
    from moekit.models import read_config

    if options.text:
        raise ConfigError("random weights have no quality: --random and --text exclude each other")
    maker = RandomWeights(read_config(options.model), recipe, options.seed)
    done = _write(maker, options, None, console)
    console.print(f"all       {maker.parameters / 1e9:,.2f} billion random parameters, {readable_bytes(done.size)}")
    console.print(f"next      moekit plan {options.out}; text needs a tokenizer, and random weights have none")
    return {
        "out": options.out,
        "quant": options.quant,
        "head": options.head,
        "seed": options.seed,
        "parameters": maker.parameters,
        "bytes": done.size,
        "resumed_bytes": done.resumed,
    }


def _hot(options: Options) -> tuple[str, float] | None:
    """Format and share of the busiest experts."""
    from moekit.kernels.formats import Format

    if options.per_expert is None:
        return None
    match = re.fullmatch(r"([\w-]+):(\d*\.?\d+)", options.per_expert)
    if match is None:
        raise ConfigError(f"per_expert must be FORMAT:SHARE, as in int8:0.25, not {options.per_expert!r}")
    if not options.text:
        raise ConfigError("per_expert counts which experts are busy: give --text too")
    Format.parse(match[1])
    return match[1], float(match[2])


def _measured(
    options: Options, hot: tuple[str, float] | None, tokenizer: Any, console: Console
) -> tuple[Decoder, QuantReport, Quality]:
    """Read whole, measured, quantised, measured again."""
    from moekit.adapt import hottest, quantise
    from moekit.commands.progress import ShareProgress
    from moekit.models import load_decoder
    from moekit.train.data import Rows, find_files, tokenise
    from moekit.train.quality import measured_quality

    with console.status("reading the model"):
        decoder = load_decoder(options.model).float()
    length = min(options.sequence_length, decoder.config.max_position_embeddings)
    with tempfile.TemporaryDirectory(prefix="moekit-") as cache:
        rows = Rows(tokenise(find_files(options.text), tokenizer, Path(cache), "text"), length)
        reports: list[QuantReport] = []

        def change(routing: Any) -> None:
            per_expert = None
            if hot is not None:
                per_expert = hottest(routing.counts_ME.tolist(), routing.layers, hot[1], hot[0], options.quant)
            with ShareProgress(console, "quantising") as bar:
                reports.append(
                    quantise(decoder, options.quant, head=options.head, per_expert=per_expert, progress=bar.on_part)
                )

        with ShareProgress(console, "measuring") as bar:
            quality = measured_quality(decoder, rows, change, max_rows=options.rows, progress=bar.on_part)
    return decoder, reports[0], quality


def _tell(options: Options, report: QuantReport, quality: Quality | None, console: Console) -> None:
    console.print(_table(report))
    before, after = report.bytes_before, report.bytes_after
    console.print(
        f"all       {readable_bytes(before)} → {readable_bytes(after)}, {report.bits_per_weight:.2f} bits a weight"
    )
    covered, experts = report.expert_bytes
    if experts:
        console.print(f"experts   {covered / experts:.0%} of their {readable_bytes(experts)} packed")
    for name, number, size, why in _kept(report):
        console.print(f"kept      {number} × {name}, {readable_bytes(size)}: {why}", markup=False, highlight=False)
    for each in report.worst(WORST):
        console.print(f"worst     {each.name}, {each.error:.4f} off in {each.format}", markup=False, highlight=False)
    if quality is not None:
        console.print(
            f"quality   perplexity {quality.before:.3f} → {quality.after:.3f} ({quality.rise:+.2%}), "
            f"mean KL {quality.kl:.5f}, {quality.tokens:,} tokens"
        )
    console.print(f"next      moekit chat {options.out}", markup=False)


def _table(report: QuantReport) -> Table:
    """A line for every kind of matrix; layers are counted together."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("matrices", "", "format"):
        table.add_column(column, no_wrap=True)
    for column in ("before", "after", "worst error"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Any]] = {}
    for each in report.packed:
        groups.setdefault((_kind(each.name), each.format), []).append(each)
    for (kind, format), members in groups.items():
        before, after = (
            readable_bytes(sum(getattr(m, f"bytes_{when}") for m in members)) for when in ("before", "after")
        )
        worst = max(member.error for member in members)
        table.add_row(kind, f"{len(members)} ×", format, before, after, f"{worst:.4f}")
    return table


def _kept(report: QuantReport) -> list[tuple[str, int, int, str]]:
    """(kind, how many, bytes, why) of what was not packed, vectors together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for each in report.kept:
        name = "norms and biases" if each.why == "a vector" else _kind(each.name)
        groups.setdefault((name, each.why), []).append(each.bytes_after)
    return [(name, len(sizes), sum(sizes), why) for (name, why), sizes in groups.items()]


def _kind(name: str) -> str:
    """layers.3.attn.q_proj.weight → attn.q_proj, whatever the layer."""
    return re.sub(r"^layers\.\d+\.|\.weight$", "", name)
