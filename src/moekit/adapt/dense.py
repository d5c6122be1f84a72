"""What a dense MLP is made of, read from any PyTorch module by watching it work, and believed only when it recomputes.

No name of a class or of a child is looked at. A copy of the module in fp64 runs on a probe input; its matrix
products are found by what they compute, and each arrangement of them (with or without gate, either half of a fused
matrix, every activation) is tried until one gives the module's own inner values. None or several: refused.
Shapes: N rows of the probe, D hidden, F inner width.
"""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekit import kernels
from moekit.config import Activation
from moekit.errors import UnsupportedError

__all__ = ["DenseWeights", "check_replaceable", "read_mlp"]

ACTIVATIONS: tuple[Activation, ...] = typing.get_args(Activation)
PROBE_ROWS = 24
# Inner values are brought to this size, where activations differ most: gelu from gelu_tanh by 5e-4.
PROBE_SCALE = 2.0
# Agreement of values computed in fp64; modules that round to fp32 inside stay within it.
AGREE = 1e-6


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """down · act(up · x), or down · (act(gate · x) ⊙ up · x) when there is a gate.

    Attributes:
        up_FD: the matrix that reads the input.
        down_DF: the matrix that writes the output.
        gate_FD: the gate's matrix, or None.
        up_bias_F: or None, as the other biases.
        activation: a name in `moekit.config.Activation`.
        inner_dropout: probability of the dropout between activation and down.
        dropout: probability of the dropout after down.
    """

    up_FD: Tensor
    down_DF: Tensor
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    activation: Activation = "silu"
    inner_dropout: float = 0.0
    dropout: float = 0.0

    @property
    def has_bias(self) -> bool:
        return any(bias is not None for bias in (self.up_bias_F, self.gate_bias_F, self.down_bias_D))

    def hidden(self, x_ND: Tensor) -> Tensor:
        """(N, F): what goes into the down matrix, in x's dtype."""
        up_NF = _product(x_ND, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            return kernels.activate(up_NF, self.activation)
        return kernels.activate(_product(x_ND, self.gate_FD, self.gate_bias_F), self.activation) * up_NF


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix product that a module without children was seen to compute: y = x · weightᵀ + bias."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class _Seen:
    """One run of a module: its input and output, and what its childless descendants did meanwhile. All as rows."""

    x: Tensor
    y: Tensor
    matrices: list[_Matrix]
    dropouts: list[tuple[float, Tensor]]

    def __str__(self) -> str:
        sizes = [f"{matrix.weight.shape[1]}→{matrix.weight.shape[0]}" for matrix in self.matrices]
        return f" (its matrix products: {', '.join(sizes) or 'none'})"


def read_mlp(module: nn.Module) -> DenseWeights:
    """The weights of `module`, detached and in its own dtype and device, if it computes what `DenseWeights` says.

    Transposed storage (`Conv1D` of GPT-2), fused gate and up, biases anywhere, and dropouts are recognised.

    Raises:
        UnsupportedError: it computes something else, or the reading is ambiguous; the message says what was seen.
    """
    check_replaceable(module)
    twin = _in_double(module)
    seen = _watch(twin)
    downs = [matrix for matrix in seen.matrices if _agree(matrix.y, seen.y)]
    if len(downs) != 1:
        raise UnsupportedError(f"its output is not that of one matrix{seen}")
    entries = [matrix for matrix in seen.matrices if matrix is not downs[0]]
    if not entries or not all(_agree(matrix.x, seen.x) for matrix in entries):
        raise UnsupportedError(f"its matrices are not some that read its input and one that writes its output{seen}")
    readings = [mlp for mlp in _readings(entries, downs[0]) if _agree(mlp.hidden(seen.x), downs[0].x)]
    if len(readings) != 1:
        found = "several readings fit it" if readings else f"none of {', '.join(ACTIVATIONS)} explains its inner values"
        raise UnsupportedError(f"{found}{seen}")
    return _as_stored(replace(readings[0], **_dropouts(twin, seen, downs[0].x)), module)


def check_replaceable(module: nn.Module, width: int | None = None) -> None:
    """Refuse a module in whose place nothing that maps a tensor to one of its shape could stand.

    Args:
        width: run it on a tensor of this width and see.
    Raises:
        UnsupportedError: it takes or gives back something else, or cannot be tried.
    """
    if type(module).forward is nn.Module.forward:
        raise UnsupportedError("it is a container without a forward of its own")
    extra = [
        parameter.name
        for parameter in list(inspect.signature(module.forward).parameters.values())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if extra:
        raise UnsupportedError(f"its forward takes {', '.join(extra)} beside a tensor, so it is a block, not an MLP")
    if any("forward" in vars(part) for part in module.modules()):
        raise UnsupportedError("its forward was replaced (by accelerate, say): operate before wrapping the model")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UnsupportedError("its weights are on the meta device: load them first")
    if width is not None:
        _try(_in_double(module), width)


def _in_double(module: nn.Module) -> nn.Module:
    """A copy in eval mode, on the CPU, in fp64: small differences show, and the module's own state is not touched."""
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _watch(module: nn.Module) -> _Seen:
    """Run the module on the first width that it takes and gives back, with inner values of `PROBE_SCALE`."""
    refusals = []
    for width in dict.fromkeys(size for p in module.parameters() if p.ndim == 2 for size in p.shape):
        try:
            seen = _try(module, width)
        except UnsupportedError as error:
            refusals.append(str(error))
            continue
        spread = max((float(matrix.y.std()) for matrix in seen.matrices if _agree(matrix.x, seen.x)), default=0.0)
        return _run(module, _probe(width) * (PROBE_SCALE / spread)) if spread > 0 else seen
    # What it gave back on a width that it takes says more than that it does not take another.
    refusals.sort(key=lambda text: text.startswith(_CANNOT_RUN))
    raise UnsupportedError(refusals[0] if refusals else "it has no matrix")


_CANNOT_RUN = "it cannot run on a tensor"


def _try(module: nn.Module, width: int) -> _Seen:
    try:
        return _run(module, _probe(width))
    except UnsupportedError:
        raise
    except Exception as error:  # code that is not ours may raise anything on an input that it was not made for
        raise UnsupportedError(f"{_CANNOT_RUN} of width {width} alone ({error!r:.80})") from None


def _probe(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, PROBE_ROWS // 2, width, generator=generator, dtype=torch.float64)


def _run(module: nn.Module, x: Tensor) -> _Seen:
    matrices: list[_Matrix] = []
    dropouts: list[tuple[float, Tensor]] = []
    leaves = [part for part in module.modules() if next(part.children(), None) is None]
    hooks = [part.register_forward_hook(partial(_note, matrices, dropouts)) for part in leaves]
    try:
        with torch.no_grad():
            y = module(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(y, Tensor) or y.shape != x.shape:
        given = f"one of shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise UnsupportedError(f"for a tensor of shape {list(x.shape)} it returns {given}")
    return _Seen(_rows(x), _rows(y), matrices, dropouts)


def _note(
    matrices: list[_Matrix], dropouts: list[tuple[float, Tensor]], part: nn.Module, args: tuple[Any, ...], y: Any
) -> None:
    """A forward hook: keep what a childless module did, if it is a dropout or a matrix product."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(y, Tensor):
        return
    if isinstance(part, nn.Dropout):
        dropouts.append((part.p, _rows(args[0])))
        return
    parameters = dict(part.named_parameters(recurse=False))
    weight, bias = parameters.pop("weight", None), parameters.pop("bias", None)
    if weight is None or weight.ndim != 2 or parameters or args[0].shape[-1] not in weight.shape:
        return
    x_NI, y_NO = _rows(args[0]), _rows(y)
    for stored in (weight.detach(), weight.detach().T):
        if stored.shape == (y_NO.shape[-1], x_NI.shape[-1]) and _agree(_product(x_NI, stored, bias), y_NO):
            matrices.append(_Matrix(stored, None if bias is None else bias.detach(), x_NI, y_NO))
            return


_Part = tuple[Tensor, Tensor | None]


def _readings(entries: list[_Matrix], down: _Matrix) -> Iterator[DenseWeights]:
    """Every arrangement of these matrices that has the right shapes."""
    inner = down.weight.shape[1]
    pairs: list[tuple[_Part, _Part | None]] = []
    if len(entries) == 1 and entries[0].weight.shape[0] == inner:
        pairs = [(_part(entries[0]), None)]
    if len(entries) == 1 and entries[0].weight.shape[0] == 2 * inner:
        first, second = _part(entries[0], slice(None, inner)), _part(entries[0], slice(inner, None))
        pairs = [(second, first), (first, second)]
    if len(entries) == 2 and all(matrix.weight.shape[0] == inner for matrix in entries):
        first, second = _part(entries[0]), _part(entries[1])
        pairs = [(second, first), (first, second)]
    for up, gate in pairs:
        for activation in ACTIVATIONS:
            yield DenseWeights(
                up_FD=up[0],
                up_bias_F=up[1],
                gate_FD=gate[0] if gate else None,
                gate_bias_F=gate[1] if gate else None,
                down_DF=down.weight,
                down_bias_D=down.bias,
                activation=activation,
            )


def _part(matrix: _Matrix, rows: slice = slice(None)) -> _Part:
    return matrix.weight[rows], None if matrix.bias is None else matrix.bias[rows]


def _dropouts(twin: nn.Module, seen: _Seen, hidden_NF: Tensor) -> dict[str, Any]:
    """Where the module drops values while training. Raises `UnsupportedError` if it does anything else then."""
    found = {"inner_dropout": 0.0, "dropout": 0.0}
    for probability, x in seen.dropouts:
        if probability:
            name = "dropout" if _agree(x, seen.y) else "inner_dropout"
            if found[name] or not (_agree(x, seen.y) or _agree(x, hidden_NF)):
                raise UnsupportedError("it has a dropout elsewhere than before or after its last matrix")
            found[name] = probability
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        trained = twin.train()(seen.x.unsqueeze(0))
    if not _agree(_rows(trained), seen.y):
        raise UnsupportedError("it computes something else while training, beside its dropout modules")
    return found


def _as_stored(mlp: DenseWeights, module: nn.Module) -> DenseWeights:
    """The reading with its tensors in the module's device and dtype; fp64 held every bit of them."""
    parameters = list(module.parameters())
    dtype = parameters[0].dtype
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    tensors: dict[str, Any] = {name: value for name, value in vars(mlp).items() if isinstance(value, Tensor)}
    return replace(mlp, **{name: value.to(parameters[0].device, dtype) for name, value in tensors.items()})


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    y_NO = x_NI @ weight_OI.T
    return y_NO if bias_O is None else y_NO + bias_O


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _agree(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= AGREE * y.abs().max())
