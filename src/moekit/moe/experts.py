"""The second seam: `experts(rows_RD, counts_E) -> rows_RD`, rows sorted by expert.

Kinds of this one call: full precision here; quantised, adapted and offloaded ones wrap or replace it.
Parameters are fused over experts in the layout of Hugging Face: (expert, out, in).
Shapes: R rows, D hidden, F inner width, G = 2F (gated: gate rows, then up rows) or F, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from moekit import kernels
from moekit.config import MoEConfig
from moekit.kernels.formats import Packed
from moekit.moe.linear import Linear
from moekit.moe.types import Routing
from moekit.registry import Registry

__all__ = [
    "EXPERTS",
    "ClampedSwiGLU",
    "Experts",
    "FreeExperts",
    "GroupedMLP",
    "GroupedSwiGLU",
    "MixedExperts",
    "Residency",
    "SharedExperts",
]

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
EXPERTS: Registry[type[GroupedMLP | MixedExperts]] = Registry("expert kind")


class Residency(Protocol):
    """Experts that are not all in memory, and come when tokens need them: for whoever goes through them in parts."""

    @property
    def matrices(self) -> tuple[list[Packed], list[Packed]]:
        """Every expert's matrices, first and second, without their bytes (on torch's meta device)."""
        ...

    def begin_lone_token(self) -> None:
        """Told before the experts of a token that comes by itself are asked for."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """Whether `expect` is worth asking the router early."""
        ...

    def expect(self, experts: Collection[int]) -> None:
        """Begin to read what the next token may want, after all that somebody waits for."""
        ...

    def together(self, wanted: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Cut tokens that want these experts into groups, in order, whose experts are in memory at once; by number."""
        ...

    def bring(self, experts: Collection[int]) -> AbstractContextManager[Iterator[list[tuple[int, int]]]]:
        """Lists of (expert, address of its first byte): first those that are in memory, perhaps none, while the others
        are on their way; then these as they come. All stay where they are until the context ends.

        Raises:
            FileError, FormatError: one cannot be read, or is damaged.
        """
        ...


class Experts(nn.Module):
    """What every kind offers beside the call itself.

    Attributes:
        residency: None where all are in memory.
    """

    residency: Residency | None = None

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """The result of dispatch, experts and combine for few tokens, without sorting them: (T, D) in x's dtype, no
        gradient; None where this kind, or this input, has no such way."""
        return None

    def fused(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """The result of local dispatch, experts and combine in one differentiable op: (T, D) in x's dtype; None where
        this kind, or this input, has no such way, or somebody listens to the call between them (a hook)."""
        return None


@EXPERTS.register("mlp")
class GroupedMLP(Experts):
    """E two-matrix MLPs: down · act(up · x), with optional biases.

    Parameters: up_proj (E, F, D), down_proj (E, D, F), up_bias (E, F) and down_bias (E, D) with `bias`.
    Computes in the autocast dtype when autocast is on, else in the parameters' dtype.
    """

    in_name = "up"
    width_factor = 1

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.activation = config.activation
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self._shape = (experts, hidden, inner)
        self.register_parameter(
            f"{self.in_name}_proj", nn.Parameter(torch.empty(experts, self.width_factor * inner, hidden))
        )
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        bias_in = nn.Parameter(torch.empty(experts, self.width_factor * inner)) if config.bias else None
        self.register_parameter(f"{self.in_name}_bias", bias_in)
        self.down_bias = nn.Parameter(torch.empty(experts, hidden)) if config.bias else None
        self.reset_parameters()

    @property
    def in_proj(self) -> Tensor:
        """(E, G, D): the matrices that read the hidden state."""
        weight: Tensor = getattr(self, f"{self.in_name}_proj")
        return weight

    @property
    def in_bias(self) -> Tensor | None:
        """(E, G), or None."""
        bias: Tensor | None = getattr(self, f"{self.in_name}_bias")
        return bias

    def reset_parameters(self) -> None:
        """Matrices from N(0, 1/fan_in), biases zero."""
        for weight in (self.in_proj, self.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for bias in (self.in_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Run every expert on its rows. Returns (R, D) in the compute dtype; gradients reach rows and weights."""
        dtype = self._compute_dtype(rows_RD)
        hidden_RG = kernels.grouped_mm(rows_RD.to(dtype), self.in_proj.to(dtype), counts_E)
        hidden_RG = plus_bias(hidden_RG, self.in_bias, counts_E)
        out_RD = kernels.grouped_mm(self._act(hidden_RG), self.down_proj.to(dtype), counts_E)
        return plus_bias(out_RD, self.down_bias, counts_E)

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """See `Experts.decode`: one fused op, where `can_decode`."""
        if not self.can_decode(x_TD, routing):
            return None
        dtype = self._compute_dtype(x_TD)
        y_TD = kernels.moe_decode(
            x_TD.to(dtype),
            routing.expert_ids_TK,
            routing.weights_TK,
            self.in_proj.to(dtype),
            self.down_proj.to(dtype),
            self.activation,
        )
        return y_TD.to(x_TD.dtype)

    def can_decode(self, x_TD: Tensor, routing: Routing) -> bool:
        """Whether `decode` may stand in for dispatch, experts and combine for this input. Not in training: the first
        pass of a reentrant checkpoint has no gradient either, and must give the bits of the second, which has."""
        return (
            not self.training
            and x_TD.shape[0] <= kernels.MOE_DECODE_MAX_TOKENS
            and routing.top_k is not None
            and self.in_bias is None
            and not torch.is_grad_enabled()
            and self._compute_dtype(x_TD) == self.down_proj.dtype
        )

    def fused(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """See `Experts.fused`."""
        dtype = self._compute_dtype(x_TD)
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        own = type(self) in (GroupedMLP, GroupedSwiGLU)  # a subclass may compute something else
        if hooked or not own or routing.rows_per_expert is not None or not kernels.fuses_mlp(x_TD.device, dtype):
            return None
        in_bias, down_bias = self.in_bias, self.down_bias
        y_TD = kernels.moe_mlp(
            x_TD.to(dtype),
            routing.token_ids_A,
            routing.expert_ids_A,
            routing.weights_A,
            self.in_proj.to(dtype),
            None if in_bias is None else in_bias.to(dtype),
            self.down_proj.to(dtype),
            None if down_bias is None else down_bias.to(dtype),
            self.activation,
            out_dtype=dtype if x_TD.dtype == dtype else torch.float32,
        )
        return y_TD.to(x_TD.dtype)

    def _act(self, hidden_RG: Tensor) -> Tensor:
        return kernels.activate(hidden_RG, self.activation)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype

    def extra_repr(self) -> str:
        experts, hidden, inner = self._shape
        return f"num_experts={experts}, hidden_size={hidden}, intermediate_size={inner}, activation={self.activation}"


@EXPERTS.register("swiglu")
class GroupedSwiGLU(GroupedMLP):
    """E gated MLPs: down · (act(gate · x) ⊙ (up · x)) (2002.05202 eq 6 for act = SiLU).

    Parameters: gate_up_proj (E, 2F, D), gate rows before up rows, and down_proj (E, D, F).
    """

    in_name = "gate_up"
    width_factor = 2

    def _act(self, hidden_RG: Tensor) -> Tensor:
        gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
        return kernels.activate(gate_RF, self.activation) * up_RF


@EXPERTS.register("clamped_swiglu")
class ClampedSwiGLU(GroupedSwiGLU):
    """With limits and a shifted up: down · (g · σ(1.702 · g) ⊙ (u + 1)), where g is gate · x and its bias, at most 7,
    and u is up · x and its bias, limited to ±7 (openai/gpt-oss, gpt_oss/torch/model.py, swiglu).
    """

    def can_decode(self, x_TD: Tensor, routing: Routing) -> bool:
        """No: the fused op does not know the limits."""
        return False

    def _act(self, hidden_RG: Tensor) -> Tensor:
        return clamped_swiglu(hidden_RG)


class FreeExperts(Experts):
    """Experts without parameters: `identity` returns its rows, `zero` returns zeros (2410.07348 eq 4–5).

    A token that is sent there spends no work: a way to let the router choose how many experts a token needs.
    """

    def __init__(self, identity: bool) -> None:
        super().__init__()
        self.identity = identity

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """(R, D) → (R, D)."""
        return rows_RD if self.identity else torch.zeros_like(rows_RD)

    def extra_repr(self) -> str:
        return "identity" if self.identity else "zero"


@EXPERTS.register("mixed")
class MixedExperts(Experts):
    """Experts that differ: consecutive groups of equal ones (`MoEConfig.expert_groups`), each a kind of its own.

    >>> from moekit.config import ExpertGroup
    >>> groups = (ExpertGroup(count=2, intermediate_size=16), ExpertGroup(count=1, kind="identity"))
    >>> config = MoEConfig(
    ...     hidden_size=8, intermediate_size=4, num_experts=3, top_k=2, expert="mixed", expert_groups=groups
    ... )
    >>> MixedExperts(config)(torch.ones(4, 8), torch.tensor([1, 0, 3]))[1:].mean().item()
    1.0
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.sizes = [group.count for group in config.expert_groups]
        self.groups = nn.ModuleList(
            FreeExperts(group.kind == "identity")
            if group.kind in ("zero", "identity")
            else EXPERTS[group.kind](config.group_config(group))
            for group in config.expert_groups
        )

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Run every group on its rows. Returns (R, D); rows past sum(counts_E) come out as zeros."""
        parts = counts_E.split(self.sizes)
        lengths = [int(part.sum()) for part in parts]
        *rows, rest_RD = rows_RD.split([*lengths, rows_RD.shape[0] - sum(lengths)])
        outputs = [group(*each) for group, each in zip(self.groups, zip(rows, parts, strict=True), strict=True)]
        return torch.cat([*outputs, torch.zeros_like(rest_RD)])


class SharedExperts(nn.Module):
    """Experts that see every token: one MLP as wide as all of them, times sigmoid(w·x) if gated.

    A sum of N independent MLPs equals one whose inner width is N times theirs (DeepSeek-MoE,
    2401.06066 eq 4–5), so it is stored and computed as one. It has two matrices beside experts of kind mlp, else three.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.shared_width
        self.gate_proj = None if config.expert == "mlp" else Linear(hidden, inner, bias=config.bias)
        self.up_proj = Linear(hidden, inner, bias=config.bias)
        self.down_proj = Linear(inner, hidden, bias=config.bias)
        self.gate = Linear(hidden, 1, bias=False) if config.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        if self.gate_proj is None:
            hidden_TF = kernels.activate(self.up_proj(x_TD), self.activation)
        else:
            hidden_TF = kernels.activate(self.gate_proj(x_TD), self.activation) * self.up_proj(x_TD)
        y_TD: Tensor = self.down_proj(hidden_TF)
        return y_TD if self.gate is None else y_TD * self.gate(x_TD).sigmoid()


def clamped_swiglu(hidden_RG: Tensor) -> Tensor:
    """(R, 2F), gate then up, to (R, F): what `ClampedSwiGLU` does between its matrices."""
    gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
    gate_RF, up_RF = gate_RF.clamp(max=SWIGLU_LIMIT), up_RF.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate_RF * torch.sigmoid(SWIGLU_ALPHA * gate_RF) * (up_RF + 1)


def plus_bias(rows_RO: Tensor, bias_EO: Tensor | None, counts_E: Tensor) -> Tensor:
    """Each row plus its expert's bias, as the product 1 · bias: its gradient is then a sum in fp32, where a repeated
    bias would be summed row after row in its own dtype."""
    if bias_EO is None:
        return rows_RO
    ones_R1 = rows_RO.new_ones(rows_RO.shape[0], 1)
    return rows_RO + kernels.grouped_mm(ones_R1, bias_EO.to(rows_RO.dtype).unsqueeze(-1), counts_E)
