"""What a model loaded within a budget tells its user: at the start, and after each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.machine import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.adapt.budget import BudgetReport
    from moekit.engine import ExpertStats, Model

__all__ = ["experts_line", "tell_budget"]


def tell_budget(model: Model, console: Console) -> None:
    """Say how memory is divided and what to expect; nothing where all experts are in memory."""
    if model.budget is None:
        return
    report = model.budget.report
    for name, what in _lines(report):
        console.print(f"{name:<9}{what}", style="dim", highlight=False, soft_wrap=True)


def experts_line(stats: ExpertStats) -> str:
    """One line of figures on the experts of an answer."""
    return (
        f"{stats.hit_rate:.0%} of the experts were in memory, {readable_bytes(stats.bytes_per_token)} read a token, "
        f"{stats.wait_share:.0%} of the time waiting for the disk"
    )


def _lines(report: BudgetReport) -> list[tuple[str, str]]:
    kept, everything = report.slots * report.slot, report.total_slots
    disk = f"{report.reader.gb_s:.1f} GB/s, read {_HOW[report.reader.kind]}"
    lines = [
        ("memory", f"{readable_bytes(report.limit)} for the whole process"),
        ("resident", f"{readable_bytes(report.base)}, of which {readable_bytes(report.resident)} weights"),
        ("experts", f"{report.slots} of {everything} in memory ({readable_bytes(kept)}), the others on disk ({disk})"),
    ]
    if report.missed_bytes:
        rate = 1e9 * report.reader.gb_s / report.missed_bytes
        missed = readable_bytes(report.missed_bytes)
        lines.append(("speed", f"at most {rate:.1f} tokens a second if routing prefers no expert: {missed} a token"))
    return lines


_HOW = {"direct": "past the page cache", "cached": "through the page cache"}
