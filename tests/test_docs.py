"""What the pages name exists: tests, other pages, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moekit import cli
from moekit.models.archs import ARCHS
from moekit.models.gguf_archs import GGUF_ARCHS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_pages_and_commands_exist(page):
    text = page.read_text()
    for name in re.findall(r"docs/([\w-]+\.md)", text):
        assert (ROOT / "docs" / name).is_file(), f"{page.name} names docs/{name}"
    for verb in re.findall(r"`moekit ([a-z]+)", text):
        assert verb in cli.VERBS, f"{page.name} names the command {verb}"


def test_the_page_of_families_has_every_row():
    rows = re.findall(r"^\| ([\w-]+) \|(?: yes)? \|(?: ([\w-]+))? \|", (ROOT / "docs/families.md").read_text(), re.M)
    there = {name: GGUF_ARCHS[name].name if name in GGUF_ARCHS else "" for name in ARCHS}
    assert dict(rows) == there
