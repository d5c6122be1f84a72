"""`moekit train`: a model and text in; a trained model, its metrics and its routing out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.commands.options import ModelPath
from moekit.config import DataConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.models.decoder import Decoder
    from moekit.train import Trainer, TrainResult


@dataclass(frozen=True)
class Options:
    """Train a model on text. Run the same command again to go on after an interruption."""

    model: ModelPath
    """Folder in Hugging Face layout, or a .gguf file."""
    out: str
    """Folder of the run: the trained model, its metrics and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Train to the last step and write `out/model`; returns the last metrics and the balance of each layer."""
    from moekit.commands.progress import TrainingProgress
    from moekit.models import load_decoder, load_tokenizer, save_decoder
    from moekit.train import Trainer, prepare

    out = Path(options.out)
    with console.status("reading the text"):
        tokenizer = load_tokenizer(options.model)
        data = prepare(options.data, tokenizer, out / "tokens")
    with console.status("reading the model"):
        decoder = load_decoder(options.model)
        stored = decoder.embed.weight.dtype
        _check_length(decoder, options.data)
    with TrainingProgress(console, options.train.steps) as progress:
        trainer = Trainer(decoder, data, options.train, out, on_step=progress.on_step)
        _announce(trainer, console)
        result = trainer.run()
    with console.status("writing the model"):
        save_decoder(decoder, out / "model", dtype=stored)
        tokenizer.save(out / "model")
        if decoder.config.moe_layers:
            result.routing.save_heatmap(out / "routing.png")
    _tell(result, out, console)
    return _summary(result, out)


def _check_length(decoder: Decoder, data: DataConfig) -> None:
    from moekit.errors import ContextLengthError

    longest = decoder.config.max_position_embeddings
    if data.sequence_length > longest:
        raise ContextLengthError(
            f"data.sequence_length is {data.sequence_length}, but the model's context holds {longest} tokens"
        )


def _announce(trainer: Trainer, console: Console) -> None:
    rows, valid = trainer.data.train, trainer.data.valid
    held_out = f", {valid.num_tokens:,} held out" if valid else ""
    console.print(f"text      {rows.num_tokens:,} tokens in {rows.num_documents:,} documents{held_out}")
    if trainer.step:
        console.print(f"going on  from step {trainer.step} of {trainer.config.steps}", markup=False)


def _tell(result: TrainResult, out: Path, console: Console) -> None:
    from moekit.commands.heat import heat_table

    if result.last is not None:
        console.print(f"trained   {result.steps} steps, loss {result.last.lm_loss:.3f}, {result.seconds:.0f} s")
    if result.evaluation is not None:
        console.print(f"held out  perplexity {result.evaluation.perplexity:.2f}")
    if result.routing.layers:
        console.print(heat_table(result.routing.counts_ME.tolist(), result.routing.layers))
    console.print(f"model     {out / 'model'}", markup=False)


def _summary(result: TrainResult, out: Path) -> dict[str, Any]:
    seen = result.evaluation
    return {
        "model": str(out / "model"),
        "metrics": str(out / "metrics.jsonl"),
        "steps": result.steps,
        "seconds": result.seconds,
        "last": asdict(result.last) if result.last else None,
        "valid": {"perplexity": seen.perplexity, "nll": seen.nll, "tokens": seen.tokens} if seen else None,
        "routing": result.routing.as_dict(),
    }
