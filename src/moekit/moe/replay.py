"""Record routing decisions, and repeat them: recomputation never re-routes, and a trace can be routed again.

What is recorded is the decision: which token goes to which expert, what capacity did to it, and the seed of the
noise. The weights are computed again from the live logits, so the router's gradient is exact. A record is bound by
a `with` statement or a wrapped function, to one thread, and to nothing else.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from moekit.errors import ConfigError, FormatError
from moekit.files import file_errors, write_atomic
from moekit.moe.types import Choice

__all__ = ["Decision", "RoutingRecord", "keep", "next_decision"]

P = ParamSpec("P")
R = TypeVar("R")
_local = threading.local()


@dataclass(frozen=True, eq=False)
class Decision:
    """Everything about a routing that is not computed from live scores.

    Attributes:
        options: the (token, expert) pairs that weights are computed for, after capacity moved some of them.
        kept_A: bool, which of them become assignments; None when all do.
        chosen: what the router chose before capacity; None when nothing was limited.
        seed: of the noise; None without any.
        rows_per_expert: as in `Routing`.
    """

    options: Choice
    kept_A: Tensor | None = None
    chosen: Choice | None = None
    seed: int | None = None
    rows_per_expert: int | None = None


class RoutingRecord:
    """The decisions of the MoE layers that ran inside `recording()`, in the order they ran.

    >>> from moekit import MoE, MoEConfig
    >>> layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2))
    >>> record, x = RoutingRecord(), torch.randn(3, 8)
    >>> with record.recording():
    ...     _, first = layer(x)
    >>> with record.replaying():
    ...     _, again = layer(-x)
    >>> torch.equal(first.expert_ids_A, again.expert_ids_A), torch.equal(first.weights_A, again.weights_A)
    (True, False)
    """

    def __init__(self, decisions: Sequence[Decision] = ()) -> None:
        self.decisions = list(decisions)

    @classmethod
    def of_ids(cls, expert_ids: Sequence[Tensor]) -> RoutingRecord:
        """A record of expert ids (T, K) that came from elsewhere, one a layer call."""
        return cls([Decision(Choice.regular(ids_TK.long())) for ids_TK in expert_ids])

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, recorded on its first call and replayed on every later one.

        Give it to `torch.utils.checkpoint.checkpoint` in place of the function, in either mode (reentrant or not)
        and with any `context_fn`: the first call is the forward pass, the others recompute it.
        """
        calls = iter((self.recording,))

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with next(calls, self.replaying)():
                return function(*args, **kwargs)

        return run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every decision made in this block."""
        self.decisions.clear()
        with _bound(self.decisions.append, None):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Repeat the kept decisions, first to last. May be entered many times."""
        with _bound(None, iter(self.decisions)):
            yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a safetensors file, whole or not at all.

        Raises:
            FileError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}
        facts = []
        for number, decision in enumerate(self.decisions):
            parts: dict[str, Tensor | None] = {
                "tokens": decision.options.token_ids_A,
                "experts": decision.options.expert_ids_A,
                "kept": decision.kept_A,
            }
            if decision.chosen is not None:
                parts["chosen_tokens"] = decision.chosen.token_ids_A
                parts["chosen_experts"] = decision.chosen.expert_ids_A
            tensors |= {f"{number}.{name}": part.cpu() for name, part in parts.items() if part is not None}
            chosen_k = decision.chosen.top_k if decision.chosen else None
            facts.append([decision.options.top_k, chosen_k, decision.seed, decision.rows_per_expert])
        write_atomic(Path(path), save_tensors(tensors, {"moekit_routing": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingRecord:
        """Read what `save` wrote.

        Raises:
            FileError: there is no such file.
            FormatError: it is no record of routings, or is damaged.
        """
        with file_errors(Path(path), "read"):
            data = Path(path).read_bytes()
        try:
            size = int.from_bytes(data[:8], "little")
            facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["moekit_routing"])
            tensors = load_tensors(data)
            return cls([_decision(tensors, number, *fact) for number, fact in enumerate(facts)])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise FormatError(f"{path} is not a record of routings ({type(error).__name__}: {error})") from None


def next_decision(tokens: int, num_experts: int) -> Decision | None:
    """The decision to repeat for a layer of this size; None when nothing is replayed.

    Raises:
        ConfigError: the record holds too few decisions, or was made with other sizes.
    """
    queue: Iterator[Decision] | None = getattr(_local, "queue", None)
    if queue is None:
        return None
    decision = next(queue, None)
    if decision is None:
        raise ConfigError("the routing record has ended: it was made with fewer MoE layers, or fewer passes")
    for ids_A, limit, what in (
        (decision.options.token_ids_A, tokens, "token"),
        (decision.options.expert_ids_A, num_experts, "expert"),
    ):
        if ids_A.numel() and not 0 <= int(ids_A.min()) <= int(ids_A.max()) < limit:
            raise ConfigError(f"the routing record names {what} {int(ids_A.max())}, but this layer has {limit}")
    if decision.options.top_k is not None and decision.options.token_ids_A.numel() != tokens * decision.options.top_k:
        raise ConfigError(f"the routing record was made with another number of tokens than {tokens}")
    return decision


def keep(decision: Decision) -> Decision:
    """Add the decision to the record that is being made, if any; returns it."""
    append: Callable[[Decision], None] | None = getattr(_local, "append", None)
    if append is not None:
        append(decision)
    return decision


@contextmanager
def _bound(append: Callable[[Decision], None] | None, queue: Iterator[Decision] | None) -> Iterator[None]:
    before = (getattr(_local, "append", None), getattr(_local, "queue", None))
    _local.append, _local.queue = append, queue
    try:
        yield
    finally:
        _local.append, _local.queue = before


def _decision(
    tensors: dict[str, Tensor],
    number: int,
    top_k: int | None,
    chosen_k: int | None,
    seed: int | None,
    rows_per_expert: int | None,
) -> Decision:
    part = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
    for name, tensor in part.items():
        if tensor.dtype != (torch.bool if name == "kept" else torch.int64) or tensor.ndim != 1:
            raise ValueError(f"{number}.{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}")
    chosen = Choice(part["chosen_tokens"], part["chosen_experts"], chosen_k) if "chosen_tokens" in part else None
    return Decision(Choice(part["tokens"], part["experts"], top_k), part.get("kept"), chosen, seed, rows_per_expert)
