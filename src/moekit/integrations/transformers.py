"""The experts backend "moekit" for models of Hugging Face transformers, forward and backward.

Importing this module registers it; nothing of transformers is replaced. The models call `experts_forward` through
the public experts interface, with their own parameters, routing and gate. Three ways through it: `_sorted` for any
layout; in the commonest ones `_fused`, one op with its gradient, and `_decode`, for few tokens without gradient.

Shapes: T tokens, K experts a token, A = T·K assignments, R rows sorted by expert, E experts, D hidden, F inner width,
G = 2F (gate and up in the model's own order) or F (up alone).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moekit import kernels
from moekit.errors import UnsupportedError

try:
    import transformers
    from packaging.version import Version
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

    if Version(transformers.__version__) < Version("5.7"):  # its models refuse every backend but its own
        raise ImportError(f"this is {transformers.__version__}")
except ImportError as error:
    raise UnsupportedError(
        f"the experts backend needs transformers 5.7 or later: pip install -U transformers ({error})"
    ) from error

__all__ = ["BACKEND", "expert_modules", "experts_forward", "use_moekit"]

BACKEND = "moekit"

logger = logging.getLogger(__name__)

# What the interface may say about an experts class; an older transformers says less and means the defaults.
_DEFAULTS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
_TENSORS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
_CHILDREN = {"act_fn", "post_expert_norm", "parametrizations"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The activations that the whole-layer kernels know, as transformers' objects and functions.
_ACTIVATIONS: dict[Any, str] = {
    F.silu: "silu",
    **{
        type(ACT2FN[theirs]): ours
        for theirs, ours in {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_pytorch_tanh": "gelu_tanh",
            "relu": "relu",
        }.items()
    },
}


class _Weights(NamedTuple):
    """The tensors of one experts module: in (E, G, D), down (E, D, F), or both transposed; biases (E, G), (E, D)."""

    in_proj: Tensor
    in_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None


def use_moekit(model: nn.Module) -> nn.Module:
    """Run every expert of a transformers model through moekit from now on; `set_experts_implementation` undoes it.

    How many modules that are is logged (level INFO); `expert_modules` lists them. The setting is the process's, not
    the checkpoint's: `from_pretrained` needs `experts_implementation="moekit"`, or this call, again.

    Args:
        model: a `PreTrainedModel`, or a wrapper that passes its methods on, as PEFT's does.
    Returns:
        The same model.
    Raises:
        UnsupportedError: the model has no experts behind the interface (Switch and DBRX take the setting and ignore
            it), or has some that moekit cannot run.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    >>> model = use_moekit(MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=2, **sizes)))
    >>> list(expert_modules(model))
    ['model.layers.0.mlp.experts']
    """
    name = type(model).__name__
    modules = expert_modules(model)
    if not modules:
        raise UnsupportedError(f"{name} has no experts behind transformers' experts interface: moekit cannot run any")
    for path, module in modules.items():
        if reason := _obstacle(module):
            raise UnsupportedError(f"{path} ({type(module).__name__}): {reason}")
    model.set_experts_implementation(BACKEND)  # type: ignore[operator]
    for path, module in modules.items():
        if module.config._experts_implementation != BACKEND:
            raise UnsupportedError(f"{name} took the setting, but not for its {path}")
    logger.info("moekit runs the %d expert modules of %s", len(modules), name)
    return model


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """The modules of `model` that call transformers' experts interface, by their path."""
    marks = {"has_bias", "is_transposed", "config"}
    return {path: module for path, module in model.named_modules() if marks <= vars(module).keys()}


def experts_forward(module: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """Σ_k weight_tk · E_id(t,k)(x_t) with the parameters, activation, gate and norm of `module`.

    Products run in the autocast dtype when autocast is on, else in the weights' dtype; biases and activations follow
    PyTorch's promotion from there, as in eager; the sum over K is in fp32 and rounded once.

    Args:
        module: an experts module of transformers.
        hidden_TD: (T, D).
        top_k_index_TK: integers below E; E itself marks an expert of another process, which adds nothing.
        top_k_weights_TK: any float dtype.
    Returns:
        (T, D) in hidden_TD's dtype.
    Raises:
        UnsupportedError: the module's layout or the kind of its weights is not one that moekit knows.
        ConfigError or RuntimeError: an index is above E or negative.
    """
    if reason := _obstacle(module):
        raise UnsupportedError(f"{type(module).__name__}: {reason}")
    weights = _read(module)
    ids_TK = top_k_index_TK.to(torch.int64)
    dtype = _compute_dtype(hidden_TD, weights.down_proj)
    activation = _plain_activation(module)
    if activation is not None:
        few = not torch.is_grad_enabled() and hidden_TD.shape[0] <= kernels.MOE_DECODE_MAX_TOKENS
        if few and weights.in_bias is None and dtype == weights.down_proj.dtype:
            return _decode(activation, weights, hidden_TD, ids_TK, top_k_weights_TK)
        if kernels.fuses_mlp(hidden_TD.device, dtype):
            return _fused(activation, weights, dtype, hidden_TD, ids_TK, top_k_weights_TK)
    return _sorted(module, weights, dtype, hidden_TD, ids_TK, top_k_weights_TK)


def _sorted(
    module: Any, weights: _Weights, dtype: torch.dtype, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Sort the tokens by expert, run each matrix of all experts as one grouped product, and put them back.

    As `moekit.moe` does it, but every shape follows from T and K alone, so that torch.compile needs no second graph.
    """
    experts = weights.down_proj.shape[0]
    order_R, back_A, counts_E = _sort(ids_TK.flatten(), experts)
    rows_RD: Tensor = _Spread.apply(hidden_TD, order_R, back_A, ids_TK.shape[1])
    product = kernels.grouped_mm_transposed if _flag(module, "is_transposed") else kernels.grouped_mm
    hidden_RG = product(rows_RD.to(dtype), weights.in_proj.to(dtype), counts_E)
    hidden_RG = _add_bias(hidden_RG, weights.in_bias, counts_E)
    hidden_RF = module._apply_gate(hidden_RG) if _flag(module, "has_gate") else module.act_fn(hidden_RG)
    out_RD = product(hidden_RF.to(dtype), weights.down_proj.to(dtype), counts_E)
    out_RD = _add_bias(out_RD, weights.down_bias, counts_E)
    if _flag(module, "has_post_expert_norm"):
        out_RD = module.post_expert_norm(out_RD)
    out_TKD = _Reorder.apply(out_RD, back_A, order_R).unflatten(0, ids_TK.shape)
    wide = torch.promote_types(out_RD.dtype, torch.float32)
    here_TK = weights_TK.masked_fill(ids_TK == experts, 0).to(wide)
    return (out_TKD.to(wide) * here_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TD.dtype)


def _sort(ids_A: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the assignment of each row, the row of each assignment, the rows of each expert).

    Other processes' rows come last and are counted apart. The kernels are not told of them: they read no row past the
    last expert's and write zeros there, gradients included.
    """
    order_R = torch.argsort(ids_A, stable=True)
    back_A = torch.empty_like(order_R)
    back_A[order_R] = torch.arange(order_R.shape[0], device=ids_A.device)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids_A.device)
    return order_R, back_A, counts.scatter_add_(0, ids_A, torch.ones_like(ids_A))[:experts]


class _Spread(torch.autograd.Function):
    """(T, D) → (R, D): each token once for each of its K experts, in their order. The gradient gathers and sums K rows
    a token, where autograd, which cannot know that there are K, would scatter them one by one."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, back_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(back_A)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (back_A,) = ctx.saved_tensors
        return grad_RD.index_select(0, back_A).unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient gathers by the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_A: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, index_A)

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_AD.index_select(0, inverse_R), None, None


def _fused(
    activation: str, weights: _Weights, dtype: torch.dtype, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The same in one op with its gradient; experts of other processes are E there too."""
    matrices = _Weights(*(None if each is None else each.to(dtype) for each in weights))  # type: ignore[arg-type]
    tokens_A = torch.arange(ids_TK.shape[0], device=ids_TK.device).repeat_interleave(ids_TK.shape[1])
    y_TD = kernels.moe_mlp(
        hidden_TD.to(dtype),
        tokens_A,
        ids_TK.flatten(),
        weights_TK.flatten(),
        matrices.in_proj,
        matrices.in_bias,
        matrices.down_proj,
        matrices.down_bias,
        activation,
        dtype if hidden_TD.dtype == dtype else torch.float32,
    )
    return y_TD.to(hidden_TD.dtype)


def _decode(activation: str, weights: _Weights, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The same in one op."""
    elsewhere_TK = ids_TK == weights.down_proj.shape[0]
    y_TD = kernels.moe_decode(
        hidden_TD.to(weights.down_proj.dtype),
        ids_TK.masked_fill(elsewhere_TK, 0),
        weights_TK.masked_fill(elsewhere_TK, 0),
        weights.in_proj,
        weights.down_proj,
        activation,
    )
    return y_TD.to(hidden_TD.dtype)


def _add_bias(rows_RG: Tensor, bias_EG: Tensor | None, counts_E: Tensor) -> Tensor:
    """Each row plus its expert's bias, as the product 1 · bias: its gradient is then a grouped sum in fp32, where an
    indexed bias would add row after row in the bias's own precision."""
    if bias_EG is None:
        return rows_RG
    ones_R1 = bias_EG.new_ones(rows_RG.shape[0], 1)
    return rows_RG + kernels.grouped_mm(ones_R1, bias_EG.unsqueeze(-1), counts_E)


def _read(module: Any) -> _Weights:
    """Each tensor once and in one order: under PEFT a read is a computation, and a checkpoint counts them."""
    names = ["gate_up_proj" if _flag(module, "has_gate") else "up_proj", "down_proj"]
    with_bias = _flag(module, "has_bias")
    tensors = []
    for name in names:
        tensors.append(_plain(module, name))
        tensors.append(_plain(module, f"{name}_bias") if with_bias else None)
    return _Weights(*tensors)


def _plain(module: Any, name: str) -> Any:
    tensor = getattr(module, name)
    if is_traceable_wrapper_subclass(tensor) or tensor.dtype not in _DTYPES:
        kind = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
        raise UnsupportedError(f"{type(module).__name__}.{name} is a {kind}: moekit needs plain floating-point weights")
    return tensor


def _obstacle(module: Any) -> str | None:
    """Why moekit cannot run this experts module, or None; reads no weight."""
    unknown = [name for name in vars(module) if name.startswith(("has_", "is_")) and name not in _DEFAULTS]
    if any(getattr(module, name) for name in unknown):
        return f"moekit does not know what its {', '.join(unknown)} means"
    tensors = module._parameters.keys() | module._buffers.keys()
    if strange := sorted((tensors - _TENSORS) | (module._modules.keys() - _CHILDREN)):
        return f"moekit does not know what its {', '.join(strange)} is for; quantised experts are not supported"
    return None


def _plain_activation(module: Any) -> str | None:
    """The kernels' name of the activation when their whole-layer ops compute exactly this module, else None."""
    own_gate = type(module)._apply_gate is not _PlainExperts._apply_gate  # type: ignore[attr-defined]
    if own_gate or _flag(module, "is_transposed") or _flag(module, "has_post_expert_norm"):
        return None
    act = module.act_fn
    return _ACTIVATIONS.get(type(act)) or _ACTIVATIONS.get(act)


def _flag(module: Any, name: str) -> bool:
    return getattr(module, name, _DEFAULTS[name])


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it applies (it leaves float64 alone), else the weights'."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


@use_experts_implementation
class _PlainExperts(nn.Module):
    """An experts class without a gate of its own, for the sake of the gate that the interface then gives it."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, *args: Any) -> None: ...


ExpertsInterface.register(BACKEND, experts_forward)
