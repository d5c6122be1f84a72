"""`moekit study`: one question, many small trainings, a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moekit.commands.samples import PLAYS, require, split_plays
from moekit.errors import ConfigError
from moekit.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Options:
    """Train every router at equal budget on the same text, with several seeds, and compare them."""

    topic: Annotated[Literal["routers"], tyro.conf.Positional]
    """What is varied: routers."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Files, folders or globs to learn from; Shakespeare's plays from `make install` when not given."""
    valid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Held-out files; needed with --data."""
    out: Path = Path("runs/study-routers")
    """Folder for results.jsonl, summary.json and routers.png. A study that was interrupted goes on from there."""
    seeds: int = 3
    """Trainings of each router."""
    steps: int = 600
    """Optimizer steps of each."""
    batch_size: int = 16
    """Rows of 128 bytes in a step."""
    fast: bool = False
    """80 steps of 8 rows, for a first look in some minutes."""
    samples: Path = Path(".samples")
    """Where `make install` put the plays."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the study; returns the rows of the table, and every single outcome."""
    import dataclasses
    import json

    from moekit.commands.progress import StudyProgress
    from moekit.config.base import positive
    from moekit.plan import parameters
    from moekit.train.study import ROUTER_CONTENDERS, Study, draw, model_config, summarise

    positive(options, "seeds", "steps", "batch_size")
    train, valid = _files(options)
    steps, batch_size = (80, 8) if options.fast else (options.steps, options.batch_size)
    study = Study(options.out, train, valid, steps, batch_size)
    seeds = range(options.seeds)
    with StudyProgress(console, len(ROUTER_CONTENDERS) * options.seeds) as progress:
        outcomes = study.run(ROUTER_CONTENDERS, seeds, progress.on_outcome)
    rows = summarise(outcomes)
    active = {each.name: parameters(model_config(each)).active for each in ROUTER_CONTENDERS}
    rows = [{**row, "active": active[row["contender"]]} for row in rows]
    title = f"Routers at equal budget: {steps} steps of {batch_size} × 128 bytes, {options.seeds} seeds"
    picture = options.out / "routers.png"
    draw(rows, title, picture)
    result = {"rows": rows, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes], "picture": str(picture)}
    write_atomic(options.out / "summary.json", json.dumps(result, indent=2) + "\n")
    console.print(_table(rows, title))
    console.print("loss: held out, nats a byte; uneven: σ ÷ mean of the experts' tokens; k: experts a token chose")
    console.print("expert_choice is absent: it looks at later tokens, which a model that predicts them refuses")
    console.print(f"picture   {picture}", markup=False, highlight=False)
    return result


def _files(options: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to learn from, and what is held out."""
    if bool(options.data) != bool(options.valid):
        raise ConfigError("give --data and --valid together, or neither for the plays")
    if options.data:
        return options.data, options.valid
    return split_plays(require(options.samples, PLAYS))


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("router", no_wrap=True)
    for column in ("loss", "± sd", "uneven", "dropped", "k", "active", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['loss']:.3f}",
            f"{row['loss_sd']:.3f}",
            f"{row['balance']:.2f}",
            f"{row['dropped']:.0%}",
            f"{row['mean_k']:.2f}",
            f"{row['active'] / 1000:,.0f} k",
            f"{row['tokens_per_s'] / 1000:.1f} k",
        )
    return table
