"""The training loop: micro-batches in, optimizer steps out, checkpoints and a line of metrics on the way.

It knows token rows and a decoder; not text, terminals or model files. What it shows goes through `on_step`.
Everything that decides the numbers (weights, moments, RNG, step) is in a checkpoint, so that a run that was
killed and went on gives the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moekit.config import TrainConfig
from moekit.errors import ConfigError, DivergenceError
from moekit.models.decoder import Decoder
from moekit.moe import MoE, RoutingTotals
from moekit.train.alarms import Alarm
from moekit.train.data import Batch, TrainingData
from moekit.train.evaluate import Evaluation, autocast_dtype, compute_context, monitor_of, perplexity
from moekit.train.health import RunHealth
from moekit.train.loss import chunked_cross_entropy
from moekit.train.memory import freed_memory_kept
from moekit.train.metrics import MetricsLog, StepMetrics
from moekit.train.monitor import RoutingMonitor
from moekit.train.optim import lr_at, make_optimizer, set_lr
from moekit.train.router_losses import RouterLosses
from moekit.train.state import RunIdentity, load_newest, restore, save_checkpoint

__all__ = ["StepMetrics", "TrainResult", "Trainer"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """How a run ended: its last step's metrics (None if nothing was left to do), the last evaluation of the
    held-out text (None without any), and the routing counts of all steps.
    """

    steps: int
    last: StepMetrics | None
    evaluation: Evaluation | None
    routing: RoutingMonitor
    seconds: float


@dataclass(frozen=True)
class _Losses:
    """Sums over a step's micro-batches, each already counted by its share; router losses before their weights."""

    lm: float = 0.0
    router: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: _Losses) -> _Losses:
        names = {**self.router, **other.router}
        router = {name: self.router.get(name, 0.0) + other.router.get(name, 0.0) for name in names}
        return _Losses(self.lm + other.lm, router)


class Trainer:
    """Trains `decoder` in place; goes on by itself from the newest checkpoint in `run_dir`.

    Args:
        decoder: its weights become float32 masters. Parameters that require no gradient stay as they are.
        data: rows to learn from, and held-out rows to measure.
        config: see `TrainConfig`.
        run_dir: gets `metrics.jsonl` and `checkpoints/`.
        on_step: called after each step with its metrics.
        on_alarm: called with each new alarm (`moekit.train.alarms`); a warning is logged when not given.
    Raises:
        ConfigError: the checkpoint in `run_dir` belongs to another configuration, model or corpus.
        FormatError: there are checkpoints, none of them whole.
        MissingExtraError: TensorBoard was asked for and is not installed.
    """

    def __init__(
        self,
        decoder: Decoder,
        data: TrainingData,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        on_step: Callable[[StepMetrics], None] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:
        self.decoder, self.data = decoder.float(), data
        # Settled now, so that a checkpoint says what its numbers were made with.
        narrow = autocast_dtype(decoder, config.autocast) is not None
        self.config = config = dataclasses.replace(config, autocast="bfloat16" if narrow else "none")
        self.run_dir = Path(run_dir)
        self.on_step = on_step
        self.on_alarm = on_alarm or (lambda alarm: log.warning("%s", alarm))
        self.is_moe = bool(decoder.config.moe_layers)
        self.router_losses = RouterLosses(
            self._balance_coef(), config.z_coef, config.balance_over, config.aux_losses if self.is_moe else {}
        )
        self.routers = [module.router for module in decoder.modules() if isinstance(module, MoE)]
        self.monitor = monitor_of(decoder)
        self.optimizer = make_optimizer(decoder, config)
        self.identity = RunIdentity(config, decoder.config, _identify(data))
        self.step = self._resume()
        self.health = RunHealth(decoder, config)
        self.evaluation: Evaluation | None = None
        self._saved = self.step
        self._stopping = False

    def run(self, *, evaluate: bool = True) -> TrainResult:
        """Train to `config.steps`, saving every `save_every`, and with `evaluate` measure the held-out text.

        Raises:
            DivergenceError: loss or gradient became nan or infinite; earlier checkpoints are intact.
            KeyboardInterrupt: Ctrl-C; the step was finished and a checkpoint written. A second one stops at once.
            FileError: a checkpoint or the metrics could not be written.
        """
        started, metrics = time.perf_counter(), None
        self.decoder.train()
        metrics_log = MetricsLog(self.run_dir, self.step, self.config.tensorboard)
        with metrics_log, self._ctrl_c(), freed_memory_kept():
            while self.step < self.config.steps:
                metrics = self._optimizer_step()
                if self._due(self.config.eval_every, last=evaluate):
                    metrics = self._with_evaluation(metrics)
                if self._due(self.config.log_every):
                    metrics_log.write(metrics)
                if self._due(self.config.save_every, last=self.config.save_every > 0):
                    self._save()
                if self.on_step is not None:
                    self.on_step(metrics)
                if self._stopping:
                    self._save()
                    raise KeyboardInterrupt(f"step {self.step} is saved, and the same command goes on from it")
        if evaluate and self.evaluation is None:
            self._evaluate()
        return TrainResult(self.step, metrics, self.evaluation, self.monitor, time.perf_counter() - started)

    def _optimizer_step(self) -> StepMetrics:
        started, config = time.perf_counter(), self.config
        batches = [
            self.data.train.batch(self.step * config.accumulate + part, config.batch_size)
            for part in range(config.accumulate)
        ]
        labels = sum(batch.num_labels for batch in batches)
        monitor, parts = monitor_of(self.decoder), _Losses()
        totals: list[RoutingTotals] = []
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            parts += self._micro_batch(batch, labels, monitor, totals)
        step = self.step + 1
        weights = self.router_losses.weights
        loss = parts.lm + sum(weights[name] * value for name, value in parts.router.items())
        grad_norm = self._clip()
        self._check_finite(step, loss, grad_norm)
        lr = lr_at(step, config)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        for router, of_step in zip(self.routers, totals, strict=True):
            router.after_step(of_step)
        self.step = step
        self.monitor.merge(monitor)
        tokens = sum(batch.input_ids_BL.numel() for batch in batches)
        metrics = StepMetrics(
            step=step,
            loss=loss,
            lm_loss=parts.lm,
            balance_loss=parts.router.get("load_balancing"),
            z_loss=parts.router.get("z_loss"),
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens * step,
            tokens_per_s=tokens / (time.perf_counter() - started),
            experts_used=monitor.experts_used if self.is_moe else 0,
            max_vio=monitor.max_vio,
            mean_k=sum(each.mean_k for each in totals) / max(len(totals), 1),
            dropped=sum(each.dropped for each in totals) / max(sum(int(each.chosen_E.sum()) for each in totals), 1),
            aux_losses={name: parts.router[name] for name in config.aux_losses if name in parts.router},
        )
        for alarm in self.health.step(metrics, totals):
            self.on_alarm(alarm)
        return metrics

    def _micro_batch(self, batch: Batch, labels: int, monitor: RoutingMonitor, totals: list[RoutingTotals]) -> _Losses:
        """Forward and backward of one micro-batch, which counts by its share of the step's labels.

        Adds what its routers did to `monitor` and to `totals`, one a layer.
        """
        share = batch.num_labels / max(labels, 1)
        with compute_context(self.decoder, self.config.autocast):
            features = self.decoder.features(
                batch.input_ids_BL, document_ids=batch.document_ids_BL, checkpointing=self.config.checkpointing
            )
            loss = lm = chunked_cross_entropy(
                features.hidden_BLD.flatten(0, 1),
                self.decoder.head_weight,
                batch.labels_BL.flatten(),
                denominator=labels,
                dtype=autocast_dtype(self.decoder, self.config.autocast),
            )
        values: dict[str, torch.Tensor] = {}
        if self.is_moe:
            new = [RoutingTotals.of(routing) for routing in features.routings]
            totals[:] = [before + more for before, more in zip(totals, new, strict=True)] if totals else new
            documents_BL = batch.document_ids_BL
            sequences_BL = torch.zeros_like(batch.input_ids_BL) if documents_BL is None else documents_BL
            values = self.router_losses.values(features.routings, sequences_BL, totals)
            loss = loss + share * self.router_losses.total(values)
            monitor.update(features.routings)
        loss.backward()
        return _Losses(lm.item(), {name: share * value.item() for name, value in values.items()})

    def _clip(self) -> float:
        """Scale the gradients to at most clip_norm together; returns the norm they had."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if 0 < self.config.clip_norm < norm:
            torch._foreach_mul_(grads, self.config.clip_norm / norm)
        return norm.item()

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
            raise DivergenceError(
                f"training diverged at step {step}: {what}; lower train.lr (now {self.config.lr:g}), raise "
                f"train.warmup-steps or set train.autocast none, and go on from the checkpoint of step {self._saved}"
            )

    def _evaluate(self) -> None:
        if self.data.valid is not None:
            self.evaluation = perplexity(
                self.decoder, self.data.valid, autocast=self.config.autocast, batch_size=self.config.batch_size
            )

    def _with_evaluation(self, metrics: StepMetrics) -> StepMetrics:
        self._evaluate()
        if self.evaluation is None:
            return metrics
        seen = self.evaluation
        return dataclasses.replace(metrics, valid_loss=seen.nll, valid_perplexity=seen.perplexity)

    def _due(self, every: int, *, last: bool = True) -> bool:
        """Whether this step is one of every so many, or the last one."""
        return (last and self.step == self.config.steps) or (every > 0 and self.step % every == 0)

    def _save(self) -> None:
        if self._saved == self.step:
            return
        routing = self.monitor.state()
        save_checkpoint(self.run_dir, self.step, self.identity, self.decoder, self.optimizer, routing=routing)
        self._saved = self.step

    def _resume(self) -> int:
        """Load the newest checkpoint, if any. Returns its step, else 0."""
        checkpoint = load_newest(self.run_dir)
        if checkpoint is not None:
            self.identity.check(checkpoint.identity, checkpoint.path)
            if checkpoint.step > self.config.steps:
                raise ConfigError(
                    f"train.steps is {self.config.steps} but {checkpoint.step} are done in {self.run_dir}"
                )
            restore(checkpoint, self.decoder, self.optimizer)
            self.monitor.merge(RoutingMonitor.of_state(self.monitor.layers, checkpoint.routing))
        else:
            torch.manual_seed(self.config.seed)
        return checkpoint.step if checkpoint else 0

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """Let the first Ctrl-C only ask for a stop after the step, where signals can be caught at all."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: FrameType | None) -> None:
            self._stopping = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _balance_coef(self) -> float:
        """The configured coefficient, or the model's own; says so when it cannot do what it is there for."""
        given = self.config.balance_coef
        coef = self.decoder.config.router_aux_loss_coef if given is None else given
        moe = self.decoder.config.moe
        if self.is_moe and moe is not None and coef == 0 and not moe.options.balanced and not self.config.aux_losses:
            log.warning("balance_coef is 0: nothing keeps the experts in balance; 0.01 is usual")
        if not self.is_moe and (given or self.config.z_coef or self.config.aux_losses):
            log.warning("balance_coef, z_coef and aux_losses have no effect: the model has no MoE layer")
        return coef if self.is_moe else 0.0


def _identify(data: TrainingData) -> dict[str, Any]:
    rows = data.train
    return {"fingerprint": rows.fingerprint, "sequence_length": rows.sequence_length, "seed": rows.seed}
