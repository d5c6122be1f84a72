"""The command `moekit`: finds the verb, parses its flags, runs it, and turns every ending into an exit code.

It knows no verb's work. A verb is a module `moekit.commands.<verb>` with
  `Options`  a frozen dataclass; its fields become the flags and their docstrings the help,
  `run(options, console) -> dict`  prints for people on the rich console and returns what `--json` prints.
What is wrong with a flag's value is raised by `run`, or by a configuration class inside `Options`.
The module is imported only when its verb is used, and imports torch only inside `run`.

Exit codes: 0 done · 1 a bug of ours, or a result whose "ok" is False · 2 wrong input, said in one line · 130 Ctrl-C or
SIGTERM.
"""

from __future__ import annotations

import difflib
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from moekit import __version__
from moekit.errors import MoekitError, UnknownNameError

__all__ = ["VERBS", "main", "parse", "usage"]

VERBS = {
    "quickstart": "make a dense model into a Mixture of Experts, train it and talk to it, in a few minutes",
    "plan": "count parameters, memory and work of a model before downloading or running it",
    "pull": "download a model from the Hugging Face Hub",
    "upcycle": "turn a dense model into a Mixture of Experts",
    "pack": "quantise a model, to 4 or 8 bits a weight",
    "export": "write a model for other programs: GGUF for llama.cpp, Hugging Face's layout",
    "train": "train or fine-tune a model on text",
    "eval": "measure a model's perplexity on text",
    "generate": "continue a prompt",
    "chat": "talk to a model in the terminal",
    "inspect": "show what a model is made of and which experts work on a text",
    "lint": "name the silent mistakes of a configuration before a run",
    "doctor": "check this machine and this installation",
    "study": "train many small models that differ in one thing, and compare them",
    "bench": "measure speed beside transformers, llama.cpp and the machine's limits",
}

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Keeps the libraries below us from talking over a command's own output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    args, flags = _split_flags(list(sys.argv[1:] if argv is None else argv))
    _print_any_character()
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"moekit {__version__}")
        return 0
    as_json, debug = "--json" in flags, "--debug" in flags
    try:
        with _quiet(), _sigterm_is_ctrl_c():
            return _run_verb(verb, args[1:], as_json)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error, as_json)


def usage() -> str:
    """The text of `moekit --help`, from the table of verbs alone."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return (
        "usage: moekit VERB [options]\n\n"
        "Build, train, adapt, run and observe Mixture-of-Experts models.\n\n"
        f"{verbs}\n\n"
        "with every verb:\n"
        "  --help   its options\n"
        "  --json   the result as one JSON document on stdout; everything else goes to stderr\n"
        "  --debug  the traceback of an error\n\n"
        "moekit --version prints the version."
    )


def parse(verb: str, args: Sequence[str]) -> tuple[ModuleType, Any]:
    """Import the module of `verb` and build its `Options` from `args`.

    Raises:
        UnknownNameError: no such verb; the message names the nearest.
        SystemExit: tyro printed help (code 0) or refused the flags (code 2).
    """
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(VERBS)}"
        raise UnknownNameError(f"unknown verb {verb!r}; {hint}")
    import tyro

    module = importlib.import_module(f"moekit.commands.{verb}")
    options = tyro.cli(
        module.Options,
        prog=f"moekit {verb}",
        description=module.Options.__doc__,
        args=list(args),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return module, options


def _run_verb(verb: str, args: Sequence[str], as_json: bool) -> int:
    try:
        module, options = parse(verb, args)
    except SystemExit as ending:
        return int(ending.code or 0)
    from rich.console import Console

    result = module.run(options, Console(stderr=as_json))
    if as_json:
        print(json.dumps(_finite(result), ensure_ascii=False, indent=2))
    sys.stdout.flush()
    return 0 if result.get("ok", True) else 1


def _split_flags(args: list[str]) -> tuple[list[str], set[str]]:
    """Take the global flags out of everything before `--`."""
    end = args.index("--") if "--" in args else len(args)
    flags = {arg for arg in args[:end] if arg in ("--json", "--debug")}
    return [arg for arg in args[:end] if arg not in flags] + args[end:], flags


def _report(error: BaseException, as_json: bool) -> int:
    """Say in one line on stderr how it ended, and give the exit code."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if isinstance(error, KeyboardInterrupt):
        message, code = ": ".join(["interrupted", *map(str, error.args)]), 130
    elif isinstance(error, MoekitError):
        message, code = " ".join(str(error).split()), 2
    else:
        said = " ".join(str(error).split())
        message, code = f"a bug in moekit: {type(error).__name__}: {said} (run again with --debug for the traceback)", 1
    print(f"moekit: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "type": type(error).__name__}, ensure_ascii=False))
    return code


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _print_any_character() -> None:
    """A terminal that cannot show a character shows a question mark instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """What is being written is removed, and training keeps a checkpoint, whoever asks for the end."""

    def stop(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # ignored, as a shell has it for jobs in the background
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        for module in ("transformers", "torch", "gguf", "huggingface_hub", "tyro"):
            warnings.filterwarnings("ignore", module=module)
        yield
