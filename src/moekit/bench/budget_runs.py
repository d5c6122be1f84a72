"""The processes of the budget case, each with what it needs and its last words; see `budget_child` for their work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit.adapt.expert_probe import OUTSTANDING, measure, probe
from moekit.adapt.expert_slots import Slots
from moekit.adapt.offload import Foresight
from moekit.adapt.store import Store
from moekit.bench.memory_group import MemoryGroup, memory_group
from moekit.errors import MissingExtraError, MoekitError, UnsupportedError
from moekit.machine import total_memory

__all__ = ["BudgetRuns", "Steps"]

_DISK_SECONDS = 1.0


@dataclass(frozen=True)
class Steps:
    """How much is run: numbers of tokens.

    Attributes:
        cold: with nothing in memory at first.
        settle: after them, until it is clear whether reading ahead pays; not timed.
        warm: after these.
        peer: of llama.cpp, cold and as many warm.
        trace: with all experts in memory, whose routing is recorded.
        prompt: of a prompt.
        sequences, rounds: decoded together, and how many tokens of each.
    """

    cold: int = 8
    settle: int = Foresight.TURN * Foresight.TURNS
    warm: int = 40
    peer: int = 4
    trace: int = 256
    prompt: int = 512
    sequences: int = 16
    rounds: int = 2


class BudgetRuns:
    """Runs the contenders.

    Args:
        folder: of the packed model.
        limit: bytes of a process.
        steps: how much is run.
        vocab: ids of tokens are below.
        cache: a folder for what processes remember, so that they know nothing of earlier runs.
        tell: called with what is being done.
    Attributes:
        missing: what was left out, and why.
        no_group: why no control group can hold a process to its limit; empty where one does.
    """

    def __init__(
        self, folder: Path, limit: int, steps: Steps, vocab: int, cache: Path, tell: Callable[[str], None]
    ) -> None:
        self.limit, self.steps = limit, steps
        self.missing: list[str] = []
        self.no_group = _no_group(limit)
        self._folder, self._cache, self._tell = folder, cache, tell
        self._store = Store(folder)
        self._reader = probe(self._store, again=True)
        drawn = random.Random(0)
        longest = max(steps.cold + steps.settle + steps.warm, 2 * steps.peer, steps.trace, steps.prompt)
        self._ids = [drawn.randrange(vocab) for _ in range(longest)]

    def alone(self) -> dict[str, Any]:
        """Ours within the limit, the disk measured before and after."""
        self._tell("moekit within the limit")
        before = self._disk()
        done = self._limited("alone", self._alone(self.limit))
        nbytes, seconds = (sum(both) for both in zip(before, self._disk(), strict=True))
        return done | {"disk_gb_s": nbytes / seconds / 1e9}

    def peer(self, path: Path | None) -> dict[str, Any] | None:
        """llama.cpp within the limit; None where it cannot be, which `missing` explains."""
        why = str(MissingExtraError("llama-cpp-python", extra="peers")) if path is None else self.no_group
        if why:
            self.missing.append(f"llama.cpp is left out: {why}")
            return None
        self._tell("llama.cpp within the limit")
        given = {"path": str(path), "ids": self._ids[: 2 * self.steps.peer], "threads": torch.get_num_threads()}
        return self._limited("llama_cpp", given)

    def whole(self) -> dict[str, Any]:
        """Ours with all experts in memory, routing recorded."""
        self._tell("moekit with all experts in memory")
        return self._child("whole", {"folder": str(self._folder), "ids": self._ids[: self.steps.trace]})

    def with_slots(self, slots: int) -> dict[str, Any]:
        """Ours with so many experts in memory."""
        self._tell(f"moekit with {slots} experts in memory")
        return self._child("alone", self._alone(total_memory()) | {"most": slots})

    def together(self, slots: int) -> dict[str, Any]:
        """What a prompt reads, and sequences decoded together, with so many experts in memory."""
        self._tell("a prompt, and sequences together")
        given = self._loaded(total_memory()) | {"most": slots, "ids": self._ids[: self.steps.prompt]}
        return self._child("together", given | {"sequences": self.steps.sequences, "rounds": self.steps.rounds})

    def _alone(self, limit: int) -> dict[str, Any]:
        count = self.steps.cold + self.steps.settle + self.steps.warm
        return self._loaded(limit) | {"ids": self._ids[:count], "cold": self.steps.cold, "warm": self.steps.warm}

    def _loaded(self, limit: int) -> dict[str, Any]:
        return {"folder": str(self._folder), "limit": limit, "reader": dataclasses.asdict(self._reader)}

    def _limited(self, task: str, given: dict[str, Any]) -> dict[str, Any]:
        """In a control group, if there can be one; with its `peak` and `kills`."""
        with ExitStack() as stack:
            group = None if self.no_group else stack.enter_context(memory_group(self.limit))
            done = self._child(task, given, group)
            return done | {"peak": group and group.peak, "kills": group.kills if group else 0}

    def _child(self, task: str, given: dict[str, Any], group: MemoryGroup | None = None) -> dict[str, Any]:
        command = [sys.executable, "-m", "moekit.bench.budget_child", task, json.dumps(given)]
        done = subprocess.run(
            command if group is None else group.command(command),
            env={**os.environ, "XDG_CACHE_HOME": str(self._cache / str(len(os.listdir(self._cache))))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            killed = f", {group.kills} killed for want of memory" if group is not None else ""
            raise MoekitError(f"the process for {task} ended with {done.returncode}{killed}: {said[-1]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _disk(self) -> tuple[int, float]:
        """Bytes and seconds of reading cold experts, the way that the cache reads them."""
        slots = Slots(OUTSTANDING, self._store.largest)
        for slot in range(slots.count):
            slots.view(slot).zero_()  # the first touch of memory is not the disk's time
        reader = self._reader.reader(self._store)
        keys = itertools.cycle(random.sample(sorted(self._store.extents), len(self._store.extents)))
        try:
            return measure(reader, keys, slots, _DISK_SECONDS)
        finally:
            reader.close()
            slots.close()


def _no_group(limit: int) -> str:
    try:
        with memory_group(limit):
            return ""
    except UnsupportedError as error:
        return str(error)
