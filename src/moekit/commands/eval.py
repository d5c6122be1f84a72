"""`moekit eval`: the perplexity of a model on text, and how its experts shared the work."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.budget import tell_budget
from moekit.commands.options import ModelPath
from moekit.config import Autocast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moekit.train import Evaluation, LayerRouting


@dataclass(frozen=True)
class Options:
    """Measure the perplexity of a model on text, and the balance of its experts."""

    model: ModelPath
    """Folder in Hugging Face layout or of `moekit pack`, or a .gguf file."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")]
    """Files, folders or globs of .txt, .md, .jsonl or .parquet."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    sequence_length: int = 256
    """Tokens in a row; a token is predicted from those before it in its row and document."""
    batch_size: int = 4
    """Rows computed at a time."""
    autocast: Autocast = "auto"
    """Compute dtype over the stored weights; a packed model computes in float32."""
    memory: str | None = None
    """What the whole process may take, as in 8GB: the experts of a packed model then come from disk as needed."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Evaluate; returns perplexity, tokens and the measures of each MoE layer."""
    import moekit

    with console.status("reading the model"):
        model = moekit.load(options.model, memory=options.memory)
    tell_budget(model, console)
    with tempfile.TemporaryDirectory(prefix="moekit-") as cache:
        result = _evaluate(model.decoder, model.tokenizer, options, Path(cache), console)
    console.print(f"perplexity  {result.perplexity:.3f}")
    console.print(f"tokens      {result.tokens:,}")
    layers = result.routing.report()
    if layers:
        console.print(_table(layers))
    return {
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "routing": result.routing.as_dict(),
    }


def _evaluate(decoder: Any, tokenizer: Any, options: Options, cache: Path, console: Console) -> Evaluation:
    from rich.progress import Progress

    from moekit.train import perplexity_of_files

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        return perplexity_of_files(
            decoder,
            tokenizer,
            options.data,
            cache,
            text_field=options.text_field,
            sequence_length=min(options.sequence_length, decoder.config.max_position_embeddings),
            autocast=options.autocast,
            batch_size=options.batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _table(layers: list[LayerRouting]) -> Table:
    from rich.table import Table

    names = ("layer", "experts used", "entropy", "MaxVio", "balance score", "idle experts")
    table = Table(*names, title="balance of the experts", title_justify="left")
    for one in layers:
        idle = ", ".join(map(str, one.dead_experts[:8])) + (" …" if len(one.dead_experts) > 8 else "")
        table.add_row(
            str(one.layer),
            f"{one.utilisation:.0%}",
            f"{one.entropy:.3f}",
            f"{one.max_vio:.2f}",
            f"{one.balance_score:.3f}",
            idle or "-",
        )
    return table
