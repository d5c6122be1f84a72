"""Router losses: pure functions of a `Routing`. Nothing is collected globally, nothing is added twice.

Each takes one layer's routing or a sequence of them; a sequence gives the mean over layers, never a
pool of their tokens (two layers that collapse on different experts must not look balanced together).
Each returns a scalar, float32 also under autocast (float64 for float64 logits), 0 when there is no real token,
and raises `ConfigError` for an empty sequence: a dense model has no routing to balance.
Counts have no gradient, probabilities have: P is the mean of `Routing.probs_TE` over real tokens.
`count` says which assignments are counted: the K best "scored" experts, as if there were no selection bias, groups
or capacity; those the router has "chosen", which is the default; or those that capacity "kept", which hides overload.
Shapes: T tokens, E experts, K experts a token, A assignments, G groups of E/G experts each, in order, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.errors import ConfigError, UnsupportedError
from moekit.moe.types import Choice, Routing
from moekit.registry import Registry

__all__ = [
    "LOSSES",
    "Count",
    "RouterLoss",
    "Routings",
    "communication_balancing",
    "entropy",
    "group_balancing",
    "importance",
    "load",
    "load_balancing",
    "sequence_balancing",
    "z_loss",
]

Routings: TypeAlias = Routing | Sequence[Routing]
RouterLoss: TypeAlias = Callable[[Routings], Tensor]
Count: TypeAlias = Literal["scored", "chosen", "kept"]


def load_balancing(
    routing: Routings, *, count: Count = "chosen", counts_E: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """Switch Transformer's balance loss, normalised by K: L = E · Σ_i f_i · P_i, with f_i = c_i / Σ_j c_j.

    1 when counts or probabilities are uniform; E when everything goes to one expert with K = 1, and E/K when K
    experts share everything evenly. Not a distance: it falls below 1 where the experts chosen often are those with
    little probability. Source: 2101.03961 eq 4–6 for K = 1; docs/math.md converts other libraries' versions.

    Args:
        count: which assignments c counts.
        counts_E: c of the whole global batch instead of the routing's own, one (E,) for each layer (2501.11873).
            Weigh each micro-batch's loss by its share of the real tokens: the sum is then the whole batch's loss,
            however the batch was cut.
    Raises:
        ConfigError: counts_E does not fit the routings, or was given beside count "kept".

    >>> ids, weights = torch.tensor([0, 0]), torch.ones(2)
    >>> routing = Routing(torch.arange(2), ids, weights, torch.tensor([[9.0, -9.0]]).expand(2, 2), top_k=1)
    >>> round(load_balancing(routing).item(), 3)
    2.0
    >>> load_balancing(routing, counts_E=torch.tensor([5, 5])).item()   # elsewhere the batch made up for it
    1.0
    """
    layers = _layers(routing)
    shares = _shares(layers, count, counts_E)
    return _mean(
        one.num_experts * (share_E * _mean_probs(one)).sum() for one, share_E in zip(layers, shares, strict=True)
    )


def sequence_balancing(routing: Routings, sequence_ids_T: Tensor, *, count: Count = "chosen") -> Tensor:
    """The balance loss of every sequence by itself, averaged over the sequences, long or short.

    L = 1/S · Σ_s E · Σ_i f_i^s · P_i^s, with counts and probabilities of the tokens of sequence s. Values as
    `load_balancing`. Source: 2412.19437 eq 17–20, where P is made of sigmoid scores divided by their sum, as
    `Routing.probs_TE` of a sigmoid router is, and where count is "scored": the selection bias is left out of eq 18.

    Args:
        sequence_ids_T: int64; tokens with the same id are one sequence, wherever they stand. Packed documents need
            an id each, also across the rows of a batch. Sequences without a real token do not count.
    Raises:
        ConfigError: sequence_ids_T does not hold one id a token.

    >>> routing = Routing(torch.arange(2), torch.arange(2), torch.ones(2), torch.eye(2) * 99, top_k=1)
    >>> load_balancing(routing).item(), sequence_balancing(routing, torch.tensor([7, 8])).item()
    (1.0, 2.0)
    """
    return _mean(_sequence_balancing(one, sequence_ids_T, count) for one in _layers(routing))


def group_balancing(
    routing: Routings,
    groups: int | None = None,
    *,
    count: Count = "chosen",
    counts_E: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Balance between groups of experts, on one device each; inside a group anything goes: L = Σ_g f'_g · P'_g.

    f'_g is the mean over the group of E · c_i / Σ_j c_j, and P'_g the sum of its P_i. 1 when groups are balanced; G
    when one group gets everything. With the groups of a hierarchical router it balances the upper level; with
    groups = E it is `load_balancing`. Source: 2401.06066 eq 15–17.

    Args:
        groups: G groups of equal size, experts in order; the router's own (`Routing.groups`) when not given.
        counts_E: as in `load_balancing`.
    Raises:
        ConfigError: groups does not divide the number of experts, or counts_E does not fit.
        UnsupportedError: groups is not given and the router has none.

    >>> ids = torch.tensor([0, 0, 2, 2])   # experts 1 and 3 idle, groups {0, 1} and {2, 3} balanced
    >>> group_balancing(Routing(torch.arange(4), ids, torch.ones(4), torch.zeros(4, 4), top_k=1), groups=2).item()
    1.0
    """
    layers = _layers(routing)
    shares = _shares(layers, count, counts_E)
    return _mean(
        number * (_by_group(share_E, number) * _by_group(_mean_probs(one), number)).sum()
        for one, share_E, number in zip(layers, shares, _group_numbers(layers, groups), strict=True)
    )


def communication_balancing(
    routing: Routings, groups: int, groups_per_token: int, *, count: Count = "chosen"
) -> Tensor:
    """Balance of what groups of experts (devices) receive: L = G / (M·T) · Σ_g sent_g · P'_g.

    sent_g counts tokens of which at least one expert is in group g, each once, since a token travels to a device
    once; M is the number of groups a token may use. 1 when every token uses M groups and all are used evenly; G/M
    when all use the same ones. A token that uses fewer lowers it. Source: 2405.04434 eq 29–31.

    Args:
        groups: G groups of equal size, experts in order.
        groups_per_token: M, as in `GroupLimit.chosen`.
    Raises:
        ConfigError: groups does not divide the number of experts, or groups_per_token is not among 1 … groups.

    >>> ids = torch.tensor([0, 1, 2, 3])   # token 0 uses both experts of group 0, token 1 both of group 1
    >>> routing = Routing(torch.tensor([0, 0, 1, 1]), ids, torch.ones(4), torch.zeros(2, 4), top_k=2)
    >>> communication_balancing(routing, groups=2, groups_per_token=1).item()
    1.0
    """
    if not 1 <= groups_per_token <= groups:
        raise ConfigError(f"groups_per_token must lie from 1 to groups ({groups}), not {groups_per_token}")
    return _mean(
        (groups / groups_per_token) * (_sent(one, groups, count) * _by_group(_mean_probs(one), groups)).sum()
        for one in _layers(routing)
    )


def z_loss(routing: Routings) -> Tensor:
    """Router z-loss: mean over real tokens of logsumexp(logits)². Source: 2202.08906 eq 5.

    Keeps logits small; says nothing of balance: (ln E)² for logits of 0. The gradient is 2 · lse · softmax / T. 0 for
    a hierarchical router, whose logits are log probabilities.

    >>> ids, weights = torch.tensor([0]), torch.ones(1)
    >>> round(z_loss(Routing(ids, ids, weights, torch.zeros(1, 2), top_k=1)).item(), 4)   # (ln 2)²
    0.4805
    """
    return _mean(
        one.logits_TE[_real(one)].logsumexp(dim=-1).square().sum() / max(one.real_tokens, 1) for one in _layers(routing)
    )


def importance(routing: Routings) -> Tensor:
    """Squared coefficient of variation of the experts' summed weights: E · Σ_i s_i² − 1, s_i = Σ_t w_ti / Σ_j Σ_t w_tj.

    0 when all experts weigh the same; E − 1 when one has all the weight, E/K − 1 when K share it evenly. w are the
    combine weights, so only assignments that capacity kept count. Source: 1701.06538 eq 6–7. (The form Σ s(1 − s)
    found in write-ups is *largest* at balance: minimising it collapses the router.)

    >>> ids = torch.tensor([0, 0])
    >>> importance(Routing(torch.arange(2), ids, torch.ones(2), torch.zeros(2, 2), top_k=1)).item()
    1.0
    """
    return _mean(_variation(_summed_weights(one)) for one in _layers(routing))


def load(routing: Routings) -> Tensor:
    """Squared coefficient of variation of the experts' expected numbers of tokens, Σ_t `Routing.load_TE`.

    Unlike counts these have a gradient, since the gate's noise makes them smooth. 0 at balance, E/K − 1 when the same
    K experts are always chosen. Source: 1701.06538 eq 8–11.

    Raises:
        UnsupportedError: the routing has no load: only router noisy_topk gives one, and only while training.

    >>> tokens, ids = torch.tensor([0]), torch.tensor([0])
    >>> sure = torch.tensor([[1.0, 0.0]])
    >>> load(Routing(tokens, ids, torch.ones(1), torch.zeros(1, 2), top_k=1, load_TE=sure)).item()
    1.0
    """
    return _mean(_variation(_load_TE(one)[_real(one)].sum(dim=0)) for one in _layers(routing))


def entropy(routing: Routings) -> Tensor:
    """Mean over real tokens of the entropy of p, in nats: the dynamic loss of top-p routing. Source: 2403.07652 eq 6.

    ln E when a token's experts are equally probable, 0 when it is sure of one: minimising it makes tokens need fewer
    experts. It balances nothing; use it beside `load_balancing`.

    >>> ids = torch.tensor([0])
    >>> round(entropy(Routing(ids, ids, torch.ones(1), torch.zeros(1, 2), top_k=1)).item(), 4)   # ln 2
    0.6931
    """
    return _mean(_entropy(one) for one in _layers(routing))


LOSSES: Registry[RouterLoss] = Registry("router loss")
"""The losses that need nothing but routings, by name."""
# Registered here and not by decorators, which would forget the functions' keyword arguments.
for _loss in (load_balancing, group_balancing, z_loss, importance, load, entropy):
    LOSSES.register(_loss.__name__)(_loss)


def _layers(routing: Routings) -> Sequence[Routing]:
    if isinstance(routing, Routing):
        return [routing]
    if not routing:
        raise ConfigError("no routing to compute a router loss from: the model has no MoE layer")
    return routing


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _real(routing: Routing) -> Tensor | slice:
    """Index of the real tokens. Rows are selected before anything is computed of them, so that garbage in padding
    (an infinity, too) reaches neither a value nor a gradient."""
    return slice(None) if routing.mask_T is None else routing.mask_T


def _log_scores(routing: Routing) -> Tensor:
    """Real tokens × E, of which `probs_TE` is the softmax: σ(l) / Σ σ(l) is the softmax of log σ(l)."""
    logits_TE = routing.logits_TE[_real(routing)]
    return logits_TE if routing.score_function == "softmax" else F.logsigmoid(logits_TE)


def _mean_probs(routing: Routing) -> Tensor:
    """(E,): P, the mean of p over real tokens."""
    return _log_scores(routing).softmax(dim=-1).sum(dim=0) / max(routing.real_tokens, 1)


def _choice(routing: Routing, count: Count) -> Choice:
    """The assignments that are counted, padding's among them."""
    if count not in ("scored", "chosen", "kept"):
        raise ConfigError(f"count must be scored, chosen or kept, not {count!r}")
    kept = Choice(routing.token_ids_A, routing.expert_ids_A, routing.top_k)
    chosen = routing.chosen or kept
    return _scored(routing, chosen.top_k) if count == "scored" else chosen if count == "chosen" else kept


def _scored(routing: Routing, top_k: int | None) -> Choice:
    if top_k is None:
        raise UnsupportedError('count "scored" needs a router that chooses the same number of experts for every token')
    return Choice.regular(routing.logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k])


def _shares(layers: Sequence[Routing], count: Count, counts_E: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """One (E,) for each layer: f, the experts' shares of the assignments; from `counts_E` if given."""
    if counts_E is None:
        counts = [_choice(one, count).counts(one.num_experts, one.mask_T) for one in layers]
    else:
        counts = _given_counts(layers, count, counts_E)
    return [
        # Divided by what was assigned, which is K·T where every token has K experts.
        count_E.to(one.logits_TE) / count_E.sum().clamp(min=1).to(one.logits_TE)
        for one, count_E in zip(layers, counts, strict=True)
    ]


def _given_counts(layers: Sequence[Routing], count: Count, counts_E: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if count != "chosen":
        raise ConfigError(f"counts_E already says what is counted: leave count {count!r} out")
    counts = [counts_E] if isinstance(counts_E, Tensor) and counts_E.ndim <= 1 else list(counts_E)
    shapes, wanted = [tuple(one.shape) for one in counts], [(one.num_experts,) for one in layers]
    if shapes != wanted:
        raise ConfigError(f"counts_E must have one count an expert for each layer, shapes {wanted}, not {shapes}")
    return counts


def _sequence_balancing(routing: Routing, sequence_ids_T: Tensor, count: Count) -> Tensor:
    if sequence_ids_T.shape != (routing.num_tokens,):
        shape = tuple(sequence_ids_T.shape)
        raise ConfigError(f"sequence_ids_T must hold one id for each of {routing.num_tokens} tokens, not {shape}")
    real_T, experts = _real(routing), routing.num_experts
    _, sequence_N, tokens_S = torch.unique(sequence_ids_T[real_T], return_inverse=True, return_counts=True)
    sequence_T = torch.full_like(sequence_ids_T, -1)
    sequence_T[real_T] = sequence_N
    counts_SE = _counts_by_sequence(_choice(routing, count), sequence_T, len(tokens_S), experts)
    probs_NE = _log_scores(routing).softmax(dim=-1)  # N real tokens
    sums_SE = probs_NE.new_zeros(len(tokens_S), experts).index_add(0, sequence_N, probs_NE)
    assigned_S = counts_SE.sum(dim=1).clamp(min=1)
    loss_S: Tensor = experts * (counts_SE.to(sums_SE) * sums_SE).sum(dim=1) / (assigned_S * tokens_S)
    return loss_S.sum() / max(len(tokens_S), 1)


def _counts_by_sequence(choice: Choice, sequence_T: Tensor, sequences: int, experts: int) -> Tensor:
    """(S, E) int64: assignments to each expert; `sequence_T` numbers each token's sequence, −1 for padding."""
    sequence_A = sequence_T[choice.token_ids_A]
    cell_A = (sequence_A * experts + choice.expert_ids_A)[sequence_A >= 0]
    return torch.bincount(cell_A, minlength=sequences * experts).view(sequences, experts)


def _by_group(values_E: Tensor, groups: int) -> Tensor:
    """(G,): sums over groups."""
    _check_groups(values_E.shape[0], groups)
    return values_E.view(groups, -1).sum(dim=1)


def _sent(routing: Routing, groups: int, count: Count) -> Tensor:
    """(G,): the share of real tokens that use each group."""
    _check_groups(routing.num_experts, groups)
    choice = _choice(routing, count)
    sent_TG = torch.zeros(routing.num_tokens, groups, dtype=torch.bool, device=choice.token_ids_A.device)
    sent_TG[choice.token_ids_A, choice.expert_ids_A // (routing.num_experts // groups)] = True
    return sent_TG[_real(routing)].sum(dim=0).to(routing.logits_TE) / max(routing.real_tokens, 1)


def _group_numbers(layers: Sequence[Routing], groups: int | None) -> list[int]:
    """The number of groups of each layer."""
    numbers = [one.groups if groups is None else groups for one in layers]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        raise UnsupportedError("this router has no groups of experts: say how many with groups=")
    return known


def _check_groups(experts: int, groups: int) -> None:
    if groups < 1 or experts % groups:
        raise ConfigError(f"groups ({groups}) must divide the number of experts ({experts})")


def _summed_weights(routing: Routing) -> Tensor:
    """(E,): the weights of each expert's real tokens."""
    mask_T = routing.mask_T
    real_A = slice(None) if mask_T is None else mask_T[routing.token_ids_A]
    zeros_E = routing.weights_A.new_zeros(routing.num_experts)
    return zeros_E.index_add(0, routing.expert_ids_A[real_A], routing.weights_A[real_A])


def _load_TE(routing: Routing) -> Tensor:
    if routing.load_TE is None:
        raise UnsupportedError(
            "the load loss needs Routing.load_TE, which router noisy_topk gives in training mode; "
            "load_balancing works with every router"
        )
    return routing.load_TE


def _variation(sums_E: Tensor) -> Tensor:
    """(standard deviation / mean)² over the experts; 0 for zeros."""
    shares_E = sums_E / sums_E.sum().clamp(min=torch.finfo(sums_E.dtype).tiny)
    # E·Σs² − 1 for shares that add up to 1, without the cancellation.
    return sums_E.shape[0] * (shares_E - shares_E.mean()).square().sum()


def _entropy(routing: Routing) -> Tensor:
    log_probs_TE = _log_scores(routing).log_softmax(dim=-1)
    return -(log_probs_TE.exp() * log_probs_TE).sum() / max(routing.real_tokens, 1)
