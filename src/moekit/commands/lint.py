"""`moekit lint`: what a configuration gets wrong without a word, before a run finds out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.lint import lint_file

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Options:
    """Name the silent mistakes of a configuration, each with its cause and its remedy; exit code 1 for an error."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A model folder, a config.json of transformers, the state.json of a checkpoint, or one of moekit's
    configurations as JSON."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the findings; returns them, and "ok" without errors."""
    findings = lint_file(options.config)
    for finding in findings:
        console.print(f"[{COLOURS[finding.level]}]{finding.level:<8}[/][bold]{finding.name}[/]  ", end="")
        console.print(finding.seen, markup=False, highlight=False)
        for label, text in (("why", finding.cause), ("do", finding.remedy)):
            console.print(f"        {label:<4} {text}", markup=False, highlight=False, soft_wrap=True)
    numbers = {level: sum(finding.level == level for finding in findings) for level in COLOURS}
    if findings:
        counted = ", ".join(f"{number} {level}{'s' * (number != 1)}" for level, number in numbers.items() if number)
        console.print(f"{counted} in {options.config}", markup=False, highlight=False)
    else:
        console.print(f"nothing to say about {options.config}", markup=False, highlight=False)
    return {"findings": [dataclasses.asdict(finding) for finding in findings], "ok": numbers["error"] == 0}
