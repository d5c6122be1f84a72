"""`moekit generate`: one prompt, one text, streamed as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.options import DType, ModelPath, Sampling
from moekit.config import SamplingConfig

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.engine import GenerationStats


@dataclass(frozen=True)
class Options:
    """Continue a prompt."""

    model: ModelPath
    """Folder in Hugging Face layout, or a .gguf file."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's message."""
    dtype: DType | None = None
    """Compute in this format; the stored one when not given."""
    sampling: Sampling = field(default_factory=SamplingConfig)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Stream the text; returns it with the figures of `GenerationStats`."""
    import dataclasses

    import moekit

    model = moekit.load(options.model, dtype=options.dtype)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    text = ""
    for piece in model.stream(prompt, **dataclasses.asdict(options.sampling)):
        text += piece
        console.out(piece, end="", highlight=False)
    assert model.last_stats is not None
    console.print(f"\n{summary(model.last_stats)}", style="dim", highlight=False)
    return {"text": text, **model.last_stats.to_dict()}


def summary(stats: GenerationStats) -> str:
    """One line of figures."""
    endings = {
        "stop": "the model ended its text",
        "length": "max_new_tokens reached",
        "context": "the model's context is full",
        "cancelled": "interrupted",
    }
    return (
        f"{stats.prompt_tokens} + {stats.new_tokens} tokens, first after {stats.time_to_first_token:.2f} s, "
        f"then {stats.decode_tokens_per_second:.1f} a second; {endings[stats.finish_reason]}"
    )
