"""`moekit generate`: one prompt, one text, streamed as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.budget import experts_line, tell_budget
from moekit.commands.options import DType, ModelPath, Sampling
from moekit.config import SamplingConfig
from moekit.config.base import check
from moekit.files import read_json

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.engine import GenerationStats


@dataclass(frozen=True)
class Options:
    """Continue a prompt."""

    model: ModelPath
    """Folder in Hugging Face layout or of `moekit pack`, or a .gguf file."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's message."""
    system: str = ""
    """With --chat: instruction to the model, before the message."""
    tools: Path | None = None
    """With --chat: JSON file {"tools": [...]} with what the model may call, as in a request to OpenAI's API."""
    logprobs: int | None = None
    """For --json: the log-probability of each token, and of this many of the most likely ones beside it."""
    dtype: DType | None = None
    """Compute in this format; the stored one when not given."""
    memory: str | None = None
    """What the whole process may take, as in 8GB: the experts of a packed model then come from disk as needed."""
    sampling: Sampling = field(default_factory=SamplingConfig)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Stream the text; returns it with its tokens and the figures of `GenerationStats`."""
    import dataclasses

    import moekit

    prompt, tools = _prompt(options), options.tools and _tools(options.tools)
    model = moekit.load(options.model, dtype=options.dtype, memory=options.memory)
    tell_budget(model, console)
    stream = model.stream(prompt, tools=tools, logprobs=options.logprobs, **dataclasses.asdict(options.sampling))
    for piece in stream:
        console.out(piece, end="", highlight=False)
    completion = stream.completion
    console.print(f"\n{summary(completion.stats)}", style="dim", highlight=False)
    return completion.to_dict()


def _prompt(options: Options) -> str | list[dict[str, str]]:
    if not options.chat:
        check(not (options.system or options.tools), "--system and --tools are for a chat: add --chat")
        return options.prompt
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": options.prompt}]


def _tools(path: Path) -> list[Any]:
    tools: Any = read_json(path).get("tools")
    check(isinstance(tools, list), f'{path} must hold {{"tools": [...]}}')
    return tools


def summary(stats: GenerationStats) -> str:
    """A line of figures; of a model within a budget two."""
    endings = {
        "stop": "the model ended its text",
        "length": "max_new_tokens reached",
        "context": "the model's context is full",
        "cancelled": "interrupted",
    }
    experts = "" if stats.experts is None else f"\n{experts_line(stats.experts)}"
    return (
        f"{stats.prompt_tokens} + {stats.new_tokens} tokens, first after {stats.time_to_first_token:.2f} s, "
        f"then {stats.decode_tokens_per_second:.1f} a second; {endings[stats.finish_reason]}{experts}"
    )
