"""`moekit quickstart`: a real dense model becomes a Mixture of Experts, learns from real text, and talks.

The sparse model starts as the dense one, up to rounding, and both learn from the same rows at equal active FLOPs,
so that what the table shows is the difference the experts made, whichever way it goes.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.commands.samples import HELD_OUT, MODEL, PLAYS, require, split_plays
from moekit.config import DataConfig, TrainConfig, UpcycleConfig
from moekit.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moekit.models import Decoder, Tokenizer
    from moekit.train import Evaluation, TrainingData

PROMPT = "## ACT I\n\n### SCENE I. A forest.\n\n_Enter a KING and a FOOL_\n\n**KING**  \n"
LR = 2e-4
# A few dozen steps are too few for the halves of an MLP to learn to do without each other, so pairs must stay pairs.
ROUTER_LR_SCALE = 0.01


@dataclass(frozen=True)
class Options:
    """Make a dense model into a Mixture of Experts, train both on Shakespeare, compare them, save and sample it."""

    out: str = "runs/quickstart"
    """Folder for the model, the figures and the picture. An interrupted run goes on from here."""
    samples: str = ".samples"
    """Folder of the sample model and the plays."""
    steps: int = 20
    """Optimizer steps of each model, of 4 rows of 256 tokens."""
    fast: bool = False
    """3 steps on shorter rows: shows that everything works, and no more."""


@dataclass
class Contender:
    """One of the two models, and what has been measured of it."""

    name: str
    decoder: Decoder
    before: Evaluation
    after: Evaluation
    seconds: float = 0.0


def run(options: Options, console: Console) -> dict[str, Any]:
    """Do the job; returns what `summary.json` holds."""
    started, out = time.perf_counter(), Path(options.out)
    samples = require(Path(options.samples), MODEL, PLAYS)
    _forget_finished_run(out)
    eval_rows = 8 if options.fast else 32
    steps = 3 if options.fast else options.steps
    config = TrainConfig(steps=steps, lr=LR, router_lr_scale=ROUTER_LR_SCALE, warmup_steps=2, save_every=0)
    console.print(f"[bold]1[/]  opening {samples / MODEL}")
    tokenizer, decoder, data = _open(samples, out, 128 if options.fast else 256)
    console.print("[bold]2[/]  upcycling: 8 experts of half an MLP in every layer, 2 of them for a token")
    contenders = _upcycle(decoder, data, eval_rows, console)
    del decoder
    console.print(f"[bold]3[/]  training both on {data.train.num_documents} plays, {len(HELD_OUT)} held out")
    for contender in contenders:
        _train(contender, data, config, out / "train" / contender.name, console)
        contender.after = _evaluate(contender.name, contender.decoder, data, eval_rows, console)
    dense, moe = contenders
    console.print(f"[bold]4[/]  writing {out / 'model'} and reading it back")
    _save(moe, tokenizer, out)
    sample = _sample(out / "model")
    summary = _summary(dense, moe, config) | {
        "sample": sample,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": _peak_rss_mb(),
    }
    write_atomic(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _tell(dense, moe, summary, out, console)
    return summary


def _forget_finished_run(out: Path) -> None:
    """Start afresh where a run came to its end; where one was interrupted there is no summary, and it goes on."""
    if (out / "summary.json").exists():
        (out / "summary.json").unlink()
        shutil.rmtree(out / "train", ignore_errors=True)


def _open(samples: Path, out: Path, sequence_length: int) -> tuple[Tokenizer, Decoder, TrainingData]:
    """The dense model as float32 and the plays as rows of tokens."""
    from moekit.models import load_decoder, load_tokenizer
    from moekit.train import prepare

    tokenizer = load_tokenizer(samples / MODEL)
    plays, held_out = split_plays(samples)
    config = DataConfig(train=plays, valid=held_out, sequence_length=sequence_length)
    return tokenizer, load_decoder(samples / MODEL), prepare(config, tokenizer, out / "tokens")


def _upcycle(dense: Decoder, data: TrainingData, rows: int, console: Console) -> list[Contender]:
    """The dense model and the sparse one made of it, both measured before training."""
    from moekit.adapt import upcycle

    contenders = []
    for name, decoder in (("dense", dense), ("moe", upcycle(dense, UpcycleConfig()))):
        before = _evaluate(name, decoder, data, rows, console)
        contenders.append(Contender(name, decoder, before, before))
    dense_ppl, moe_ppl = (contender.before.perplexity for contender in contenders)
    console.print(
        f"   held-out perplexity: dense {dense_ppl:.3f}, MoE {moe_ppl:.3f}, "
        f"{abs(moe_ppl / dense_ppl - 1):.1e} apart before training"
    )
    return contenders


def _evaluate(name: str, decoder: Decoder, data: TrainingData, rows: int, console: Console) -> Evaluation:
    """Held-out perplexity on `rows` rows spread over the four plays."""
    from moekit.train import perplexity

    assert data.valid is not None
    with console.status(f"measuring the {name} model on {rows} held-out rows"):
        return perplexity(decoder, data.valid, batch_size=8, max_rows=rows)


def _train(contender: Contender, data: TrainingData, config: TrainConfig, folder: Path, console: Console) -> None:
    """Train in place. Checkpoints are written on Ctrl-C alone: the model itself is what the run leaves."""
    from moekit.commands.progress import TrainingProgress
    from moekit.train import Trainer

    with TrainingProgress(console, config.steps, title=f"   {contender.name}") as progress:
        trainer = Trainer(contender.decoder, data, config, folder, on_step=progress.on_step)
        result = trainer.run(evaluate=False)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    contender.seconds = result.seconds
    speed = f"{result.last.tokens / result.seconds:,.0f} tokens/s" if result.last else "trained before"
    console.print(f"   {contender.name:<6}{config.steps} steps in {result.seconds:.0f} s, {speed}")


def _save(moe: Contender, tokenizer: Tokenizer, out: Path) -> None:
    """The model in Hugging Face layout (Mixtral's, bfloat16) and the picture of its routing."""
    import torch

    from moekit.models import save_decoder

    save_decoder(moe.decoder, out / "model", dtype=torch.bfloat16)
    tokenizer.save(out / "model")
    moe.after.routing.save_heatmap(out / "routing.png")


def _sample(model: Path) -> str:
    """A passage by the model as it was written."""
    from moekit.engine import load

    text: str = load(model).generate(PROMPT, max_new_tokens=80, temperature=0.8, top_p=0.95, seed=1)
    return text


def _summary(dense: Contender, moe: Contender, config: TrainConfig) -> dict[str, Any]:
    import torch

    from moekit.plan import flops_per_token, parameters

    count, routing = parameters(moe.decoder.config), moe.after.routing
    return {
        "dense_ppl_before": dense.before.perplexity,
        "moe_ppl_before": moe.before.perplexity,
        "dense_ppl_after": dense.after.perplexity,
        "moe_ppl_after": moe.after.perplexity,
        "dense_params": parameters(dense.decoder.config).total,
        "total_params": count.total,
        "active_params": count.active,
        "flops_ratio": flops_per_token(moe.decoder.config) / flops_per_token(dense.decoder.config),
        "experts_used": routing.experts_used,
        "experts": routing.counts_ME.numel(),
        "balance_score": [layer.balance_score for layer in routing.report()],
        "max_vio": [layer.max_vio for layer in routing.report()],
        "steps": config.steps,
        "held_out_tokens": moe.after.tokens,
        "dense_train_seconds": round(dense.seconds, 1),
        "moe_train_seconds": round(moe.seconds, 1),
        "threads": torch.get_num_threads(),
    }


def _tell(dense: Contender, moe: Contender, summary: dict[str, Any], out: Path, console: Console) -> None:
    from moekit.commands.heat import heat_table

    console.print(_comparison(dense, moe, summary))
    routing = moe.after.routing
    console.print(heat_table(routing.counts_ME.tolist(), routing.layers))
    console.print(f"{summary['experts_used']} of {summary['experts']} experts worked on the held-out plays.")
    console.print(f"{summary['seconds']:.0f} s in all, {summary['peak_rss_mb'] / 1024:.1f} GiB at most.\n")
    console.print("[bold]5[/]  from the model that was read back:\n")
    console.out(PROMPT + summary["sample"], highlight=False)
    console.print(f"\npicture   {out / 'routing.png'}\nfigures   {out / 'summary.json'}", markup=False)
    console.print(f"talk      moekit chat {out / 'model'}", markup=False)
    console.print(f"train     moekit train {out / 'model'} --data.train FILES --out runs/mine", markup=False)


def _comparison(dense: Contender, moe: Contender, summary: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("", title="Two models, the same text, the same work a token", title_justify="left")
    for column in ("dense", "Mixture of Experts"):
        table.add_column(column, justify="right")
    for when in ("before", "after"):
        table.add_row(f"held-out perplexity {when}", *(f"{getattr(c, when).perplexity:.2f}" for c in (dense, moe)))
    table.add_row("parameters", f"{summary['dense_params']:,}", f"{summary['total_params']:,}")
    table.add_row("active for a token", f"{summary['dense_params']:,}", f"{summary['active_params']:,}")
    table.add_row("FLOPs a token", "1", f"{summary['flops_ratio']:.3f}")
    table.add_row("training, seconds", f"{dense.seconds:.0f}", f"{moe.seconds:.0f}")
    return table


def _peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
