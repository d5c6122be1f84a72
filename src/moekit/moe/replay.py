"""Record routing decisions, and repeat them: recomputation under checkpointing never re-routes.

The indices are replayed, the weights are not: they are computed again from the live logits, so the
router's gradient is exact. A record is bound by a `with` statement, to one thread, and to nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

__all__ = ["RoutingRecord", "replayed"]

_local = threading.local()


class RoutingRecord:
    """The expert choices of the MoE layers that ran inside `recording()`, in the order they ran.

    >>> record = RoutingRecord()
    >>> record.contexts()            # what torch.utils.checkpoint's context_fn wants # doctest: +ELLIPSIS
    (<...>, <...>)
    """

    def __init__(self) -> None:
        self.choices: list[Tensor] = []

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(recording, replaying): pass the bound method as `context_fn` of torch.utils.checkpoint."""
        return self.recording(), self.replaying()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every choice made in this block."""
        self.choices.clear()
        with _bound(self.choices.append, None):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Repeat the kept choices, first to last. May be entered many times."""
        queue = iter(self.choices)
        with _bound(None, queue):
            yield


def replayed(choose: Callable[[Tensor], Tensor], logits_TE: Tensor) -> Tensor:
    """The expert ids for these logits: the recorded ones while replaying, else `choose(logits_TE)`."""
    queue = getattr(_local, "queue", None)
    if queue is not None:
        ids: Tensor = next(queue)
        return ids
    ids = choose(logits_TE)
    keep = getattr(_local, "keep", None)
    if keep is not None:
        keep(ids)
    return ids


@contextmanager
def _bound(keep: Callable[[Tensor], None] | None, queue: Iterator[Tensor] | None) -> Iterator[None]:
    before = (getattr(_local, "keep", None), getattr(_local, "queue", None))
    _local.keep, _local.queue = keep, queue
    try:
        yield
    finally:
        _local.keep, _local.queue = before
