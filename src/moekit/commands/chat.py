"""`moekit chat`: a conversation in the terminal, or over pipes, one line a turn."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moekit.commands.budget import tell_budget
from moekit.commands.generate import summary
from moekit.commands.heat import heat_table
from moekit.commands.options import DType, ModelPath, Sampling
from moekit.config import SamplingConfig
from moekit.errors import MoekitError

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.engine import Model

HELP = """\
/stats        speed of the last answer, and which experts worked on it
/system TEXT  start again with this instruction to the model
/reset        start again
/help         this list
/quit         leave (so do Ctrl-D, and Ctrl-C at the prompt); Ctrl-C during an answer stops the answer"""


@dataclass(frozen=True)
class Options:
    """Talk to a model. In the conversation, /help lists the commands."""

    model: ModelPath
    """Folder in Hugging Face layout or of `moekit pack`, or a .gguf file."""
    system: str = ""
    """Instruction to the model, before the conversation."""
    dtype: DType | None = None
    """Compute in this format; the stored one when not given."""
    memory: str | None = None
    """What the whole process may take, as in 8GB: the experts of a packed model then come from disk as needed."""
    sampling: Sampling = field(default_factory=lambda: SamplingConfig(max_new_tokens=512, temperature=0.7, top_p=0.9))


def run(options: Options, console: Console) -> dict[str, Any]:
    """Talk until the user leaves; returns the conversation."""
    import moekit

    model = moekit.load(options.model, dtype=options.dtype, memory=options.memory)
    tell_budget(model, console)
    conversation = Conversation(model, options, console)
    _keep_line_history()
    while (line := _read_line(console)) is not None:
        if not conversation.take(line.strip()):
            break
    return {"messages": conversation.messages, "answers": conversation.answers}


class Conversation:
    """What was said, and what the next line does to it.

    With a chat template the model sees the messages; without one, all the text so far, to continue.
    """

    def __init__(self, model: Model, options: Options, console: Console) -> None:
        self.model, self.console = model, console
        self.answers = 0
        self.messages: list[dict[str, str]] = []
        self._sampling = dataclasses.asdict(options.sampling)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: console.print(HELP, markup=False, highlight=False),
            "/reset": lambda _: self.restart(self._system),
            "/stats": lambda _: self.show_stats(),
            "/system": self.restart,
        }
        self.restart(options.system)
        if not model.can_chat:
            console.print("This model has no chat template: it continues what you write instead of answering.")

    def restart(self, system: str) -> None:
        """Forget everything but the instruction."""
        self._system = system
        self._session = self.model.new_session()
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """Obey or answer one line; False when it says to leave."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/"):
            self.console.print(f"unknown command {command}; /help lists them", markup=False, highlight=False)
        elif line:
            self._answer(line)
        return True

    def show_stats(self) -> None:
        """Figures of the last answer, and its experts."""
        stats = self.model.last_stats
        if stats is None:
            self.console.print("no answer yet")
            return
        self.console.print(summary(stats), highlight=False)
        self.console.print(f"{stats.reused_tokens} of the prompt's tokens came from the cache", highlight=False)
        if stats.expert_counts:
            self.console.print(heat_table(stats.expert_counts, self.model.config.moe_layers))

    def _answer(self, line: str) -> None:
        """Stream an answer; a Ctrl-C stops it and what was said stays, an error undoes the turn."""
        self.messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            for piece in self.model.stream(self._prompt(), session=self._session, **self._sampling):
                pieces.append(piece)
                self.console.out(piece, end="", highlight=False)
            self.console.print()
        except KeyboardInterrupt:
            self.console.print(" (stopped)", style="dim", highlight=False)
        except MoekitError as error:
            self.messages.pop()
            self.console.print(f"{error}; /reset starts again", markup=False, highlight=False)
            return
        self.answers += 1
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> str | list[dict[str, str]]:
        if self.model.can_chat:
            return self.messages
        return "".join(message["content"] for message in self.messages)


def _read_line(console: Console) -> str | None:
    """The next line, None at the end of input or at Ctrl-C; the prompt is shown to people only."""
    try:
        return input("> " if sys.stdin.isatty() and not console.stderr else "")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _keep_line_history() -> None:
    """Arrow keys recall earlier lines, where Python was built with readline."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401 — importing it is what turns it on
        except ImportError:
            return
