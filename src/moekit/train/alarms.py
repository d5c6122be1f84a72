"""Alarms of a training run: each names what was seen, the likely cause and one remedy.

`Alarms` is fed once a step with numbers (`Signals`) and what the run was told (`RunFacts`). It reads no tensor but
counts, keeps a bounded past, and knows nothing of trainers: any loop can feed it. The checks are in `checks.py`.
"""

from __future__ import annotations

from moekit.train.checks import CHECKS
from moekit.train.signals import Alarm, AlarmLimits, Memory, Past, RunFacts, Signals

__all__ = ["Alarm", "AlarmLimits", "Alarms", "Memory", "RunFacts", "Signals"]


class Alarms:
    """Shows every step to every check, and gives the alarms that are new.

    An alarm is given once, stays in `active` until its check passes, and may come again when it has been away for
    `limits.quiet` steps. Nothing of the run is changed.

    Args:
        facts: what the run was told.
        limits: where measures become alarms.

    >>> alarms = Alarms(RunFacts(num_experts=8, top_k=2, lr=1e-3))
    >>> print(alarms.step(Signals(step=30, loss=float("nan"), grad_norm=1.0))[0])
    step 30: loss_blow_up: loss nan, grad_norm 1. the learning rate is too high for these weights; lower lr ...
    """

    def __init__(self, facts: RunFacts, limits: AlarmLimits | None = None) -> None:
        self.limits = limits or AlarmLimits()
        self.past = Past(facts, self.limits)
        self.active: dict[tuple[str, int | None], Alarm] = {}
        self._raised: dict[tuple[str, int | None], int] = {}

    def step(self, signals: Signals) -> list[Alarm]:
        """Take in one step; returns the alarms that were not active before, errors first."""
        self.past.take(signals)
        new: list[Alarm] = []
        for name, check in CHECKS.items():
            found = check(self.past, signals)
            if found is not None:
                new += self._renew(name, found, signals.step)
        return sorted(new, key=lambda alarm: alarm.severity)

    def _renew(self, name: str, found: list[Alarm], step: int) -> list[Alarm]:
        """Make `found` the active alarms of this name; returns those to be told."""
        before = {key: alarm for key, alarm in self.active.items() if key[0] == name}
        self.active = {key: alarm for key, alarm in self.active.items() if key[0] != name}
        new = []
        for alarm in found:
            key = (name, alarm.layer)
            self.active[key] = alarm
            worse = key in before and before[key].severity == "warning" and alarm.severity == "error"
            rested = key not in before and step - self._raised.get(key, step - self.limits.quiet) >= self.limits.quiet
            if worse or rested:
                self._raised[key] = step
                new.append(alarm)
        return new
