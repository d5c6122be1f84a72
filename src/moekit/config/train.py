"""What is learned from, for how long and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moekit.config.base import check, choice, positive

__all__ = ["Autocast", "DataConfig", "TrainConfig"]

Autocast = Literal["auto", "bfloat16", "none"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training text comes from and how it is cut into rows."""

    train: tuple[str, ...] = ()
    """Files, folders or globs: .txt and .md (one document a file), .jsonl and .parquet (one document a line or row)."""
    valid: tuple[str, ...] = ()
    """Held-out files, in the same forms; never trained on."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    sequence_length: int = 256
    """Tokens in a row, L."""
    seed: int = 0
    """Seeds the order of the rows; row order is a pure function of (seed, epoch)."""

    def __post_init__(self) -> None:
        positive(self, "sequence_length")
        check(len(self.text_field) > 0, "text_field must not be empty")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to learn."""

    steps: int = 100
    """Optimizer steps in all (a resumed run counts those already done)."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches summed into one optimizer step."""
    lr: float = 1e-4
    """Peak learning rate."""
    router_lr_scale: float = 0.1
    """Routers learn at lr times this."""
    min_lr_ratio: float = 0.1
    """Cosine decay ends at lr times this."""
    warmup_steps: int = 5
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """AdamW decay of matrices; norms, biases and routers have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    balance_coef: float | None = None
    """Weight of the Switch load-balancing loss; the model's own router_aux_loss_coef when not given."""
    balance_over: Literal["micro_batch", "sequence", "step"] = "micro_batch"
    """What the load-balancing loss counts over: each micro-batch; each document by itself (2412.19437); or all that
    the step has seen so far (2501.11873), which lets experts specialise."""
    z_coef: float = 0.0
    """Weight of the router z-loss."""
    aux_losses: Mapping[str, float] = field(default_factory=dict)
    """Other router losses and their weights, by their names in `moekit.losses.LOSSES` (importance, load, entropy …)."""
    autocast: Autocast = "auto"
    """Compute dtype over fp32 master weights; routers, norms and losses stay in fp32. auto takes bfloat16 where the
    machine multiplies it faster than fp32."""
    checkpointing: Literal["none", "moe", "block"] = "none"
    """Recompute MoE layers, or whole blocks, during backward instead of keeping their activations."""
    save_every: int = 50
    """Steps between checkpoints, and one at the end; 0 writes one on Ctrl-C alone."""
    eval_every: int = 0
    """Steps between evaluations on the held-out text; 0 evaluates only at the end."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size", "accumulate", "log_every")
        check(self.lr > 0, f"lr must be above 0, not {self.lr}")
        for name in ("router_lr_scale", "weight_decay", "clip_norm", "z_coef", "balance_coef", "min_lr_ratio"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"{name} must be at least 0, not {value}")
        for name in ("warmup_steps", "save_every", "eval_every"):
            value = getattr(self, name)
            check(value >= 0, f"{name} must be at least 0, not {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
        choice(self, "autocast", ("auto", "bfloat16", "none"))
        choice(self, "balance_over", ("micro_batch", "sequence", "step"))
        for name, weight in self.aux_losses.items():
            check(weight >= 0, f"the weight of aux loss {name} must be at least 0, not {weight}")
        choice(self, "checkpointing", ("none", "moe", "block"))
