"""`moe_mlp`, dispatch, experts and combine as one differentiable op: checked, traceable, without a second derivative.

Shapes: T tokens, A assignments, E experts, D hidden, F inner width, G = 2F (gate, then up) or F (up alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.errors import ConfigError, UnsupportedError
from moekit.kernels import cpu, reference, select

__all__ = ["moe_mlp"]


def moe_mlp(
    x_TD: Tensor,
    token_ids_A: Tensor,
    expert_ids_A: Tensor,
    weights_A: Tensor,
    in_proj_EGD: Tensor,
    in_bias_EG: Tensor | None,
    down_proj_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y_t = Σ weight_a · E_e(a)(x_t) over the assignments a of token t; see `reference.moe_mlp`.

    Args:
        x_TD: (T, D).
        token_ids_A: (A,) int64, ascending; a token may have any number of assignments.
        expert_ids_A: (A,) int64; E itself is nobody's and adds nothing.
        weights_A: (A,), any float dtype.
        in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED: in x's dtype; the biases may be None.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        out_dtype: x's dtype if None, else that or float32: sums are wider than bf16.
    Returns:
        (T, D). Gradients reach x, the weights, both matrices and both biases.
    Raises:
        ConfigError: shapes, dtypes, ids or the activation do not fit.
        UnsupportedError: a gradient of the gradient is asked of the native op.

    >>> x, up, down = torch.ones(2, 1), torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[10.0]]])
    >>> ids = torch.tensor([0, 1, 1])
    >>> moe_mlp(x, torch.tensor([0, 0, 1]), ids, torch.ones(3), up, None, down, None, "relu").flatten().tolist()
    [11.0, 10.0]
    """
    out_dtype = x_TD.dtype if out_dtype is None else out_dtype
    matrices = (in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED)
    inputs = cpu.MlpInputs(x_TD, token_ids_A, expert_ids_A, weights_A, *matrices)
    _check(inputs, activation, out_dtype)
    if _backend(x_TD.device, x_TD.dtype) == "reference":
        return reference.moe_mlp(*inputs, activation, out_dtype)
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs.with_gradients())
    out_TD: Tensor = _moe_mlp(*inputs, activation, out_dtype, save)[0]
    return out_TD


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(device: torch.device, dtype: torch.dtype) -> str:
    return select.choose("moe_mlp", device, dtype, rows=1, experts=1)


@torch.library.custom_op("moekit::moe_mlp", mutates_args=())
def _moe_mlp(
    x_TD: Tensor,
    token_ids_A: Tensor,
    expert_ids_A: Tensor,
    weights_A: Tensor,
    in_proj_EGD: Tensor,
    in_bias_EG: Tensor | None,
    down_proj_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    matrices = (in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED)
    inputs = cpu.MlpInputs(x_TD, token_ids_A, expert_ids_A, weights_A, *matrices)
    return cpu.moe_mlp(inputs, activation, out_dtype, save)


@torch.library.custom_op("moekit::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(
    grad_TD: Tensor,
    pre_AG: Tensor,
    x_TD: Tensor,
    token_ids_A: Tensor,
    expert_ids_A: Tensor,
    weights_A: Tensor,
    in_proj_EGD: Tensor,
    in_bias_EG: Tensor | None,
    down_proj_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    matrices = (in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED)
    inputs = cpu.MlpInputs(x_TD, token_ids_A, expert_ids_A, weights_A, *matrices)
    return cpu.moe_mlp_backward(grad_TD, pre_AG, inputs, activation, needed)


@_moe_mlp.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, (_, out_dtype, save) = cpu.MlpInputs(*args[:8]), args[8:]
    x_TD, rows = inputs.x_TD, inputs.expert_ids_A.shape[0] if save else 0
    return x_TD.new_empty(x_TD.shape, dtype=out_dtype), x_TD.new_empty(rows, inputs.in_proj_EGD.shape[1])


@_moe_mlp_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    inputs, needed = cpu.MlpInputs(*args[2:10])._replace(weights_A=args[5].float()), args[11]
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if need and each is not None
        else inputs.x_TD.new_empty(0)
        for each, need in zip(inputs.with_gradients(), needed, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.out_dtype, _ = inputs
    pre_AG = output[1]
    ctx.mark_non_differentiable(pre_AG)
    ctx.set_materialize_grads(False)  # else pre_AG gets a gradient of zeros, as large as itself, that nobody reads
    ctx.save_for_backward(pre_AG, *tensors)


_PLACES = (0, 3, 4, 5, 6, 7)  # of those inputs that have a gradient


def _backward(ctx: Any, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 11
    pre_AG, *tensors = ctx.saved_tensors
    needed = [ctx.needs_input_grad[place] for place in _PLACES]
    grads = _moe_mlp_backward(grad_TD, pre_AG, *tensors, ctx.activation, needed)
    result: list[Tensor | None] = [None] * 11
    for place, grad, need in zip(_PLACES, grads, needed, strict=True):
        if need:
            result[place] = grad.to(tensors[place].dtype)
    return tuple(result)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise UnsupportedError(
        "the native moe_mlp has no second derivative: take it under moekit.kernels.forced('reference')"
    )


_moe_mlp.register_autograd(_backward, setup_context=_save)
_moe_mlp_backward.register_autograd(_no_second_derivative)


def _check(inputs: cpu.MlpInputs, activation: str, out_dtype: torch.dtype) -> None:
    x_TD, token_ids_A, expert_ids_A, weights_A, in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED = inputs
    experts, hidden, inner = _sizes("down_proj_EDF", down_proj_EDF, (None, None, None))
    _sizes("x_TD", x_TD, (None, hidden))
    width = _sizes("in_proj_EGD", in_proj_EGD, (experts, None, hidden))[1]
    if width not in (inner, 2 * inner):
        raise ConfigError(f"moe_mlp: in_proj has {width} rows, but the inner width is {inner}: F or 2F expected")
    assignments = _sizes("expert_ids_A", expert_ids_A, (None,))
    _sizes("token_ids_A", token_ids_A, assignments)
    _sizes("weights_A", weights_A, assignments)
    for name, bias, size in (("in_bias_EG", in_bias_EG, width), ("down_bias_ED", down_bias_ED, hidden)):
        if bias is not None:
            _sizes(name, bias, (experts, size))
    for name, ids in (("token_ids_A", token_ids_A), ("expert_ids_A", expert_ids_A)):
        if ids.dtype != torch.int64:
            raise ConfigError(f"moe_mlp: {name} must be int64, not {ids.dtype}")
    for each in (in_proj_EGD, in_bias_EG, down_proj_EDF, down_bias_ED):
        if each is not None and (each.dtype != x_TD.dtype or each.device != x_TD.device):
            raise ConfigError(
                f"moe_mlp: the weights must be {x_TD.dtype} on {x_TD.device} as x is, not {each.dtype} on {each.device}"
            )
    if out_dtype not in (x_TD.dtype, torch.float32):
        raise ConfigError(f"moe_mlp: the result can be {x_TD.dtype} as x is, or float32, not {out_dtype}")
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ConfigError(f"moe_mlp: unknown activation {activation!r}; there are {known}")


def _sizes(name: str, tensor: Tensor, wanted: tuple[int | None, ...]) -> tuple[int, ...]:
    """Its shape, if it is the one wanted, where None is any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, shape, strict=True)):
        expected = ", ".join("any" if each is None else str(each) for each in wanted)
        raise ConfigError(f"moe_mlp: the shape of {name} must be ({expected}), not {shape}")
    return shape
