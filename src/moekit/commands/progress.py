"""The displays of long work: a running training, a study of many, and anything that knows its share done."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from moekit.train.metrics import StepMetrics
    from moekit.train.study import Outcome

__all__ = ["BytesProgress", "ShareProgress", "StudyProgress", "TrainingProgress", "parts"]


class Bar:
    """A bar with the time left that disappears when done; a context manager. No terminal, nothing drawn."""

    def __init__(
        self, console: Console, title: str, total: int, unit: str = "", columns: Sequence[ProgressColumn] = ()
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            *(columns or [TextColumn("{task.completed}/{task.total}" + unit)]),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[shown]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, shown="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class TrainingProgress(Bar):
    """One line of progress, losses, speed and experts in use; its `on_step` is the trainer's callback.

    Args:
        console: where to draw.
        total_steps: steps of the whole run, those of before a resume included.
        title: what is being trained.
    """

    def __init__(self, console: Console, total_steps: int, title: str = "training") -> None:
        super().__init__(console, title, total_steps)

    def on_step(self, metrics: StepMetrics) -> None:
        """Show the step that was just made."""
        self._progress.update(self._task, completed=metrics.step, shown=parts(metrics))


class StudyProgress(Bar):
    """The trainings of a study that are done; its `on_outcome` is the study's callback."""

    def __init__(self, console: Console, trainings: int) -> None:
        super().__init__(console, "study", trainings, " trainings")

    def on_outcome(self, outcome: Outcome) -> None:
        """Show the training that is done."""
        shown = f"{outcome.contender}, seed {outcome.seed}: {outcome.loss:.4f}"
        self._progress.update(self._task, advance=1, shown=shown)


class ShareProgress(Bar):
    """The share of something that is done, in percent; its `on_part` is the callback."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title, 100, " %")

    def on_part(self, done: int, total: int) -> None:
        """`done` of `total`, whatever is counted."""
        self._progress.update(self._task, completed=100 * done // total)


class BytesProgress(Bar):
    """Bytes that are done, how many a second, and the time left; its `on_bytes` is the callback."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title, 0, columns=(DownloadColumn(), TransferSpeedColumn()))

    def on_bytes(self, done: int, total: int) -> None:
        """`done` of `total`."""
        self._progress.update(self._task, completed=done, total=total)


def parts(metrics: StepMetrics) -> str:
    """The parts of the loss, the speed and, for a Mixture of Experts, the experts in use, in one line."""
    shown = [f"loss {metrics.lm_loss:.3f}"]
    if metrics.balance_loss is not None:
        shown.append(f"balance {metrics.balance_loss:.3f}")
    shown.append(f"{metrics.tokens_per_s:,.0f} tokens/s")
    if metrics.balance_loss is not None:
        shown.append(f"{metrics.experts_used} experts in use")
    return " · ".join(shown)
