"""The display of a running training: one line of progress, one of losses, speed and experts in use."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from moekit.train.metrics import StepMetrics
    from moekit.train.study import Outcome

__all__ = ["StudyProgress", "TrainingProgress", "parts"]


class TrainingProgress:
    """A bar that disappears when done; a context manager whose `on_step` is the trainer's callback.

    Where the console is no terminal nothing is drawn.

    Args:
        console: where to draw.
        total_steps: steps of the whole run, those of before a resume included.
        title: what is being trained.
    """

    def __init__(self, console: Console, total_steps: int, title: str = "training") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[parts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total_steps, parts="")

    def on_step(self, metrics: StepMetrics) -> None:
        """Show the step that was just made."""
        self._progress.update(self._task, completed=metrics.step, parts=parts(metrics))

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class StudyProgress:
    """A bar over the trainings of a study, with the time left; a context manager whose `on_outcome` is its callback."""

    def __init__(self, console: Console, trainings: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} trainings"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[last]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("study", total=trainings, last="")

    def on_outcome(self, outcome: Outcome) -> None:
        """Show the training that is done."""
        last = f"{outcome.contender}, seed {outcome.seed}: {outcome.loss:.4f}"
        self._progress.update(self._task, advance=1, last=last)

    def __enter__(self) -> StudyProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def parts(metrics: StepMetrics) -> str:
    """The parts of the loss, the speed and, for a Mixture of Experts, the experts in use, in one line."""
    shown = [f"loss {metrics.lm_loss:.3f}"]
    if metrics.balance_loss is not None:
        shown.append(f"balance {metrics.balance_loss:.3f}")
    shown.append(f"{metrics.tokens_per_s:,.0f} tokens/s")
    if metrics.balance_loss is not None:
        shown.append(f"{metrics.experts_used} experts in use")
    return " · ".join(shown)
