"""What a step reports, and the files it is reported to.

`metrics.jsonl` has one line a logged step. A run that goes on cuts it to the steps its checkpoint knows, so that
it always reads like that of a run which was never interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moekit.errors import MissingExtraError
from moekit.files import file_errors, write_atomic

__all__ = ["MetricsLog", "StepMetrics"]


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as `metrics.jsonl` has it. All but `tokens_per_s` repeat bit for bit."""

    step: int
    loss: float
    """What was minimised: lm_loss + balance_coef · balance_loss + z_coef · z_loss + the weighted aux_losses."""
    lm_loss: float
    """Mean cross-entropy of the step's labels, in nats."""
    balance_loss: float | None
    """Switch load-balancing loss, 1 when balanced; None for a dense model."""
    z_loss: float | None
    lr: float
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens: int
    """Tokens read since the run began."""
    tokens_per_s: float
    experts_used: int
    """Of all experts of all MoE layers, how many got a token in this step."""
    max_vio: float
    """Of the worst layer: its busiest expert's tokens over the mean, minus 1."""
    mean_k: float = 0.0
    """Experts that a token chose, on average over layers; 0 for a dense model."""
    dropped: float = 0.0
    """Share of the choices that found no room."""
    aux_losses: Mapping[str, float] = field(default_factory=dict)
    """Other router losses by name, before their weights."""
    valid_loss: float | None = None
    """Mean cross-entropy of the held-out text, when this step measured it."""
    valid_perplexity: float | None = None


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`, and to TensorBoard events if asked; a context manager.

    Args:
        run_dir: made if missing.
        step: the step the run goes on from; later lines of an earlier attempt are cut.
        tensorboard: also write events to `run_dir/tensorboard`.
    Raises:
        MissingExtraError: TensorBoard was asked for and is not installed.
        FileError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool = False) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._events = _event_writer(run_dir / "tensorboard", step) if tensorboard else None
        write_atomic(self.path, "".join(line for line in self._lines() if _step_of(line) <= step))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """One line, on the disk's way before the next step begins."""
        values = asdict(metrics)
        with file_errors(self.path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._events is not None:
            others = values.pop("aux_losses")
            for name, value in (values | others).items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, metrics.step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        with file_errors(self.path, "read"):
            return self.path.read_text(encoding="utf-8").splitlines(keepends=True)


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return float("inf")


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", extra="train") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
