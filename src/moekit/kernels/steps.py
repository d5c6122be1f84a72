"""One row of hidden states through attention or an MLP in one native call each: how a block decodes a token.

A step is described once, from the tensors of a layer, and then called for each token. It holds those tensors and
reads them where they lie: a change in place is seen, a tensor that was replaced is not, so that whoever keeps a
step compares `addresses()` with those it was made for. Numbers do not depend on the number of threads.
Shapes: D hidden, H query heads, h key–value heads, d head dimension, S positions, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.errors import ConfigError
from moekit.kernels import cpu
from moekit.kernels.formats import Packed
from moekit.kernels.quant import KINDS
from moekit.kernels.reference import ACTIVATIONS

__all__ = [
    "CACHE_DTYPES",
    "AttentionStep",
    "ExpertWeights",
    "MLPStep",
    "MLPWeights",
    "PartStep",
    "TopKGate",
    "Weights",
    "can_multiply",
]

CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class Weights:
    """A linear layer: weight (O, I), plain or packed in one part, and bias (O,) or None."""

    weight: Tensor | Packed
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """down · (act(gate · x) ⊙ up · x), or down · act(gate · x) without up."""

    gate: Weights
    up: Weights | None
    down: Weights


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """E such MLPs: in_proj (E, 2F, D), gate rows before up rows, or (E, F, D) when not gated; down (E, D, F); biases
    (E, 2F or F) and (E, D), both or neither. Packed matrices come one an expert, gate and up as two parts."""

    in_proj: Tensor | list[Packed]
    down: Tensor | list[Packed]
    in_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class TopKGate:
    """A router that takes the K largest logits: softmax over all of them first, or over those K alone.

    Attributes:
        weight: (E, D).
        normalise: divide the K weights by their sum.
        scale: multiplies the weights in the end.
    """

    weight: Tensor | Packed
    top_k: int
    softmax_first: bool
    normalise: bool
    scale: float


def can_multiply(weight: Any) -> bool:
    """Whether a step can take this matrix or vector: a plain contiguous float32 or bfloat16 tensor in memory."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    return plain and weight.dtype in cpu.DTYPES and weight.is_contiguous()


class _Step:
    """What both steps share: the tensors whose addresses the native layer has."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._native: Any = None

    def addresses(self) -> list[int]:
        """Where the tensors lie now."""
        return [tensor.data_ptr() for tensor in self._tensors]

    def _matrix(self, weight: Tensor | Packed | None) -> Any:
        if weight is None:
            return cpu.native().Matrix(0, 0, 0, 0, 0, True)
        return self._parts(weight, 1)[0]

    def _parts(self, weight: Tensor | Packed, parts: int) -> list[Any]:
        """A matrix cut into `parts` of equal numbers of rows; a stack (E, O, I) is one long matrix."""
        data = weight.data if isinstance(weight, Packed) else weight
        if data.device.type != "meta":  # else it is told where they lie, by `place`
            self._tensors.append(data)
        if isinstance(weight, Packed):
            form = weight.format
            kind = (KINDS[form.kind], form.group, form.symmetric)
            assert weight.parts == parts
        else:
            kind = (cpu.DTYPES[weight.dtype], 0, True)
        rows, cols, size = weight.shape[:-1].numel() // parts, weight.shape[-1], data.nbytes // parts
        return [cpu.native().Matrix(data.data_ptr() + part * size, rows, cols, *kind) for part in range(parts)]

    def _vector(self, values: Tensor | None) -> Any:
        return cpu.native().Vector(0, 0) if values is None else self._vectors(values, 1)[0]

    def _linear(self, weights: Weights | None) -> Any:
        if weights is None:
            return cpu.native().Linear(self._matrix(None), self._vector(None))
        return cpu.native().Linear(self._matrix(weights.weight), self._vector(weights.bias))

    def _mlp(self, mlp: MLPWeights | None) -> Any:
        parts = (None, None, None) if mlp is None else (mlp.gate, mlp.up, mlp.down)
        return cpu.native().MLP(*map(self._linear, parts))

    def _experts(self, experts: ExpertWeights | None) -> list[Any]:
        if experts is None:
            return []
        first, second = experts.in_proj, experts.down
        in_rows, inner = (each[0].shape[dim] for each, dim in ((first, 0), (second, 1)))
        parts, count = in_rows // inner, len(first)
        none = self._linear(None)
        gates_and_ups = self._linears(first, experts.in_bias, count, parts)
        downs = self._linears(second, experts.down_bias, count, 1)
        return [
            cpu.native().MLP(gates_and_ups[parts * e], gates_and_ups[parts * e + 1] if parts == 2 else none, downs[e])
            for e in range(count)
        ]

    def _linears(self, weight: Tensor | list[Packed], bias_EO: Tensor | None, count: int, parts: int) -> list[Any]:
        """Every part of every expert, in order."""
        stack = [weight] if isinstance(weight, Tensor) else weight
        matrices = [part for each in stack for part in self._parts(each, count * parts // len(stack))]
        vectors = [self._vector(None)] * len(matrices) if bias_EO is None else self._vectors(bias_EO, len(matrices))
        return [cpu.native().Linear(*pair) for pair in zip(matrices, vectors, strict=True)]

    def _vectors(self, values: Tensor, parts: int) -> list[Any]:
        self._tensors.append(values)
        address, size, dtype = values.data_ptr(), values.nbytes // parts, cpu.DTYPES[values.dtype]
        return [cpu.native().Vector(address + part * size, dtype) for part in range(parts)]


class AttentionStep(_Step):
    """x += o(attention(norm(x))) for one new position.

    Args:
        norm, eps: of the RMSNorm before, (D,).
        q, k, v, o: the projections.
        head_norms: weights (d,) of the RMSNorm of each query and of each key, or None.
        head_dim: d; q's and k's rows give H and h.
        dtype: what results are rounded to at every stage: float32 (not at all) or bfloat16.
    """

    def __init__(
        self,
        *,
        norm: Tensor,
        eps: float,
        q: Weights,
        k: Weights,
        v: Weights,
        o: Weights,
        head_norms: tuple[Tensor, Tensor] | None,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        q_norm, k_norm = head_norms or (None, None)
        vectors = [self._vector(each) for each in (norm, q_norm, k_norm)]
        linears = [self._linear(each) for each in (q, k, v, o)]
        heads = [each.weight.shape[0] // head_dim for each in (q, k)]
        self._native = cpu.native().Attention(*vectors, eps, *linears, *heads, head_dim, cpu.DTYPES[dtype])

    def __call__(self, x_D: Tensor, angles_2h: Tensor, cache_2BhSd: Tensor, position: int) -> None:
        """Change x in place, and write the new key and value to the cache.

        Args:
            x_D: (D,) float32.
            angles_2h: cosines and sines of the position, (2, d/2) float32.
            cache_2BhSd: keys and values (2, 1, h, S, d), contiguous; the first `position` are read.
            position: of the new token, below S.
        """
        angles, cache = angles_2h.data_ptr(), cache_2BhSd.data_ptr()
        half, values = angles_2h.shape[1] * 4, cache_2BhSd[0].nbytes
        size = (cache_2BhSd.shape[3], CACHE_DTYPES[cache_2BhSd.dtype])
        threads = cpu.num_threads()
        self._native.run(x_D.data_ptr(), angles, angles + half, cache, cache + values, *size, position, threads)


class MLPStep(_Step):
    """x += mlp(norm(x)), where the MLP is dense, or routed experts with or without shared ones.

    Args:
        norm, eps: of the RMSNorm before, (D,).
        gate: None for a dense MLP, and where the caller routes.
        experts: None for a dense MLP.
        shared: the shared experts, or the dense MLP.
        shared_gate: (1, D), whose sigmoid multiplies what the shared experts give; or None.
        activation: of every MLP.
        dtype: as in `AttentionStep`.
    """

    def __init__(
        self,
        *,
        norm: Tensor,
        eps: float,
        gate: TopKGate | None = None,
        experts: ExpertWeights | None = None,
        shared: MLPWeights | None = None,
        shared_gate: Tensor | Packed | None = None,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate, self._has_shared = gate, shared is not None
        self._offsets = _offsets(experts)
        self._native = cpu.native().Sparse(
            self._vector(norm),
            eps,
            self._topk(gate),
            self._experts(experts),
            self._mlp(shared),
            self._matrix(shared_gate),
            ACTIVATIONS.index(activation),
            cpu.DTYPES[dtype],
        )

    def __call__(self, x_D: Tensor) -> None:
        """The dense MLP: change x (D,) float32 in place."""
        self._run(x_D, None, None, None)

    def route(self, x_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the gate's choice: returns its logits (1, E) float32, and the ids (K,) int64 and weights (K,)
        float32 of the experts."""
        assert self.gate is not None
        logits_1E = torch.empty(1, self.gate.weight.shape[0])
        ids_K, weights_K = torch.empty(self.gate.top_k, dtype=torch.int64), torch.empty(self.gate.top_k)
        self._run(x_D, logits_1E, ids_K, weights_K)
        return logits_1E, ids_K, weights_K

    def routed(self, x_D: Tensor, ids_A: Tensor, weights_A: Tensor) -> None:
        """The same by the caller's choice: ids int64 and weights, any number of them.

        Raises:
            ConfigError: an expert that does not exist.
        """
        try:
            self._run(x_D, None, ids_A.contiguous(), weights_A.float().contiguous())
        except ValueError as error:
            raise ConfigError(f"mlp step: {error}") from None

    def begin(self, x_D: Tensor, routed: tuple[Tensor, Tensor] | None = None) -> PartStep:
        """The same in parts, for experts that are not all in memory (`place`): norm and route x (D,) float32.

        Args:
            routed: the caller's choice, as `routed` takes it; None asks the gate.
        Raises:
            ConfigError: an expert that does not exist.
        """
        logits_1E = None
        if routed is None:
            assert self.gate is not None
            logits_1E = torch.empty(1, self.gate.weight.shape[0])
            ids_A, weights_A = torch.empty(self.gate.top_k, dtype=torch.int64), torch.empty(self.gate.top_k)
        else:
            ids_A, weights_A = routed[0].contiguous(), routed[1].float().contiguous()
        part = PartStep(self._native, x_D, logits_1E, ids_A, weights_A, self._has_shared)
        try:
            part.begin()
        except ValueError as error:
            raise ConfigError(f"mlp step: {error}") from None
        return part

    def guess(self, x_D: Tensor) -> list[int]:
        """The experts that the gate would choose for x (D,) float32, which stays as it is."""
        return self.begin(x_D).ids_A.tolist()

    def place(self, expert: int, address: int) -> None:
        """Where a packed expert lies now: its matrices one after the other, gate and up before down."""
        up, down = self._offsets[expert]
        self._native.place(expert, address, address + up if up else 0, address + down)

    def _run(self, x_D: Tensor, logits: Tensor | None, ids: Tensor | None, weights: Tensor | None) -> None:
        where = [0 if each is None else each.data_ptr() for each in (logits, ids, weights)]
        self._native.run(x_D.data_ptr(), *where, 0 if ids is None else ids.numel(), cpu.num_threads())

    def _topk(self, gate: TopKGate | None) -> Any:
        if gate is None:
            return cpu.native().TopK(self._matrix(None), 0, False, False, 1.0)
        options = (gate.top_k, gate.softmax_first, gate.normalise, gate.scale)
        return cpu.native().TopK(self._matrix(gate.weight), *options)


class PartStep:
    """One token on its way through `MLPStep` in parts; made by `begin`.

    Attributes:
        logits_1E: the gate's, (1, E) float32; None where the caller routed.
        ids_A, weights_A: the token's experts, int64, and their weights, float32.
    """

    def __init__(
        self, native: Any, x_D: Tensor, logits_1E: Tensor | None, ids_A: Tensor, weights_A: Tensor, has_shared: bool
    ) -> None:
        self.logits_1E, self.ids_A, self.weights_A = logits_1E, ids_A, weights_A
        self._native, self._x_D, self._shared = native, x_D, [ids_A.numel()] if has_shared else []
        self._state = torch.empty(native.state_size(ids_A.numel()))
        self._ids = (ids_A.data_ptr(), ids_A.numel())

    def begin(self) -> None:
        logits = 0 if self.logits_1E is None else self.logits_1E.data_ptr()
        ids, count = self._ids
        where = (logits, ids, self.weights_A.data_ptr(), count)
        self._native.begin(self._x_D.data_ptr(), *where, self._state.data_ptr(), cpu.num_threads())

    def hidden(self, slots: list[int]) -> None:
        """What comes before the second matrix, of the experts at these places of `ids_A`, which have been placed; the
        first call also does the shared MLP's."""
        if not slots and not self._shared:
            return
        self._native.hidden(*self._ids, slots + self._shared, self._state.data_ptr(), cpu.num_threads())
        self._shared = []

    def finish(self) -> None:
        """The second matrices, for which all experts must be in their places; then x is changed."""
        if self._shared:
            self.hidden([])
        ids, count = self._ids
        where = (ids, self.weights_A.data_ptr(), count)
        self._native.finish(self._x_D.data_ptr(), *where, self._state.data_ptr(), cpu.num_threads())


def _offsets(experts: ExpertWeights | None) -> list[tuple[int, int]]:
    """Of every packed expert's up (0: it has no gate) and down matrix, in bytes from its first."""
    if experts is None or isinstance(experts.in_proj, Tensor):
        return []
    return [(each.data.nbytes // 2 if each.parts == 2 else 0, each.data.nbytes) for each in experts.in_proj]
