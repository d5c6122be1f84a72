"""Record routing decisions, and repeat them: recomputation never re-routes, and a trace can be routed again.

What is recorded is the decision: which token goes to which expert, what capacity did to it, and the seed of the
noise. The weights are computed again from the live logits, so the router's gradient is exact. A record is bound by
a `with` statement or a wrapped function, to one thread, and to nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moekit.errors import ConfigError, FormatError
from moekit.files import file_errors, write_atomic
from moekit.moe.types import Choice

__all__ = ["Decision", "RoutingRecord", "decided", "is_bound", "next_decision"]

P = ParamSpec("P")
R = TypeVar("R")
_local = threading.local()


@dataclass(frozen=True, eq=False)
class Decision:
    """Everything about a routing that is not computed from live scores.

    Attributes:
        options: the (token, expert) pairs that weights are computed for, after capacity moved some of them.
        tokens: how many there were.
        experts: how many there were; or one more than the highest id, where only ids are known.
        kept_A: bool, which of them become assignments; None when all do.
        chosen: what the router chose before capacity; None when nothing was limited.
        seed: of the noise; None without any.
        rows_per_expert: as in `Routing`.
    """

    options: Choice
    tokens: int
    experts: int
    kept_A: Tensor | None = None
    chosen: Choice | None = None
    seed: int | None = None
    rows_per_expert: int | None = None

    def to(self, device: torch.device) -> Decision:
        """The same on this device."""
        if self.options.token_ids_A.device == device:
            return self
        kept_A = None if self.kept_A is None else self.kept_A.to(device)
        chosen = None if self.chosen is None else self.chosen.to(device)
        return replace(self, options=self.options.to(device), kept_A=kept_A, chosen=chosen)


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
        """A record of expert ids (T, K) that came from elsewhere, one a layer call.

        Raises:
            ConfigError: ids of another shape, or below 0.
        """
        for ids_TK in expert_ids:
            if ids_TK.ndim != 2 or (ids_TK < 0).any():
                raise ConfigError(f"expert ids must be (tokens, k) and at least 0, not of shape {tuple(ids_TK.shape)}")
        return cls(
            [
                Decision(Choice.regular(ids_TK.long()), len(ids_TK), int(ids_TK.max()) + 1 if ids_TK.numel() else 0)
                for ids_TK in expert_ids
            ]
        )

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, recorded on its first call and replayed on every later one.

        Give it to `torch.utils.checkpoint.checkpoint` in place of the function, in either mode (reentrant or not)
        and with any `context_fn`: the first call is the forward pass, the others recompute it. A recomputation leaves
        torch's random numbers as it met them, also with `preserve_rng_state` False.
        """
        calls = iter((self.recording,))

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with next(calls, self._recomputing)():
                return function(*args, **kwargs)

        return run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every decision made in this block, also those of records inside it and of one that is replayed."""
        self.decisions.clear()
        with _bound((*_appends(), self.decisions.append), _queue()):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Repeat the kept decisions, first to last; nothing is recorded. May be entered many times."""
        with _bound((), iter(self.decisions)):
            yield

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]), self.replaying():
            yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a safetensors file, whole or not at all.

        Raises:
            FileError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}
        for number, decision in enumerate(self.decisions):
            options, chosen = decision.options, decision.chosen
            parts = {"tokens": options.token_ids_A, "experts": options.expert_ids_A, "kept": decision.kept_A}
            if chosen is not None:
                parts |= {"chosen_tokens": chosen.token_ids_A, "chosen_experts": chosen.expert_ids_A}
            for name, part in parts.items():
                if part is not None:  # a copy of its own: the format refuses strides and shared memory
                    tensors[f"{number}.{name}"] = part.cpu().clone(memory_format=torch.contiguous_format)
        facts = [_facts(decision) for decision in self.decisions]
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
            return cls([_decision(tensors, number, **fact) for number, fact in enumerate(facts)])
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise FormatError(f"{path} is not a record of routings ({type(error).__name__}: {error})") from None


def next_decision(tokens: int, num_experts: int, device: torch.device) -> Decision | None:
    """The decision to repeat for a layer of this size; None when nothing is replayed.

    Raises:
        ConfigError: the record holds too few decisions, or was made with other sizes.
    """
    queue = _queue()
    if queue is None:
        return None
    decision = next(queue, None)
    if decision is None:
        raise ConfigError("the routing record has ended: it was made with fewer MoE layers, or fewer passes")
    if decision.tokens != tokens:
        raise ConfigError(f"the routing record was made with {decision.tokens} tokens, but now there are {tokens}")
    if decision.experts > num_experts:
        raise ConfigError(f"the routing record was made with {decision.experts} experts, this layer has {num_experts}")
    return decision.to(device)


def decided(past: Decision | None, decide: Callable[[], Decision]) -> Decision:
    """The past decision if there is one, else a new one; added to the records that are being made."""
    appends = _appends()
    if past is None:
        # Selective checkpointing counts the calls of each op, and recomputation will not decide again.
        with _disable_current_modes() if appends else contextlib.nullcontext():
            past = decide()
    for append in appends:
        append(past)
    return past


Appends = tuple[Callable[[Decision], None], ...]


def is_bound() -> bool:
    """Whether this thread's decisions are being recorded or repeated."""
    return bool(_appends()) or _queue() is not None


def _appends() -> Appends:
    """Where this thread's decisions are added."""
    appends: Appends = getattr(_local, "appends", ())
    return appends


def _queue() -> Iterator[Decision] | None:
    """The decisions that this thread repeats."""
    queue: Iterator[Decision] | None = getattr(_local, "queue", None)
    return queue


@contextmanager
def _bound(appends: Appends, queue: Iterator[Decision] | None) -> Iterator[None]:
    before = _appends(), _queue()
    _local.appends, _local.queue = appends, queue
    try:
        yield
    finally:
        _local.appends, _local.queue = before


def _facts(decision: Decision) -> dict[str, int | None]:
    """What of a decision is no tensor."""
    return {
        "tokens": decision.tokens,
        "experts": decision.experts,
        "top_k": decision.options.top_k,
        "chosen_k": decision.chosen.top_k if decision.chosen is not None else None,
        "seed": decision.seed,
        "rows_per_expert": decision.rows_per_expert,
    }


def _decision(tensors: dict[str, Tensor], number: int, **fact: Any) -> Decision:
    """Decision `number` of a file, as far as it makes sense: ValueError, KeyError or TypeError where it does not."""
    tokens, experts = _whole(fact["tokens"]), _whole(fact["experts"])
    seed, rows = (None if fact[name] is None else _whole(fact[name]) for name in ("seed", "rows_per_expert"))
    options = _choice(tensors, f"{number}.", tokens, experts, fact["top_k"])
    kept_A, chosen = tensors.get(f"{number}.kept"), None
    if kept_A is not None and (kept_A.dtype != torch.bool or kept_A.shape != options.token_ids_A.shape):
        raise ValueError(f"{number}.kept has dtype {kept_A.dtype} and shape {tuple(kept_A.shape)}")
    if f"{number}.chosen_tokens" in tensors:
        chosen = _choice(tensors, f"{number}.chosen_", tokens, experts, fact["chosen_k"])
    used_A = options.expert_ids_A if kept_A is None else options.expert_ids_A[kept_A]
    if rows is not None and used_A.numel() and int(used_A.bincount().max()) > rows:
        raise ValueError(f"{number}: an expert has more than {rows} tokens")
    return Decision(options, tokens, experts, kept_A, chosen, seed, rows)


def _choice(tensors: dict[str, Tensor], prefix: str, tokens: int, experts: int, top_k: int | None) -> Choice:
    parts = []
    for name, limit in (("tokens", tokens), ("experts", experts)):
        ids_A = tensors[prefix + name]
        inside = ids_A.dtype == torch.int64 and ids_A.ndim == 1 and bool(((ids_A >= 0) & (ids_A < limit)).all())
        if not inside:
            raise ValueError(f"{prefix}{name} are no whole numbers from 0 to {limit - 1}")
        parts.append(ids_A)
    tokens_A, experts_A = parts
    if tokens_A.shape != experts_A.shape or bool((tokens_A.diff() < 0).any()):
        raise ValueError(f"{prefix}tokens do not ascend, or do not fit {prefix}experts")
    if top_k is not None:
        count = tokens * _whole(top_k)
        if tokens_A.numel() != count or not torch.equal(tokens_A, torch.arange(count) // max(top_k, 1)):
            raise ValueError(f"{prefix}tokens do not come {top_k} times each")
    return Choice(tokens_A, experts_A, top_k)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no whole number of at least 0")
    return value
