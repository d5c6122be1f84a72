"""What the budget case runs in processes of their own: `python -m moekit.bench.budget_child TASK ARGUMENTS`, where the
arguments of a task are a JSON object, and the last line printed is its result as JSON.

A step is a token that is given, not chosen, so that all contenders do the same work: `best` has the token that each
would have chosen after it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moekit.adapt.budget import MemoryBudget, load_within
from moekit.adapt.expert_probe import ReaderChoice
from moekit.adapt.packed_folder import load_packed
from moekit.bench.peers import LlamaCpp
from moekit.engine.session import Session, append_each
from moekit.errors import MoekitError
from moekit.models.weights import PACKED_WEIGHTS

__all__ = ["TASKS", "drop_from_cache"]


def drop_from_cache(path: str | os.PathLike[str]) -> None:
    """Let the system forget what it has read of a file; what was just written reaches the disk first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def alone(
    folder: str, limit: int, reader: dict[str, Any], ids: list[int], cold: int, warm: int, most: int | None = None
) -> dict[str, Any]:
    """Steps of one sequence within `limit` bytes, experts read by `reader` (a `ReaderChoice`): seconds, hits and misses
    of the first `cold` and the last `warm` steps. Between them reading ahead is tried, which takes some dozens."""
    drop_from_cache(Path(folder) / PACKED_WEIGHTS)
    decoder = load_within(folder, limit, reader=ReaderChoice(**reader), most=most)
    session, budget = Session(decoder), _budget(decoder.room)
    report = budget.report
    steps, counts = [], [budget.stats]
    for part in (ids[:cold], ids[cold:-warm], ids[-warm:]):
        steps += _steps(lambda token: int(session.append([token]).argmax()), part)
        counts.append(budget.stats)
    parts = [both for number, both in enumerate(itertools.pairwise(counts)) if number != 1]
    return {
        "seconds": [took for took, _ in (*steps[:cold], *steps[-warm:])],
        "best": [best for _, best in steps],
        "hits": [after.hits - before.hits for before, after in parts],
        "misses": [after.misses - before.misses for before, after in parts],
        "expert_bytes": report.expert_bytes / report.total_slots,
        "slots": report.slots,
        "total_slots": report.total_slots,
        "expected_missed_bytes": report.missed_bytes,
    }


def llama_cpp(path: str, ids: list[int], threads: int) -> dict[str, Any]:
    """The same steps in llama.cpp, which maps the file; its weights stay as they are. `logits` follow the first."""
    drop_from_cache(path)
    with LlamaCpp(path, threads=threads, context=max(64, len(ids)), repack=False) as model:
        steps = _steps(lambda token: int(model.feed([token]).argmax()), ids)
        model.clear()
        logits_V = model.feed(ids[:1]).tolist()
    return {"seconds": [took for took, _ in steps], "logits": logits_V}


def whole(folder: str, ids: list[int]) -> dict[str, Any]:
    """The same steps with all experts in memory, `logits` after the first, and `trace`: for each step and MoE layer its
    experts."""
    with (Path(folder) / PACKED_WEIGHTS).open("rb") as file:
        while file.read(1 << 24):  # in order, into the system's cache: pages one by one would take far longer
            pass
    session = Session(load_packed(folder))
    steps = _steps(lambda token: int(session.append([token]).argmax()), ids)
    trace = [[routing.expert_ids_TK[0].tolist() for routing in step] for step in session.take_routings()]
    logits_V = Session(session.decoder).append(ids[:1]).tolist()
    seconds, best = [took for took, _ in steps], [best for _, best in steps]
    return {"seconds": seconds, "best": best, "logits": logits_V, "trace": trace}


def together(
    folder: str, limit: int, reader: dict[str, Any], most: int, ids: list[int], sequences: int, rounds: int
) -> dict[str, Any]:
    """Experts read, `most` being in memory: for the prompt `ids`, and for a token of one and of several sequences."""
    decoder = load_within(folder, limit, reader=ReaderChoice(**reader), most=most)
    budget = _budget(decoder.room)

    def misses(work: Callable[[], object]) -> int:
        before = budget.stats.misses
        work()
        return budget.stats.misses - before

    session = Session(decoder)
    prompt = misses(lambda: session.read(ids))
    used = [routing.expert_ids_A.unique().numel() for chunk in session.take_routings() for routing in chunk]
    single, many = Session(decoder), [Session(decoder) for _ in range(sequences)]
    count = sequences * rounds
    one = misses(lambda: [single.append([token]) for token in ids[:count]])
    several = misses(lambda: [append_each(many, ids[at : at + sequences]) for at in range(0, count, sequences)])
    return {
        "prompt_reads": prompt,
        "prompt_experts": sum(used),
        "alone_reads_per_token": one / count,
        "together_reads_per_token": several / count,
    }


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "alone": alone,
    "llama_cpp": llama_cpp,
    "together": together,
    "whole": whole,
}


def _budget(room: object) -> MemoryBudget:
    assert isinstance(room, MemoryBudget)
    return room


def _steps(step: Callable[[int], int], ids: Sequence[int]) -> list[tuple[float, int]]:
    """Seconds and result of each."""
    done = []
    for token in ids:
        start = time.perf_counter()
        best = step(token)
        done.append((time.perf_counter() - start, best))
    return done


def _main(arguments: Sequence[str]) -> int:
    task, given = arguments
    try:
        print(json.dumps(TASKS[task](**json.loads(given))))
    except MoekitError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
