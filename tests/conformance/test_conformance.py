"""moekit falls into none of the traps, docs/conformance.md says what the others do, and its findings can be run."""

from __future__ import annotations

import importlib
import re
import warnings
from importlib.metadata import version

import pytest

from conformance import report
from conformance.adapter import run
from conformance.judge import status_of

# What moekit does not have yet: expert parallelism, growing and pruning, expert LoRA.
ABSENT = {28, 29, 30, 31, 33, 34}
OTHERS = sorted(set(report.ADAPTERS) - {"moekit"})
RECORDED = report.recorded()


@pytest.fixture(scope="module")
def moekit():
    return report.adapter_of("moekit")


@pytest.mark.parametrize("number", report.TRAPS)
def test_moekit(moekit, number):
    findings = run(report.TRAPS[number][1], number, moekit)
    assert [finding for finding in findings if finding.status == "fail"] == []
    assert (status_of(findings) == "absent") == (number in ABSENT)
    recorded = [finding.status for finding in report.findings_of(RECORDED["moekit"], number)]
    assert [finding.status for finding in findings] == recorded, "run: make conformance WRITE=--write"


@pytest.mark.parametrize("library", OTHERS)
def test_others_are_as_the_page_says(library):
    need(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answered = report.ask(library)
    assert report.statuses(answered) == report.statuses(RECORDED[library])


def test_page_is_made_of_the_recorded_answers():
    assert report.PAGE.read_text() == report.page(RECORDED), "run: make conformance WRITE=--write"
    assert {"moekit", "transformers"} <= set(RECORDED)


def snippets() -> list:
    """The Python blocks of the findings, named by the title above."""
    sections = report.PAGE.read_text().split("\n### ")
    return [
        pytest.param(code, id=section.splitlines()[0])
        for section in sections
        for code in section.split("```python\n")[1:]
    ]


@pytest.mark.parametrize("code", snippets())
def test_snippets_print_what_they_say(code, capsys):
    code = code.partition("```")[0]
    for library in OTHERS:
        if re.search(rf"^(import|from) {library}\b", code, flags=re.M):
            need(library)
    expected = re.findall(r"# → (.*)", code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, str(report.PAGE), "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed == [part.strip() for line in expected for part in line.split("|")]


def test_every_failure_has_a_finding():
    """A trap that a library fails is named in the title of a finding about it."""
    titles = re.findall(r"^### (.*\(traps? .*\))$", report.PAGE.read_text(), flags=re.M)
    for library in OTHERS:
        name = report.TITLES.get(library, library)
        about = [title for title in titles if name in title.split(":")[0]]
        told = {int(number) for title in about for number in re.findall(r"\d+", title[title.rindex("(") :])}
        failed = {n for n in report.TRAPS if status_of(report.findings_of(RECORDED[library], n)) == "fail"}
        assert failed - told == set(), f"{library} fails traps that no finding explains"


def need(library: str) -> None:
    """Skip where the library is not installed, or in another version than the page is about."""
    if not report.installed(library):
        pytest.skip(f"{library} is not installed")
    if version(library) != RECORDED[library]["version"]:
        pytest.skip(f"the page is about {library} {RECORDED[library]['version']}, not {version(library)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(library)
