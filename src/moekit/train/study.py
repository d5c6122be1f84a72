"""Studies: the same small model and budget with one thing changed, over several seeds, on real text.

A token is a byte, so that no tokenizer and no large vocabulary stand between the experts and the loss. Every
(contender, seed) that is done is a line of `results.jsonl`, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit.config import CapacityConfig, DataConfig, ExpertGroup, GroupLimit, ModelConfig, MoEConfig, TrainConfig
from moekit.errors import FormatError
from moekit.figures import new_figure
from moekit.files import file_errors, replacing, write_atomic
from moekit.models.decoder import Decoder
from moekit.train.data import TrainingData, prepare
from moekit.train.evaluate import perplexity
from moekit.train.trainer import Trainer

__all__ = ["ROUTER_CONTENDERS", "Bytes", "Contender", "Outcome", "Study", "draw", "model_config", "summarise"]

SIZES = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
EVAL_ROWS = 256  # spread over the held-out text
BALANCE = {"balance_coef": 0.01}


class Bytes:
    """The tokenizer of a study: a byte is a token, 256 ends a document."""

    eos_ids = (256,)
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode())


@dataclass(frozen=True)
class Contender:
    """One row of a study: a layer and how it is kept balanced.

    Attributes:
        name: in tables and pictures.
        moe: fields of `MoEConfig` beside the study's sizes; None is the dense model of equal active width.
        train: fields of `TrainConfig`.
    """

    name: str
    moe: dict[str, Any] | None
    train: dict[str, Any] = dataclasses.field(default_factory=dict)


ROUTER_CONTENDERS = (
    Contender("dense", None),
    Contender("top-2", {}, BALANCE),
    Contender("top-2, no loss", {}),
    Contender("top-1 (Switch)", {"top_k": 1, "gate_order": "softmax_topk", "intermediate_size": 128}, BALANCE),
    Contender(
        "top-2, capacity 1.0",
        {"capacity": CapacityConfig(factor=1.0)},
        BALANCE,
    ),
    Contender("sigmoid + bias", {"router": "sigmoid", "norm_topk_prob": True, "router_options": {"bias_rate": 0.01}}),
    Contender("group-limited", {"router_options": {"groups": GroupLimit(groups=2, chosen=1)}}, BALANCE),
    Contender("noisy top-2", {"router": "noisy_topk"}, {"aux_losses": {"importance": 0.01, "load": 0.01}}),
    Contender("gshard", {"router": "gshard"}, BALANCE),
    Contender("gumbel", {"router": "gumbel", "router_options": {"anneal_steps": 100}}, BALANCE),
    Contender(
        "top-p, 2 on average",
        {"router": "top_p", "top_k": 4, "gate_order": "softmax_topk", "router_options": {"target_k": 2.0}},
        BALANCE,
    ),
    Contender("hash", {"router": "hash"}),
    Contender("sinkhorn", {"router": "sinkhorn"}),
    Contender(
        "hierarchical",
        {"router": "hierarchical", "router_options": {"groups": 2, "groups_per_token": 2}},
        BALANCE | {"aux_losses": {"group_balancing": 0.01}},
    ),
    Contender(
        "2 zero experts",
        {"expert": "mixed", "expert_groups": (ExpertGroup(count=6), ExpertGroup(count=2, kind="zero"))},
        BALANCE,
    ),
)
"""Every router a causal model can use. All pay for an inner width of 128 on a token, or less where they may skip."""


@dataclass(frozen=True)
class Outcome:
    """What one training of one contender came to.

    Attributes:
        loss: held-out, nats a byte.
        balance: balance score of the held-out text, mean over layers (0 is even).
        dropped: share of the training's last quarter of choices that found no room.
        mean_k: experts a token chose, over the last quarter of the training.
        tokens_per_s: median over the steps.
    """

    contender: str
    seed: int
    loss: float
    balance: float
    dropped: float
    mean_k: float
    tokens_per_s: float


class Study:
    """Trains every contender with every seed.

    Args:
        out: folder for `results.jsonl` and the token file.
        train, valid: files, folders or globs of text to learn from, and of text that is held out.
        steps, batch_size: the budget of each, in rows of 128 bytes.
    Raises:
        FileError, DataError: the text is missing or empty.
        FormatError: `results.jsonl` in `out` is damaged, or belongs to a study of another budget or text.
    """

    def __init__(self, out: Path, train: Sequence[str], valid: Sequence[str], steps: int, batch_size: int) -> None:
        self.out, self.steps, self.batch_size = out, steps, batch_size
        config = DataConfig(train=tuple(train), valid=tuple(valid), sequence_length=128)
        self.data: TrainingData = prepare(config, Bytes(), out / "tokens")
        self.results = out / "results.jsonl"
        self.key = [steps, batch_size, self.data.train.fingerprint]
        self.done = self._read()

    def run(
        self, contenders: Sequence[Contender], seeds: Sequence[int], on_outcome: Callable[[Outcome], None]
    ) -> list[Outcome]:
        """Train what is not done yet, seed by seed, so that a noisy hour hits all contenders alike."""
        for seed in seeds:
            for contender in contenders:
                if (contender.name, seed) not in self.done:
                    self._add(self._train(contender, seed))
                on_outcome(self.done[contender.name, seed])
        return [self.done[contender.name, seed] for contender in contenders for seed in seeds]

    def _train(self, contender: Contender, seed: int) -> Outcome:
        torch.manual_seed(seed)
        decoder = Decoder(model_config(contender))
        values = {"lr": 8e-3, "warmup_steps": min(20, self.steps // 5 + 1), "router_lr_scale": 1.0, "balance_coef": 0.0}
        config = TrainConfig(
            steps=self.steps, batch_size=self.batch_size, seed=seed, save_every=0, **(values | contender.train)
        )
        seen: list[Any] = []
        folder = self.out / "runs" / f"{contender.name.replace(' ', '-')}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        # Some contenders are there to be unbalanced: an alarm would say what the table says.
        trainer = Trainer(decoder, self.data, config, folder, on_step=seen.append, on_alarm=lambda alarm: None)
        trainer.run(evaluate=False)
        assert self.data.valid is not None
        evaluation = perplexity(decoder, self.data.valid, batch_size=self.batch_size, max_rows=EVAL_ROWS)
        late = seen[-max(1, len(seen) // 4) :]
        layers = evaluation.routing.report()
        return Outcome(
            contender=contender.name,
            seed=seed,
            loss=evaluation.nll,
            balance=statistics.fmean([layer.balance_score for layer in layers]) if layers else 0.0,
            dropped=statistics.fmean(metrics.dropped for metrics in late),
            mean_k=statistics.fmean(metrics.mean_k for metrics in late),
            tokens_per_s=statistics.median(metrics.tokens_per_s for metrics in seen),
        )

    def _add(self, outcome: Outcome) -> None:
        self.done[outcome.contender, outcome.seed] = outcome
        with file_errors(self.results), self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self.key, **dataclasses.asdict(outcome)}) + "\n")

    def _read(self) -> dict[tuple[str, int], Outcome]:
        """The outcomes of an earlier, interrupted call; a last line that a kill cut short is forgotten."""
        if not self.results.exists():
            return {}
        with file_errors(self.results, "read"):
            text = self.results.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_atomic(self.results, whole)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            keys = [line.pop("key") for line in lines]
            outcomes = [Outcome(**line) for line in lines]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{self.results} is damaged ({error}): remove it, or give another --out") from None
        if any(key != self.key for key in keys):
            raise FormatError(f"{self.results} is of another budget or text: give another --out, or remove it")
        return {(outcome.contender, outcome.seed): outcome for outcome in outcomes}


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row a contender, best loss first: means over seeds, and the loss's standard deviation (0 for one seed).

    >>> one = Outcome("a", 0, loss=1.0, balance=0.5, dropped=0.0, mean_k=2.0, tokens_per_s=10.0)
    >>> summarise([one, dataclasses.replace(one, seed=1, loss=2.0)])[0]["loss"]
    1.5
    """
    rows = []
    for name in dict.fromkeys(outcome.contender for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.contender == name]
        losses = [outcome.loss for outcome in mine]
        row: dict[str, Any] = {"contender": name, "seeds": len(mine)}
        for field in ("loss", "balance", "dropped", "mean_k", "tokens_per_s"):
            row[field] = statistics.fmean(getattr(outcome, field) for outcome in mine)
        rows.append(row | {"loss_sd": statistics.stdev(losses) if len(losses) > 1 else 0.0})
    return sorted(rows, key=lambda row: float(row["loss"]))


def draw(rows: Sequence[dict[str, Any]], title: str, path: str | os.PathLike[str]) -> None:
    """The summary as a PNG: held-out loss with its spread over seeds, and the balance, side by side.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    figure = new_figure(11, 1.5 + 0.36 * len(rows))
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    names = [row["contender"] for row in rows][::-1]
    columns = {name: [row[name] for row in rows][::-1] for name in ("loss", "loss_sd", "balance", "tokens_per_s")}
    left.errorbar(columns["loss"], names, xerr=columns["loss_sd"], fmt="o", capsize=3, color="#2b6cb0")
    left.set(title="held-out loss, nats a byte (± sd over seeds)")
    middle.barh(names, columns["balance"], color="#718096")
    middle.set(title="imbalance (σ ÷ mean)")
    right.barh(names, columns["tokens_per_s"], color="#38a169")
    right.set(title="tokens a second, training")
    for axes in (left, middle, right):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def model_config(contender: Contender) -> ModelConfig:
    """The study's model: 2 layers of width 128, and the contender's MLP."""
    moe = None if contender.moe is None else MoEConfig(**(SIZES | contender.moe))
    return ModelConfig(
        arch="llama" if moe is None else "mixtral",
        vocab_size=Bytes.vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        moe=moe,
    )
