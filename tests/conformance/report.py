"""Asks every library every trap, and writes docs/conformance.md from the answers.

`make conformance` compares the statuses with the page and exits with 1 and the differences; `WRITE=--write` writes
results.json and the page. A library that cannot be imported keeps the answers it gave before.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance import compute, lifecycle, losses, routing
from conformance.adapter import Adapter, run
from conformance.judge import Finding, status_of

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "conformance.md"
TRAPS = {**losses.TRAPS, **routing.TRAPS, **compute.TRAPS, **lifecycle.TRAPS}
# Library → the module and class that answers for it.
ADAPTERS = {
    "moekit": ("on_moekit_models", "MoekitModels"),
    "transformers": ("on_transformers_models", "TransformersModels"),
    "peft": ("on_peft", "Peft"),
    "torchtitan": ("on_torchtitan", "Torchtitan"),
}
TITLES = {"peft": "PEFT"}


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def adapter_of(library: str) -> Adapter:
    module, cls = ADAPTERS[library]
    adapter: Adapter = getattr(importlib.import_module(f"conformance.{module}"), cls)()
    return adapter


def ask(library: str) -> dict[str, Any]:
    """Its version and every finding, as results.json keeps them."""
    adapter = adapter_of(library)
    findings = {str(number): run(trap, number, adapter) for number, (_, trap) in TRAPS.items()}
    return {
        "version": adapter.version,
        "remarks": {str(number): remark for number, remark in adapter.remarks.items()},
        "traps": {number: [_kept(finding) for finding in found] for number, found in findings.items()},
    }


def recorded() -> dict[str, Any]:
    """What results.json holds."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def findings_of(result: Mapping[str, Any], number: int) -> list[Finding]:
    """One library's findings for a trap."""
    return [Finding(*entry) for entry in result["traps"][str(number)]]


def statuses(result: Mapping[str, Any]) -> dict[str, str]:
    """Status by 'trap number: check', for comparing."""
    return {f"{number}: {finding.what}": finding.status for number in TRAPS for finding in findings_of(result, number)}


def page(results: Mapping[str, Any]) -> str:
    """The whole of docs/conformance.md."""
    checks = "\n\n".join(_checks(number, results) for number in TRAPS)
    return (HERE / "page.md").read_text().replace("{traps}", _overview(results)).replace("{checks}", checks)


def _overview(results: Mapping[str, Any]) -> str:
    names = [f"{TITLES.get(library, library)} {result['version']}" for library, result in results.items()]
    rows = []
    for number, (title, _) in TRAPS.items():
        found = [findings_of(result, number) for result in results.values()]
        rows.append([str(number), title, *map(_cell, found)])
    return _table(["", "trap", *names], rows)


def _cell(findings: list[Finding]) -> str:
    """A trap's status and the largest deviation that belongs to it."""
    status = status_of(findings)
    wanted = "fail" if status == "fail" else "pass"
    numbers = [f.deviation for f in findings if f.status == wanted and f.deviation is not None]
    if status == "fail" and not numbers:
        return "**fail**: an error"
    shown = f" {_number(max(numbers))}" if numbers and status in ("pass", "partly", "fail") else ""
    return f"**fail**{shown}" if status == "fail" else f"{status}{shown}"


def _checks(number: int, results: Mapping[str, Any]) -> str:
    """One trap's checks, with what else there is to say about them."""
    by_library = {library: findings_of(result, number) for library, result in results.items()}
    asked = {library: found for library, found in by_library.items() if status_of(found) not in ("n/a",)}
    rows = []
    for index, finding in enumerate(next(iter(by_library.values()))):
        rows.append([finding.what, *(_short(found[index]) for found in asked.values())])
    lines = [f"### {number}. {TRAPS[number][0]}", "", _table(["", *(TITLES.get(name, name) for name in asked)], rows)]
    notes = [
        f"- {TITLES.get(library, library)}: {note}" for library in asked for note in _notes(results[library], number)
    ]
    return "\n".join([*lines, "", *notes]).strip()


def _notes(result: Mapping[str, Any], number: int) -> list[str]:
    """Remarks, the parts that failed, and why something is absent; each once."""
    remark = result["remarks"].get(str(number))
    told = [remark] if remark else []
    for finding in findings_of(result, number):
        if finding.note:
            told.append(f"{finding.what}: {finding.note}" if finding.status == "fail" else f"{finding.note}")
    return list(dict.fromkeys(told))


def _short(finding: Finding) -> str:
    status = "**fail**" if finding.status == "fail" else finding.status
    return status if finding.deviation is None else f"{status} {_number(finding.deviation)}"


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _kept(finding: Finding) -> list[Any]:
    return [finding.what, finding.status, finding.deviation, finding.note]


def dumped(results: Mapping[str, Any]) -> str:
    """results.json, a line for each check."""
    text = json.dumps(results, ensure_ascii=False, indent=1)
    return re.sub(r"\n {4,}(?!\[)", " ", text) + "\n"


def main(args: list[str]) -> int:
    """0 if every status is as recorded (or was written), else 1."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = recorded()
    results = {library: ask(library) if installed(library) else before.get(library) for library in ADAPTERS}
    results = {library: result for library, result in results.items() if result is not None}
    if args == ["--write"]:
        RESULTS.write_text(dumped(results))
        PAGE.write_text(page(results))
        return 0
    changed = [
        f"{library}, {check}: {status}, recorded as {statuses(before[library]).get(check)}"
        for library, result in results.items()
        for check, status in statuses(result).items()
        if library not in before or statuses(before[library]).get(check) != status
    ]
    print("\n".join(changed) or "every answer is as recorded")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
