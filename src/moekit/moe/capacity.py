"""Capacity: how many tokens an expert takes, who comes first, and where the others go.

Pure functions of a choice and its scores; weights are the router's business.
Shapes: T tokens, S sequences, E experts, A assignments, N assignments that still look for room.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config import CapacityConfig
from moekit.moe.types import Choice

__all__ = ["limit", "slots_of"]


def limit(
    choice: Choice,
    rows: int,
    config: CapacityConfig,
    *,
    wanted_A: Tensor,
    scores_TE: Tensor,
    probs_TE: Tensor,
    sequences: int = 1,
) -> tuple[Choice, Tensor]:
    """Let every expert take at most `rows` assignments of each sequence.

    Args:
        choice: what the router chose, in token order.
        rows: the capacity of one expert.
        wanted_A: bool; the assignments that look for room: not those of padding, or that were skipped by chance.
        scores_TE: what ranks the experts of a token; −inf where one is out of the question.
        probs_TE: what ranks the assignments in order "probability".
        sequences: how many of equal length the tokens are; one sequence's tokens take no room from another's.
    Returns:
        The choice with overflowing assignments moved (overflow "next": in rounds, so that nobody moves before all have
        asked for what they chose), and bool (A,): which of its rows have room.
        A token never gets the same expert twice; those without room name the expert that was chosen at first.
    """
    tokens_A, experts_A = choice.token_ids_A, choice.expert_ids_A.clone()
    kept_A = torch.zeros_like(tokens_A, dtype=torch.bool)
    room_SE = torch.full((sequences, scores_TE.shape[1]), rows, device=tokens_A.device)
    sequence_A = tokens_A // max(1, scores_TE.shape[0] // sequences)
    order_A = _order(choice, probs_TE, config)
    waiting_N = order_A[wanted_A[order_A]]
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    taken_TE[tokens_A, experts_A] = True
    while waiting_N.numel():
        seats_N = sequence_A[waiting_N] * room_SE.shape[1] + experts_A[waiting_N]
        fits_N = rank_in_group(seats_N) < room_SE.flatten()[seats_N]
        kept_A[waiting_N[fits_N]] = True
        room_SE -= torch.bincount(seats_N[fits_N], minlength=room_SE.numel()).view_as(room_SE)
        waiting_N = waiting_N[~fits_N]
        if config.overflow == "drop":
            break
        room_NE = room_SE[sequence_A[waiting_N]]
        waiting_N = _move(waiting_N, tokens_A, experts_A, scores_TE, room_NE, taken_TE)
    return Choice(tokens_A, torch.where(kept_A, experts_A, choice.expert_ids_A), choice.top_k), kept_A


def slots_of(choice: Choice) -> Tensor:
    """(A,) int64: 0 for a token's first assignment, 1 for its second, and so on."""
    return rank_in_group(choice.token_ids_A)


def rank_in_group(groups_N: Tensor) -> Tensor:
    """(N,) int64: how many earlier elements have the same value.

    >>> rank_in_group(torch.tensor([5, 3, 5, 5, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order_N = groups_N.argsort(stable=True)
    sorted_N = groups_N[order_N]
    positions_N = torch.arange(groups_N.shape[0], device=groups_N.device)
    first_N = torch.searchsorted(sorted_N, sorted_N)
    return order_N.scatter(0, order_N, positions_N - first_N)


def _order(choice: Choice, probs_TE: Tensor, config: CapacityConfig) -> Tensor:
    """(A,): the assignments, those that come first first."""
    if config.order == "probability":
        return probs_TE[choice.token_ids_A, choice.expert_ids_A].argsort(descending=True, stable=True)
    return slots_of(choice).argsort(stable=True)


def _move(
    waiting_N: Tensor, tokens_A: Tensor, experts_A: Tensor, scores_TE: Tensor, room_NE: Tensor, taken_TE: Tensor
) -> Tensor:
    """Point each waiting assignment at its token's best expert that has room and that the token does not hold.

    One a token and round, so that two of the same token do not meet. Returns those that still have somewhere to go.
    """
    open_NE = (room_NE > 0) & ~taken_TE[tokens_A[waiting_N]] & (scores_TE[tokens_A[waiting_N]] > -torch.inf)
    waiting_N, open_NE = waiting_N[open_NE.any(dim=1)], open_NE[open_NE.any(dim=1)]
    now_N = rank_in_group(tokens_A[waiting_N]) == 0
    scores_NE = scores_TE[tokens_A[waiting_N]].masked_fill(~open_NE, -torch.inf)
    # The first of the best: argmax leaves open which of equals it names.
    is_best_NE = (scores_NE == scores_NE.amax(dim=1, keepdim=True)).to(torch.uint8)
    moved_N = waiting_N[now_N]
    experts_A[moved_N] = is_best_NE.sort(dim=1, descending=True, stable=True).indices[now_N, 0]
    taken_TE[tokens_A[moved_N], experts_A[moved_N]] = True
    return waiting_N
