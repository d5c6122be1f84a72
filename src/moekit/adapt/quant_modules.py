"""Modules whose matrices are packed: `QuantLinear`, `QuantEmbedding`, `QuantExperts`.

The bytes are uint8 buffers, so that `.to(dtype)` leaves them alone while state_dict, deepcopy and `.to(device)` take
them along. A buffer is whole pages of 4096 bytes, zeros after the last strip: written one after the other they stay
aligned, and a packed folder is the modules' state_dict as it stands. Results have the dtype of what comes in; an
embedding's, which has nothing to go by, are float32.
Shapes: T tokens, K experts a token, R rows sorted by expert, D hidden, F inner width, G = 2F (gated) or F, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit import kernels
from moekit.errors import ConfigError
from moekit.kernels.formats import Format, Packed, pack, relative_error, unpack
from moekit.kernels.quant import Matrices, quant_grouped_mm, quant_linear, quant_moe
from moekit.kernels.rounding import STRIP
from moekit.moe import ClampedSwiGLU, Experts, GroupedMLP, GroupedSwiGLU, Routing
from moekit.moe.experts import clamped_swiglu, plus_bias

__all__ = [
    "PAGE",
    "Matrix",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantMatrix",
    "empty_twin",
    "is_experts",
    "pack_into",
]

PAGE = 4096


def _pages(nbytes: int) -> Tensor:
    """A zeroed buffer of whole pages."""
    return torch.zeros(-(-nbytes // PAGE) * PAGE, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix in a buffer: the parameter of the unquantised module it comes from, and which of a stack it is there."""

    parameter: str
    expert: int | None
    packed: Packed


def pack_into(target: Packed, weight: Tensor) -> float:
    """Pack `weight` into the bytes of `target`; ‖W − Ŵ‖ / ‖W‖. Raises `ConfigError` for NaN and infinity."""
    packed = pack(weight, target.format, target.parts)
    target.data.copy_(packed.data)
    return relative_error(weight, packed)


class _Quantised(nn.Module):
    """What the packed modules share: their formats travel in the state_dict, because bytes do not tell theirs.

    The kernels get addresses, which are made once, because a decoded token has no time for it: whatever moves or
    replaces a buffer forgets them.
    """

    formats: tuple[Format, ...]

    def __init__(self) -> None:
        super().__init__()
        self._views: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_buffers", {}):
            self._views = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._views = None
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> list[str]:
        return [str(format) for format in self.formats]

    def set_extra_state(self, state: Any) -> None:
        """Raises `ConfigError` when the bytes of a state_dict are of another format than this module's."""
        if state != self.get_extra_state():
            raise ConfigError(f"the state is packed as {state}, the module as {self.get_extra_state()}")


class QuantMatrix(_Quantised):
    """A packed matrix (rows, cols) in the buffer `data`.

    Attributes:
        packed: it, as the kernels take it.
    """

    data: Tensor

    def __init__(self, rows: int, cols: int, format: Format) -> None:
        super().__init__()
        self.rows, self.cols, self.format = rows, cols, format
        self.register_buffer("data", _pages(format.matrix_bytes(rows, cols)))

    @property
    def formats(self) -> tuple[Format, ...]:  # type: ignore[override]
        return (self.format,)

    @property
    def packed(self) -> Packed:
        if self._views is None:
            size = self.format.matrix_bytes(self.rows, self.cols)
            self._views = Packed(self.data[:size], self.format, self.rows, self.cols)
        packed: Packed = self._views
        return packed

    def fill(self, name: str, value: Tensor) -> float:
        """Pack the parameter "weight"; returns ‖W − Ŵ‖ / ‖W‖. Raises `ConfigError` for NaN and infinity."""
        assert name == "weight"
        return pack_into(self.packed, value)

    def matrices_in(self, leaf: str, data: Tensor) -> list[Matrix]:
        """What the buffer `leaf` holds, laid over the bytes of `data`, which may be another of its size."""
        assert leaf == "data"
        size = self.format.matrix_bytes(self.rows, self.cols)
        return [Matrix("weight", None, Packed(data[:size], self.format, self.rows, self.cols))]

    def parameter(self, leaf: str) -> str:
        """What a parameter of this module that is not packed is called in the unquantised one."""
        return leaf

    def format_of(self, name: str) -> str:
        return str(self.format)

    def bytes_of(self, name: str) -> int:
        return self.format.matrix_bytes(self.rows, self.cols)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.cols}, {self.format}"


class QuantLinear(QuantMatrix):
    """y = Ŵ x + b, (..., cols) → (..., rows), of a packed Ŵ; see `moekit.kernels.quant.quant_linear`.

    >>> layer = QuantLinear(3, 8, Format.parse("int8"), bias=False)
    >>> layer.fill("weight", torch.ones(3, 8)) < 1e-3, layer(torch.ones(1, 8)).shape
    (True, torch.Size([1, 3]))
    """

    def __init__(self, rows: int, cols: int, format: Format, *, bias: bool) -> None:
        super().__init__(rows, cols, format)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    @property
    def in_features(self) -> int:
        return self.cols

    @property
    def out_features(self) -> int:
        return self.rows

    def fill(self, name: str, value: Tensor) -> float:
        """The parameter "weight" as `QuantMatrix.fill` has it, or "bias", which stays as it is: 0."""
        if name == "weight":
            return super().fill(name, value)
        self.bias = nn.Parameter(value.detach())
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        """In x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return quant_linear(x, self.packed, bias)


class QuantEmbedding(QuantMatrix):
    """Rows of a packed matrix, unpacked when they are looked up; a tied head multiplies with the same bytes."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) → float32 (..., cols)."""
        packed = self.packed
        strips = packed.data.view(-(-self.rows // STRIP), -1)
        wanted, position = (ids.flatten() // STRIP).unique(return_inverse=True)
        few = Packed(strips[wanted].flatten(), self.format, STRIP * len(wanted), self.cols)
        rows = unpack(few).view(len(wanted), STRIP, self.cols)[position, ids.flatten() % STRIP]
        return rows.view(*ids.shape, self.cols)


class QuantExperts(_Quantised, Experts):
    """E packed MLPs, each in a format of its own: `GroupedMLP`, `GroupedSwiGLU` and `ClampedSwiGLU` for inference.

    The buffer `expert_<e>` holds the matrix that reads the hidden state (gate rows before up rows, as two parts),
    then the one that writes it: an expert is one extent, in memory as on disk.

    Args:
        experts, hidden, inner: E, D, F.
        formats: one an expert.
        activation: between the matrices.
        gated: whether they are three, with gate and up fused.
        bias: whether both have biases: in_bias (E, G) and down_bias (E, D), not packed.
        clamped: whether what lies between the matrices is `clamped_swiglu`.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        inner: int,
        formats: Sequence[Format],
        *,
        activation: str,
        gated: bool,
        bias: bool = False,
        clamped: bool = False,
    ) -> None:
        super().__init__()
        if len(formats) != experts:
            raise ConfigError(f"{experts} experts need {experts} formats, not {len(formats)}")
        self.formats, self.activation, self.gated, self.clamped = tuple(formats), activation, gated, clamped
        self.hidden, self.inner, self.parts = hidden, inner, 2 if gated else 1
        for expert, format in enumerate(formats):
            self.register_buffer(f"expert_{expert}", _pages(sum(self._sizes(format))))
        self.in_bias = nn.Parameter(torch.zeros(experts, self.parts * inner)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if bias else None

    @property
    def gate_up(self) -> Matrices:
        """The matrices (G, D), one an expert; without a gate they are up alone."""
        return self._matrices()[0]

    @property
    def down(self) -> Matrices:
        """The matrices (D, F), one an expert."""
        return self._matrices()[1]

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Run every expert on its rows: (R, D) in their dtype. The gradient reaches the rows."""
        hidden_RG = quant_grouped_mm(rows_RD, self.gate_up, counts_E)
        hidden_RG = plus_bias(hidden_RG, self.in_bias, counts_E)
        out_RD = quant_grouped_mm(self._act(hidden_RG), self.down, counts_E)
        return plus_bias(out_RD, self.down_bias, counts_E)

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """See `Experts.decode`: one op for any number of tokens; None with biases, limits, varying K or a gradient."""
        if routing.top_k is None or self.in_bias is not None or self.clamped or torch.is_grad_enabled():
            return None
        y_TD: Tensor = quant_moe(
            x_TD,
            routing.expert_ids_TK,
            routing.weights_TK,
            self.gate_up,
            self.down,
            self.activation,
            self.gated,
        )
        return y_TD

    def fill(self, name: str, value: Tensor) -> float:
        """Pack the stack (E, out, in) called up_proj, gate_up_proj or down_proj; the largest relative error of its
        matrices. Biases stay as they are: 0."""
        if name.endswith("_bias"):
            setattr(self, "down_bias" if name == "down_bias" else "in_bias", nn.Parameter(value.detach()))
            return 0.0
        down = name == "down_proj"
        return max(pack_into(self.packed_expert(expert)[down], weight) for expert, weight in enumerate(value))

    def matrices_in(self, leaf: str, data: Tensor) -> list[Matrix]:
        """See `QuantMatrix.matrices_in`."""
        expert = int(leaf.removeprefix("expert_"))
        first, second = self._over(expert, data)
        return [Matrix(f"{self._in_name}_proj", expert, first), Matrix("down_proj", expert, second)]

    def parameter(self, leaf: str) -> str:
        """See `QuantMatrix.parameter`."""
        return f"{self._in_name}_bias" if leaf == "in_bias" else leaf

    @property
    def _in_name(self) -> str:
        return (GroupedSwiGLU if self.gated else GroupedMLP).in_name

    def format_of(self, name: str) -> str:
        """int4-g32, or "16 × int8-g64, 48 × int4-g32" where experts differ."""
        counts = {str(format): self.formats.count(format) for format in self.formats}
        if len(counts) == 1:
            return str(self.formats[0])
        return ", ".join(f"{count} × {format}" for format, count in counts.items())

    def bytes_of(self, name: str) -> int:
        """Of all matrices of the stack `name`."""
        return sum(self._sizes(format)[name == "down_proj"] for format in self.formats)

    def extra_repr(self) -> str:
        shown = self.format_of("")
        shown = shown if "×" in shown else f"{len(self.formats)} × {shown}"
        return f"{shown}, hidden_size={self.hidden}, intermediate_size={self.inner}, activation={self.activation}"

    def _act(self, hidden_RG: Tensor) -> Tensor:
        if self.clamped:
            return clamped_swiglu(hidden_RG)
        if not self.gated:
            return kernels.activate(hidden_RG, self.activation)
        gate_RF, up_RF = hidden_RG.chunk(2, dim=-1)
        return kernels.activate(gate_RF, self.activation) * up_RF

    def _sizes(self, format: Format) -> tuple[int, int]:
        """Bytes of an expert's two matrices."""
        first = format.matrix_bytes(self.parts * self.inner, self.hidden, self.parts)
        return first, format.matrix_bytes(self.hidden, self.inner)

    def packed_expert(self, expert: int) -> tuple[Packed, Packed]:
        """Its two matrices, without a copy."""
        return self._over(expert, self.get_buffer(f"expert_{expert}"))

    def _over(self, expert: int, data: Tensor) -> tuple[Packed, Packed]:
        format = self.formats[expert]
        first, second = self._sizes(format)
        return (
            Packed(data[:first], format, self.parts * self.inner, self.hidden, self.parts),
            Packed(data[first : first + second], format, self.hidden, self.inner),
        )

    def _matrices(self) -> tuple[Matrices, Matrices]:
        if self._views is None:
            gate_up, down = zip(*map(self.packed_expert, range(len(self.formats))), strict=True)
            self._views = Matrices(gate_up), Matrices(down)
        views: tuple[Matrices, Matrices] = self._views
        return views


def is_experts(module: nn.Module) -> bool:
    """Whether `QuantExperts` can stand in for it."""
    return type(module) in (GroupedMLP, GroupedSwiGLU, ClampedSwiGLU)


def empty_twin(module: nn.Module, formats: Sequence[Format]) -> QuantMatrix | QuantExperts:
    """The packed module of a linear, an embedding or experts, zeroed; formats are one, or one an expert."""
    if isinstance(module, GroupedMLP):
        experts, hidden, inner = module.down_proj.shape
        return QuantExperts(
            experts,
            hidden,
            inner,
            formats,
            activation=module.activation,
            gated=isinstance(module, GroupedSwiGLU),
            bias=module.down_bias is not None,
            clamped=isinstance(module, ClampedSwiGLU),
        )
    (format,) = formats
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(module.num_embeddings, module.embedding_dim, format)
    assert isinstance(module, nn.Linear)
    return QuantLinear(module.out_features, module.in_features, format, bias=module.bias is not None)
