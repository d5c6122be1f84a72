"""Two folders compared, for tests of what is written."""

from __future__ import annotations

from pathlib import Path


def same(folder: Path, other: Path) -> None:
    """Assert that both hold the same files, byte for byte."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
