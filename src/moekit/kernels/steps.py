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
from moekit.kernels.reference import ACTIVATIONS

__all__ = [
    "CACHE_DTYPES",
    "AttentionStep",
    "ExpertWeights",
    "MLPStep",
    "MLPWeights",
    "TopKGate",
    "Weights",
    "can_multiply",
]

CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class Weights:
    """A linear layer: weight (O, I), and bias (O,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """down · (act(gate · x) ⊙ up · x), or down · act(gate · x) without up."""

    gate: Weights
    up: Weights | None
    down: Weights


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """E such MLPs as stacks: in_proj (E, 2F, D), gate rows before up rows, or (E, F, D) when not gated; down (E, D, F);
    biases (E, 2F or F) and (E, D), both or neither."""

    in_proj: Tensor
    down: Tensor
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

    weight: Tensor
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

    def _matrix(self, weight: Tensor | None) -> Any:
        if weight is None:
            return cpu.native().Matrix(0, 0, 0, 0)
        self._tensors.append(weight)
        return cpu.native().Matrix(weight.data_ptr(), *weight.shape, cpu.DTYPES[weight.dtype])

    def _vector(self, values: Tensor | None) -> Any:
        if values is None:
            return cpu.native().Vector(0, 0)
        self._tensors.append(values)
        return cpu.native().Vector(values.data_ptr(), cpu.DTYPES[values.dtype])

    def _linear(self, weights: Weights | None) -> Any:
        if weights is None:
            return cpu.native().Linear(self._matrix(None), self._vector(None))
        return cpu.native().Linear(self._matrix(weights.weight), self._vector(weights.bias))

    def _mlp(self, mlp: MLPWeights | None) -> Any:
        parts = (None, None, None) if mlp is None else (mlp.gate, mlp.up, mlp.down)
        return cpu.native().MLP(*map(self._linear, parts))

    def _experts(self, stacks: ExpertWeights | None) -> list[Any]:
        if stacks is None:
            return []
        gated = stacks.in_proj.shape[1] == 2 * stacks.down.shape[2]
        inner = self._rows(stacks.in_proj, stacks.in_bias, parts=2 if gated else 1)
        down = self._rows(stacks.down, stacks.down_bias, parts=1)
        none = self._linear(None)
        return [cpu.native().MLP(i[0], i[1] if gated else none, d[0]) for i, d in zip(inner, down, strict=True)]

    def _rows(self, weight_EOI: Tensor, bias_EO: Tensor | None, parts: int) -> list[list[Any]]:
        """Each expert's matrix, cut into `parts` of equal numbers of rows."""
        experts, rows, cols = weight_EOI.shape
        native, rows = cpu.native(), rows // parts
        self._tensors += [weight_EOI] if bias_EO is None else [weight_EOI, bias_EO]

        def linear(number: int) -> Any:
            at, kind = weight_EOI.data_ptr() + number * rows * cols * weight_EOI.itemsize, cpu.DTYPES[weight_EOI.dtype]
            matrix = native.Matrix(at, rows, cols, kind)
            if bias_EO is None:
                return native.Linear(matrix, native.Vector(0, 0))
            at, kind = bias_EO.data_ptr() + number * rows * bias_EO.itemsize, cpu.DTYPES[bias_EO.dtype]
            return native.Linear(matrix, native.Vector(at, kind))

        return [[linear(expert * parts + part) for part in range(parts)] for expert in range(experts)]


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
        shared_gate: Tensor | None = None,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate = gate
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

    def _run(self, x_D: Tensor, logits: Tensor | None, ids: Tensor | None, weights: Tensor | None) -> None:
        where = [0 if each is None else each.data_ptr() for each in (logits, ids, weights)]
        self._native.run(x_D.data_ptr(), *where, 0 if ids is None else ids.numel(), cpu.num_threads())

    def _topk(self, gate: TopKGate | None) -> Any:
        if gate is None:
            return cpu.native().TopK(self._matrix(None), 0, False, False, 1.0)
        options = (gate.top_k, gate.softmax_first, gate.normalise, gate.scale)
        return cpu.native().TopK(self._matrix(gate.weight), *options)
