"""The native CPU kernels: allocates outputs and hands addresses and sizes to `moekit._native`.

Knows contiguity and dtypes, nothing of when it is chosen (select.py) or of gradients (autograd.py).
The instruction set is the best the CPU has; `MOEKIT_ISA` or `forced_isa` choose another, for tests.
Numbers do not depend on the number of threads, which is `torch.get_num_threads()`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch  # first: its OpenMP runtime becomes the extension's
from torch import Tensor

from moekit.errors import BackendError, ConfigError
from moekit.kernels.reference import ACTIVATIONS

__all__ = [
    "MlpInputs",
    "available_isas",
    "call",
    "forced_isa",
    "grouped_mm",
    "grouped_mm_transposed",
    "grouped_outer",
    "isa",
    "linear_row",
    "moe_decode",
    "moe_mlp",
    "moe_mlp_backward",
    "native",
    "num_threads",
    "quant_products",
    "release_memory",
    "top_k",
    "unavailable",
]

_LARGE = 4 * 2**20  # bytes
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def unavailable() -> str | None:
    """Why the library cannot be used, or None when it can."""
    try:
        import_module("moekit._native")
    except ImportError as error:
        return f"the native kernels are not built ({error}): pip install --force-reinstall moekit"
    return None


@cache
def native() -> Any:
    """`moekit._native`, or BackendError."""
    if reason := unavailable():
        raise BackendError(reason)
    library = import_module("moekit._native")
    if name := os.environ.get("MOEKIT_ISA"):
        _use(library, name)
    return library


def _use(library: Any, name: str) -> None:
    names = library.available_isas()
    if name not in names:
        raise BackendError(f"instruction set {name!r} is not available here; there are {', '.join(names)}")
    library.use_isa(name)


def available_isas() -> list[str]:
    """The instruction sets that this CPU and this build have, slowest first."""
    names: list[str] = native().available_isas()
    return names


def isa() -> str:
    """The instruction set in use."""
    name: str = native().isa()
    return name


def quant_products() -> str:
    """How codes and activations are multiplied on the instruction set in use."""
    words: str = native().quant_products()
    return words


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Use one instruction set in this process for the duration.

    Raises:
        BackendError: the CPU or the build does not have it.
    """
    before = isa()
    _use(native(), name)
    try:
        yield
    finally:
        native().use_isa(before)


def num_threads() -> int:
    """PyTorch's threads where the build has OpenMP, else 1."""
    return torch.get_num_threads() if native().threaded else 1


def grouped_mm(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """See `reference.grouped_mm`; fp32 or bf16 on the CPU."""
    experts, out_width, in_width = weight_EOI.shape
    out_RO = rows_RI.new_empty(rows_RI.shape[0], out_width)
    _run("grouped_mm", rows_RI, weight_EOI, counts_E, out_RO, (rows_RI.shape[0], experts, out_width, in_width))
    return out_RO


def grouped_mm_transposed(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """See `reference.grouped_mm_transposed`; fp32 or bf16 on the CPU."""
    experts, out_width, in_width = weight_EOI.shape
    out_RI = rows_RO.new_empty(rows_RO.shape[0], in_width)
    size = (rows_RO.shape[0], experts, out_width, in_width)
    _run("grouped_mm_transposed", rows_RO, weight_EOI, counts_E, out_RI, size)
    return out_RI


def grouped_outer(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    """See `reference.grouped_outer`; fp32 or bf16 on the CPU."""
    rows, out_width, in_width = rows_RO.shape[0], rows_RO.shape[1], rows_RI.shape[1]
    out_EOI = rows_RO.new_empty(counts_E.shape[0], out_width, in_width)
    _run("grouped_outer", rows_RO, rows_RI, counts_E, out_EOI, (rows, counts_E.shape[0], out_width, in_width))
    return out_EOI


def moe_decode(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    in_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    activation: str,
) -> Tensor:
    """See `reference.moe_decode`; fp32 or bf16 on the CPU. Between the two matrices it rounds once."""
    experts, hidden, inner = down_proj_EDF.shape
    inputs = [x_TD, expert_ids_TK, weights_TK.float(), in_proj_EGD, down_proj_EDF]
    inputs = [each.contiguous() for each in inputs]
    out_TD = torch.empty_like(inputs[0])
    sizes = (*expert_ids_TK.shape, experts, hidden, inner, in_proj_EGD.shape[1] == 2 * inner)
    _call("moe_decode", [*inputs, out_TD], (*sizes, ACTIVATIONS.index(activation)))
    return out_TD


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """See `reference.top_k`; fp32 or bf16 on the CPU."""
    scores_TE = scores_TE.float().contiguous()
    ids_TK = scores_TE.new_empty((scores_TE.shape[0], k), dtype=torch.int64)
    call("top_k", [scores_TE, ids_TK], (*scores_TE.shape, k))
    return ids_TK


def linear_row(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """W · x + b of a single row: x (..., I) with one row, (..., O) in its dtype, which W and b have too."""
    out = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    inputs = [each if each is None else each.contiguous() for each in (x, weight_OI, bias_O)]
    where = [0 if each is None else each.data_ptr() for each in (*inputs, out)]
    native().linear_row(*where, *weight_OI.shape, DTYPES[x.dtype], num_threads())
    return out


class MlpInputs(NamedTuple):
    """What `reference.moe_mlp` takes, in its order."""

    x_TD: Tensor
    token_ids_A: Tensor
    expert_ids_A: Tensor
    weights_A: Tensor
    in_proj_EGD: Tensor
    in_bias_EG: Tensor | None
    down_proj_EDF: Tensor
    down_bias_ED: Tensor | None

    def native(self) -> MlpInputs:
        """As the kernels read them: contiguous, and the weights of the assignments in float32."""
        held = self._replace(weights_A=self.weights_A.float())
        tensors: list[Any] = [each if each is None else each.contiguous() for each in held]
        return MlpInputs(*tensors)

    def with_gradients(self) -> tuple[Tensor | None, ...]:
        """Those that have one, in order."""
        return self.x_TD, *self[3:]


def moe_mlp(inputs: MlpInputs, activation: str, out_dtype: torch.dtype, save: bool) -> tuple[Tensor, Tensor]:
    """See `reference.moe_mlp`; fp32 or bf16 on the CPU. Sums, and hidden rows, are fp32.

    Returns:
        The result, and with `save` what `moe_mlp_backward` needs: the pre-activations (A, G), sorted by expert.
    """
    held = inputs.native()  # alive until the call is over
    out_TD = _empty(held.x_TD.shape, out_dtype)
    pre_AG = _empty((held.expert_ids_A.shape[0] if save else 0, held.in_proj_EGD.shape[1]), held.x_TD.dtype)
    addresses = (_addresses(held), out_TD.data_ptr(), pre_AG.data_ptr() if save else 0)
    _call_mlp("moe_mlp", addresses, held, activation, out_dtype)
    return out_TD, pre_AG


def moe_mlp_backward(
    grad_TD: Tensor, pre_AG: Tensor, inputs: MlpInputs, activation: str, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of `inputs.with_gradients()`, each where `needed`, else empty."""
    held, grad_TD = inputs.native(), grad_TD.contiguous()
    grads = [
        _empty(each.shape, each.dtype) if need and each is not None else grad_TD.new_empty(0)
        for each, need in zip(held.with_gradients(), needed, strict=True)
    ]
    out = _addresses(grad if need else None for grad, need in zip(grads, needed, strict=True))
    addresses = (_addresses(held), grad_TD.data_ptr(), pre_AG.contiguous().data_ptr(), out)
    _call_mlp("moe_mlp_backward", addresses, held, activation, grad_TD.dtype)
    return grads


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised; the memory of a large one is kept for the next when it is gone, see csrc/workspace.h."""
    if math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    tensor: Tensor = native().empty(shape, DTYPES[dtype])
    return tensor


def release_memory() -> None:
    """Give back to the system what is kept of large results and gradients that nobody holds any more."""
    if unavailable() is None:
        native().release_memory()


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if each is None else each.data_ptr() for each in tensors]


def _call_mlp(op: str, addresses: tuple[Any, ...], inputs: MlpInputs, activation: str, out_dtype: torch.dtype) -> None:
    experts, hidden, inner = inputs.down_proj_EDF.shape
    sizes = [inputs.x_TD.shape[0], inputs.expert_ids_A.shape[0], experts, hidden, inner]
    gated = inputs.in_proj_EGD.shape[1] == 2 * inner
    kinds = (gated, ACTIVATIONS.index(activation), DTYPES[inputs.x_TD.dtype], DTYPES[out_dtype])
    _raising(op, getattr(native(), op), *addresses, sizes, *kinds, num_threads())


def _run(op: str, left: Tensor, right: Tensor, counts_E: Tensor, out: Tensor, size: tuple[int, ...]) -> None:
    _call(op, [left.contiguous(), right.contiguous(), counts_E.contiguous(), out], size)


def _call(op: str, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    call(op, tensors, (*sizes, DTYPES[tensors[0].dtype]))


def call(op: str, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    """One native op on the addresses of contiguous tensors, then numbers, then the threads; its complaints are
    ConfigErrors."""
    _raising(op, getattr(native(), op), *[each.data_ptr() for each in tensors], *sizes, num_threads())


def _raising(op: str, run: Callable[..., None], *args: Any) -> None:
    try:
        run(*args)
    except ValueError as error:
        raise ConfigError(f"{op}: {error}") from None
