"""The router losses of a training run: which, with what weights, and what the balance is taken over.

Shapes: B rows, L tokens a row, T = B · L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moekit.moe import Routing, RoutingTotals, losses

__all__ = ["RouterLosses"]


class RouterLosses:
    """Values and weighted sum of a micro-batch's router losses.

    The balance and the z-loss are always computed, so that they are logged also where nothing is made of them.

    Args:
        balance_coef, z_coef: weights of the load-balancing loss and the z-loss.
        balance_over: as in `TrainConfig`.
        others: weights of further losses by their names in `losses.LOSSES`.
    Raises:
        UnknownNameError: there is no such loss.
    """

    def __init__(
        self,
        balance_coef: float,
        z_coef: float,
        balance_over: Literal["micro_batch", "sequence", "step"],
        others: Mapping[str, float],
    ) -> None:
        self.weights = {"load_balancing": balance_coef, "z_loss": z_coef}
        for name, weight in others.items():
            self.weights[name] = self.weights.get(name, 0.0) + weight
        self._functions = {name: losses.LOSSES[name] for name in self.weights}
        self.balance_over = balance_over

    def values(
        self, routings: Sequence[Routing], sequences_BL: Tensor, so_far: Sequence[RoutingTotals]
    ) -> dict[str, Tensor]:
        """Each loss, before its weight.

        Args:
            sequences_BL: int, which document of its row a token belongs to.
            so_far: the layers' totals of the step, this micro-batch included.
        """
        values = {name: loss(routings) for name, loss in self._functions.items() if name != "load_balancing"}
        return {"load_balancing": self._balance(routings, sequences_BL, so_far)} | values

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Σ weight · value over the losses that have a weight."""
        weighted = [weight * values[name] for name, weight in self.weights.items() if weight]
        return torch.stack(weighted).sum() if weighted else torch.zeros(())

    def _balance(self, routings: Sequence[Routing], sequences_BL: Tensor, so_far: Sequence[RoutingTotals]) -> Tensor:
        if self.balance_over == "sequence":
            return losses.sequence_balancing(routings, sequence_ids(sequences_BL))
        if self.balance_over == "step":
            return losses.load_balancing(routings, counts_E=[totals.chosen_E for totals in so_far])
        return losses.load_balancing(routings)


def sequence_ids(document_ids_BL: Tensor) -> Tensor:
    """(T,) int64: a number for each document of each row.

    >>> sequence_ids(torch.tensor([[0, 0, 1], [0, 1, 1]])).tolist()
    [0, 0, 1, 2, 3, 3]
    """
    rows_B1 = torch.arange(document_ids_BL.shape[0], device=document_ids_BL.device).unsqueeze(1)
    return (document_ids_BL.long() + rows_B1 * (document_ids_BL.max() + 1)).flatten()
