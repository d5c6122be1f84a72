"""What a trap may ask of a library.

A trap is a generator of `Check`s. A check measures one deviation from the right answer through an `Adapter` and has
a limit (judge.py). An adapter answers what its library can do; everything else is `Absent`, which is the default.

Shapes: T tokens, D hidden, E experts, K experts a token, F inner width, G = 2F, B sequences, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conformance.judge import Absent, Check, Finding, Measured, NotApplicable, judge

# How checkpointing may be asked for: not at all, or in either of PyTorch's two modes.
MODES = ("none", "non-reentrant", "reentrant")


class Routed(NamedTuple):
    """A routing in a form that every library's can be brought into.

    weights_TE: the combine weight, 0 where a token does not use an expert; carries the gradient.
    chosen_TE: bool, what was kept; logits_TE: the raw scores.
    """

    weights_TE: Tensor
    chosen_TE: Tensor
    logits_TE: Tensor

    @classmethod
    def of(cls, logits_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Routed:
        """From ids and weights (T, K)."""
        zeros_TE = torch.zeros(logits_TE.shape, dtype=weights_TK.dtype)
        chosen_TE = zeros_TE.scatter(1, ids_TK, 1.0).bool()
        return cls(zeros_TE.scatter(1, ids_TK, weights_TK), chosen_TE, logits_TE)


class Parts(NamedTuple):
    """A layer's parameters in one layout, made of them with their gradient: gate rows before up rows."""

    gate_ED: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: top-k of a softmax, weights divided by their sum, SwiGLU experts without biases."""

    hidden: int = 16
    inner: int = 8
    experts: int = 6
    top_k: int = 2


class Layer(NamedTuple):
    """A library's layer: its module, its router, a call (B, L, D) → (B, L, D), and its parameters as `Parts`."""

    module: nn.Module
    router: nn.Module
    run: Callable[[Tensor], Tensor]
    parts: Callable[[], Parts]


class BiasedRouter(NamedTuple):
    """A router with a bias on the selection: its module, the bias, and how it is used and trained."""

    module: nn.Module
    bias: Callable[[], Tensor]
    route: Callable[[Tensor], Routed]
    step: Callable[[list[Tensor], str], None]
    """One optimizer step on these micro-batches, with the given checkpointing."""
    rate: float = 0.0


class LoraCase(NamedTuple):
    """One experts module with adapters: what it computes in each state, and the adapters' factors by parameter."""

    unmerged: Tensor
    merged: Tensor
    reloaded: Tensor
    expected: Tensor
    """The same experts with Δ_e = scale · B_e A_e added, by the adapter file alone."""


class Adapter:
    """The questions. Each method's docstring is the contract; a subclass overrides what its library can answer."""

    name = ""
    backends: tuple[str, ...] = ("only",)
    capacity_top_k: tuple[int, ...] = (1, 2)
    hashed = 0
    """A checksum of the hash router's choices that was computed in another process; see trap 19."""
    layer_tolerance = "fp32 twin"
    """The entry of tests/tolerances.py that a layer of fp32 parameters is held to."""
    outside: str | None = None
    """Why no trap but the listed ones can be put to this library."""
    traps: frozenset[int] = frozenset()
    remarks: Mapping[int, str] = {}
    """What a reader should know of this library's answer to a trap, beside the numbers."""

    @property
    def version(self) -> str:
        return version(self.name)

    # Losses

    def balance_factor(self, top_k: int) -> float:
        """By how much the library's balance loss exceeds the definition, as documented."""
        raise Absent("no balance loss")

    def balance_loss(self, layers: list[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
        """Of the logits (T, E) of each layer; the experts are the top K."""
        raise Absent("no balance loss")

    def biased_balance(self, logits_TE: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, the probabilities it uses, bool (T, E) the experts used) of a router with a bias on the selection."""
        raise Absent("no balance loss beside a selection bias")

    def limited_balance(self, logits_TE: Tensor, rows: int, count: str) -> Tensor:
        """The top-1 loss counting all that was chosen, or what a capacity of `rows` kept."""
        raise Absent("no balance loss beside a capacity")

    def sequence_loss(self, logits_TE: Tensor, sequence_T: Tensor, top_k: int, mask_T: Tensor | None) -> Tensor:
        """The mean over sequences of each one's balance loss; sequence_T numbers each token's."""
        raise Absent("no sequence-wise loss")

    def global_loss(self, parts: list[Tensor], top_k: int) -> Tensor:
        """The balance loss of a global batch that is cut into micro-batches of logits (t, E)."""
        raise Absent("no global-batch loss")

    def z_loss(self, logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
        raise Absent("no z-loss")

    def z_logits(self, x_TD: Tensor, gate_ED: Tensor) -> Tensor:
        """What the router behind the z-loss hands to it for bf16 hidden states and gate."""
        raise Absent("no z-loss")

    def trained(self, coef: float, mode: str, *, micro_batches: int = 1, scaled: bool = False) -> dict[str, Tensor]:
        """The router gates' gradients of LM + coef · balance of a small model, by name, after one step's backward.

        The model, its tokens and so the gradients are always the same; `scaled` goes through a GradScaler.
        """
        raise Absent("no balance loss in training")

    def aux_gradients(self, mode: str, micro_batches: int) -> dict[str, Tensor]:
        """∂ balance / ∂ gate of the model that `trained` uses in this mode, without checkpointing, by autograd alone;
        the mean over micro-batches."""
        raise Absent("no balance loss in training")

    def loss_inputs(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By router (T, E): (the distribution that its balance loss is made of, the right one)."""
        raise Absent("no balance loss")

    def says_switched_off(self) -> list[str]:
        """Warnings and log lines of a model whose coefficient is set while its loss is off."""
        raise Absent("no balance loss in training")

    # Routing

    def route(
        self,
        kind: str,
        x_TD: Tensor,
        gate_ED: Tensor,
        top_k: int,
        *,
        training: bool = False,
        mask_T: Tensor | None = None,
        **options: Any,
    ) -> Routed:
        """Route by a router of this kind whose gate is gate_ED.

        Kinds and options: topk (renormalise), biased (bias_E, groups, chosen), capacity (rows, order, overflow; top-1
        or top-2), expert_choice, sinkhorn, noisy, gumbel, hash (ids_T), jitter (size).
        """
        raise Absent(f"no {kind.replace('_', '-')} router")

    def renormalised_top1(self) -> nn.Module:
        """A top-1 layer with renormalised weights and hidden size 16, if the library lets one be made."""
        raise Absent("no router")

    def biased_router(self, gate_ED: Tensor, bias_E: Tensor, top_k: int) -> BiasedRouter:
        """A sigmoid router with this bias on the selection, weights divided by their sum."""
        raise Absent("no selection bias")

    def grouped(self) -> dict[str, Callable[..., Routed]]:
        """By name, call(x_TD, gate_ED, top_k, bias_E=, groups=, chosen=) of every router that has groups and a bias."""
        raise Absent("no group-limited router")

    def counted(self, mode: str) -> tuple[Tensor, Tensor]:
        """(counts by the library, counts by hand) of one training step with this checkpointing."""
        raise Absent("no counters")

    def autocast_logits(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, Tensor]:
        """By router, logits of fp32 hidden states and gate under bf16 autocast."""
        raise Absent("no router")

    def dropless(self, gate_ED: Tensor, top_k: int, *, training: bool) -> dict[str, Callable[[Tensor], Routed]]:
        """Every token-choice router without capacity that is said to be causal, by name."""
        raise Absent("no router")

    def refuses_causal(self, kind: str) -> bool:
        """Whether a causal language model with this router is refused."""
        raise Absent(f"no {kind.replace('_', '-')} router")

    def capacity_leak_is_said(self, order: str) -> bool:
        """Whether the documentation says that later tokens displace earlier ones in this order."""
        raise Absent("no capacity")

    def jittered(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """(x after a training call of a layer with jitter, what its experts were given)."""
        raise Absent("no router noise")

    def capacity(self, tokens: int, experts: int, top_k: int, factor: float) -> int:
        """Rows an expert has."""
        raise Absent("capacity is not a factor")

    def load_TE(self, x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """(the differentiable load of a noisy router, its Monte-Carlo estimate)."""
        raise Absent("no noisy router")

    def replayed(self, layer: Layer, x_BLD: Tensor, change: Callable[[], None]) -> tuple[Routed, Routed]:
        """A routing of x, and its replay after `change()`."""
        raise Absent("no replay")

    # Compute

    def layer(self, shape: Shape, dtype: torch.dtype = torch.float32, backend: str = "only") -> Layer:
        """A layer with random parameters (N(0, 0.3²), so that nothing is small by luck)."""
        raise Absent("no layer")

    def poisoned_tail(self) -> Measured:
        """How far NaN in rows that belong to no local expert reach: error of outputs and gradients, inf for NaN."""
        raise Absent("no rows of other processes")

    def down_biased(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], int, int]:
        """(call with x (1, T, D) and a down bias (E, D), weights (T, E) of x, E, D)."""
        raise Absent("no down-projection bias")

    def dtype_layers(self) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
        """Layers by name, each a function that gives the module in bf16 and a bf16 input for it."""
        raise Absent("no layer")

    def recomputing(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """What to pass to torch.utils.checkpoint in place of the layer: one call's worth."""
        return layer.run

    # Life cycle

    def upcycled(self, form: str) -> tuple[Tensor, Tensor]:
        """(dense, sparse) logits of a small model, upcycled in this form."""
        raise Absent("no upcycling")

    def drop_upcycled(self, ratio: float) -> tuple[Tensor, Tensor]:
        """(dense weights, an expert's) of one big matrix that was drop-upcycled with this ratio."""
        raise Absent("no upcycling")

    def grown(self) -> tuple[Tensor, Tensor]:
        """Outputs before and after experts were added that no token may choose yet."""
        raise Absent("no adding or removing of experts")

    def pruned(self) -> tuple[Tensor, Tensor]:
        """Outputs before and after a never-used expert was removed."""
        raise Absent("no adding or removing of experts")

    def saliency(self) -> tuple[Tensor, Tensor]:
        """(REAP saliency (E,), the same by a loop over tokens)."""
        raise Absent("no REAP saliency")

    def lora(self, shape: Shape, rank: int, *, transposed: bool, stacks: tuple[str, ...]) -> LoraCase:
        """LoRA of this rank on these stacks, gate_up_proj or down_proj; stored (E, in, out) if transposed."""
        raise Absent("no expert LoRA")

    def says_experts_frozen(self) -> bool:
        """Whether asking for adapters on all MLPs warns, or fails, when the experts get none."""
        raise Absent("no expert LoRA")

    def quantised(self) -> float:
        raise Absent("no quantisation")

    def parameter_counts(self) -> tuple[tuple[int, int | None], tuple[int, int]]:
        """((total, active or None) as the library says, the same by hand) of a model with a shared expert."""
        raise Absent("no parameter count")

    def muon(self) -> float:
        raise Absent("no Muon")

    def decayed(self) -> list[str]:
        """Names of selection biases that weight decay reaches."""
        raise Absent("no selection bias in an optimizer")

    def several_processes(self) -> float:
        raise NotApplicable("needs several processes, which this suite does not start")


def run(trap: Callable[[Adapter], Iterator[Check]], number: int, adapter: Adapter) -> list[Finding]:
    """All checks of a trap."""
    checks = list(trap(adapter))
    if adapter.outside is not None and number not in adapter.traps:
        return [Finding(check.what, "n/a", None, adapter.outside) for check in checks]
    return [judge(check) for check in checks]
