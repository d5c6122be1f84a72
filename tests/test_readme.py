"""The README tells the truth: its tree names every module, its links exist, its Python runs, its verbs are all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moekit import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; opening and closing fences alternate."""
    parts = re.split(r"^```(\w*)\n", README, flags=re.M)
    return [text for fence, text in zip(parts[1::4], parts[2::4], strict=True) if fence == language]


def test_tree_has_a_line_for_every_module():
    tree = next(block for block in blocks("") if "csrc/" in block)
    named = set(re.findall(r"[\w.]+", "\n".join(line[:38] for line in tree.splitlines())))
    package = ROOT / "src" / "moekit"
    for path in package.rglob("*.py"):
        folder = path.parent.name
        if path.stem in ("__init__", "__main__") or folder == "commands":
            continue
        assert path.stem in named, f"README's tree lacks {path.relative_to(package)}"
    for path in (ROOT / "csrc").glob("*.cpp"):
        assert path.stem.split("_")[0] in named, f"README's tree lacks {path.name}"


def test_every_verb_is_in_the_table_and_has_a_page():
    for verb in cli.VERBS:
        assert f"`moekit {verb}" in README
        assert (ROOT / "docs" / f"{verb}.md").is_file()


def test_links_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"


@pytest.mark.parametrize("code", [block for block in blocks("python") if "runs/quickstart" not in block])
def test_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "grouped_mm" in capsys.readouterr().out
