"""How a library's answer is judged: checks and their limits, what came of them, and one word for a trap."""

from __future__ import annotations

import logging
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor


class Absent(Exception):  # noqa: N818 — an answer, not an error
    """The library has no such part; the message says in a few words what is missing."""


class NotApplicable(Exception):  # noqa: N818
    """The question makes no sense for this library, or cannot be put to it here; the message says why."""


Measured: TypeAlias = Mapping[str, float | Exception]


@dataclass(frozen=True)
class Check:
    """One measurement: `measure()` returns how far the library is from the right answer, 0 for not at all; or that of
    several parts by name, where an error stands for a part that raised it."""

    what: str
    measure: Callable[[], float | Measured]
    limit: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What came of a check: status pass, fail, absent or n/a; the deviation, of those that failed if any did (None if
    nothing could be measured); and a note."""

    what: str
    status: str
    deviation: float | None
    note: str = ""


def judge(check: Check) -> Finding:
    """Measure with a fixed seed. An error of the library is a failure, its refusal to be asked is not."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measured = check.measure()
    except Absent as reason:
        return Finding(check.what, "absent", None, str(reason))
    except NotApplicable as reason:
        return Finding(check.what, "n/a", None, str(reason))
    except Exception as error:  # whatever the library raises is its answer
        _raise_if_ours(error)
        measured = {"": error}
    parts = measured if isinstance(measured, Mapping) else {"": measured}
    failed = {name: value for name, value in parts.items() if isinstance(value, Exception) or not value <= check.limit}
    numbers = [value for value in (failed or parts).values() if not isinstance(value, Exception)]
    note = "; ".join(filter(None, (_told(name, value) for name, value in failed.items())))
    return Finding(check.what, "fail" if failed else "pass", max(numbers, default=None), note)


def each(names: Iterable[str], measure: Callable[[str], float]) -> Measured:
    """Measure every part, whatever the others raise."""
    measured: dict[str, float | Exception] = {}
    for name in names:
        try:
            measured[name] = float(measure(name))
        except (Absent, NotApplicable):
            raise
        except Exception as error:
            _raise_if_ours(error)
            measured[name] = error
    return measured


def _raise_if_ours(error: Exception) -> None:
    """An error out of this folder's own lines is a mistake of the suite."""
    *_, last = traceback.walk_tb(error.__traceback__)
    if Path(last[0].f_code.co_filename).parent == Path(__file__).parent:
        raise error


def _told(name: str, value: float | Exception) -> str:
    """A failed part in a few words; nothing for the only part's number, which stands beside it."""
    if isinstance(value, Exception):
        first_line = (str(value).strip().splitlines() or [""])[0][:90]
        return f"{name} raises {type(value).__name__}: {first_line}".strip()
    return f"{name} {value:.2g}" if name else ""


def status_of(findings: list[Finding]) -> str:
    """One word for a trap: the worst that came of it; partly if what there is passes and other parts are absent."""
    statuses = {finding.status for finding in findings}
    if "fail" in statuses:
        return "fail"
    if "pass" in statuses:
        return "pass" if statuses == {"pass"} else "partly"
    return "absent" if "absent" in statuses else "n/a"


@contextmanager
def said(logger: str = "") -> Iterator[list[str]]:
    """What is logged (level warning and above) and warned of in the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    source = logging.getLogger(logger)
    level = source.level
    source.addHandler(handler)
    source.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [str(warning.message) for warning in caught]
    finally:
        source.removeHandler(handler)
        source.setLevel(level)


def off(got: Tensor, want: Tensor) -> float:
    """max |got − want| / max |want|; the error itself where nothing is wanted; inf for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    error = (got.detach().double() - want.detach().double()).abs().max().item()
    scale = want.detach().double().abs().max().item()
    return float("inf") if math.isnan(error) else error / (scale or 1.0)
