"""When a pass of `Decoder` is one new token, and how it goes through the blocks in native steps.

This is the one place that chooses between the steps (kernels/steps.py) and the modules, for the attention and for the
MLP of each block. A step stands for modules that are exactly those it was made from, so it is taken only while
nothing was replaced and nobody listens: forward hooks, as of a monitor, fire in the modules alone.
Shapes: B batch, L length, D hidden, h key–value heads, d head dimension, S positions, E experts, A assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from moekit.config import ModelConfig
from moekit.kernels import select
from moekit.kernels.formats import Packed
from moekit.kernels.quant import Matrices
from moekit.kernels.steps import (
    CACHE_DTYPES,
    AttentionStep,
    ExpertWeights,
    MLPStep,
    MLPWeights,
    TopKGate,
    Weights,
    can_multiply,
)
from moekit.models.attention import Attention
from moekit.models.blocks import DenseMLP, RMSNorm
from moekit.models.cache import KVCache
from moekit.models.rope import rotary_factors
from moekit.models.step_token import Token, think_in_parts
from moekit.moe import GroupedMLP, GroupedSwiGLU, Linear, MoE, SharedExperts, TopKRouter
from moekit.moe.dispatch import LocalDispatcher
from moekit.moe.experts import Residency
from moekit.moe.router import Router

__all__ = ["DecoderSteps", "Token", "obstacle"]

StepT = TypeVar("StepT", AttentionStep, MLPStep)
_ANGLES = 256  # positions whose angles are computed at once
_MOST_ANGLES = 64  # such stretches that are kept: sequences of a batch are at different ones


def obstacle(input_ids: Tensor, cache: KVCache | None, dtype: torch.dtype) -> str | None:
    """Why this pass goes through the modules, or None where the steps may take it."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the modules"
    if input_ids.shape != (1, 1) or cache is None or cache.batch != 1:
        return "it is not one new token after a cache"
    if cache.dtype not in CACHE_DTYPES:
        return f"the cache holds {cache.dtype}"
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return "a gradient is wanted, or autocast is on"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module has hooks"
    return select.native_obstacle(input_ids.device, dtype)


class DecoderSteps:
    """The steps of one decoder's blocks, made when first needed. A copy of the decoder makes its own."""

    def __init__(self) -> None:
        self._blocks: list[tuple[_Kept[AttentionStep], _Kept[MLPStep]]] = []
        self._angles: dict[tuple[int, ModelConfig, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderSteps:
        return DecoderSteps()

    def __reduce__(self) -> tuple[type[DecoderSteps], tuple[()]]:
        return DecoderSteps, ()

    def explain(self, layers: Iterable[nn.Module], dtype: torch.dtype) -> str:
        """How many blocks decode in native steps."""
        if reason := select.native_obstacle(torch.device("cpu"), dtype):
            return f"decode: modules ({reason})"
        blocks = self._of(layers)
        found = [[kept.get(dtype) is not None for kept in block] for block in blocks]
        attention, mlp = (sum(part) for part in zip(*found, strict=True))
        return f"decode: native steps for the attention of {attention} and the MLP of {mlp} of {len(blocks)} blocks"

    def run(self, layers: Iterable[Any], tokens: Sequence[Token], config: ModelConfig) -> None:
        """Tokens of different sequences through all blocks, a block at a time, so that what one token read from memory
        is near for the others. No number depends on which other tokens there are."""
        dtype = tokens[0].dtype
        angles = [partial(self._angles_at, token.cache.length, config, dtype) for token in tokens]
        steps = self._of(layers)
        for number, (block, (attention, mlp)) in enumerate(zip(layers, steps, strict=True)):
            attention_step, mlp_step = attention.get(dtype), mlp.get(dtype)
            for token, angles_of in zip(tokens, angles, strict=True):
                token.attend(block, attention_step, angles_of)
            if mlp_step is not None and isinstance(block.mlp, MoE) and block.mlp.experts.residency is not None:
                think_in_parts(tokens, block, mlp_step, _next(steps[number + 1 : number + 2], dtype))
                continue
            for token in tokens:
                token.think(block, mlp_step)

    def _of(self, layers: Iterable[Any]) -> list[tuple[_Kept[AttentionStep], _Kept[MLPStep]]]:
        blocks = list(layers)
        if [id(kept.block) for kept, _ in self._blocks] != list(map(id, blocks)):
            self._blocks = [(_Kept(block, _attention_step, "attn"), _Kept(block, _mlp_step, "mlp")) for block in blocks]
        return self._blocks

    def _angles_at(self, position: int, config: ModelConfig, dtype: torch.dtype) -> Tensor:
        """(2, d/2) float32: cosines and sines, rounded as the modules round them."""
        first = position - position % _ANGLES
        key = (first, config, dtype)
        if key not in self._angles:
            if len(self._angles) == _MOST_ANGLES:
                self._angles.clear()
            factors = rotary_factors(torch.arange(first, first + _ANGLES)[None], config)
            halves = [factor[0, 0, :, : config.head_dim // 2].to(dtype).float() for factor in factors]
            self._angles[key] = torch.stack(halves, dim=1).contiguous()
        return self._angles[key][position - first]


def _next(steps: Sequence[tuple[Any, _Kept[MLPStep]]], dtype: torch.dtype) -> tuple[Residency, MLPStep] | None:
    """Where the next block's experts are, and the step that can guess which a token will take."""
    for _, kept in steps:
        step = kept.get(dtype)
        if step is not None and step.gate is not None and isinstance(kept.block.mlp, MoE):
            residency = kept.block.mlp.experts.residency
            return None if residency is None else (residency, step)
    return None


class _Kept(Generic[StepT]):
    """A step, as long as the modules of a block that it stands for are what they were when it was made."""

    def __init__(self, block: Any, make: Callable[[Any, torch.dtype], StepT], part: str) -> None:
        self.block = block
        self._make: Callable[[Any, torch.dtype], StepT] = make
        self._part = part
        self._made_for: torch.dtype | None = None
        self._step: StepT | None = None
        self._places: tuple[list[dict[str, Any]], list[str]] = [], []
        self._hooks: list[Any] = []
        self._there: list[int] = []
        self._addresses: list[int] = []

    def get(self, dtype: torch.dtype) -> StepT | None:
        """The step for hidden states of this dtype; None where the modules must run."""
        step = self._step
        moved = step is not None and step.addresses() != self._addresses
        if moved or self._made_for != dtype or self._present() != self._there:
            step = self._remake(dtype)
        return None if any(self._hooks) else step

    def _present(self) -> list[int]:
        """The identities of everything that is kept in the modules now."""
        return list(map(id, map(dict.get, *self._places)))

    def _remake(self, dtype: torch.dtype) -> StepT | None:
        norm: nn.Module = getattr(self.block, f"{self._part}_norm")
        part: nn.Module = getattr(self.block, self._part)
        modules = [self.block, *norm.modules(), *part.modules()]
        places = [(kept, name) for module in modules[1:] for kept in _kept_by(module) for name in kept]
        places += [(self.block._modules, f"{self._part}_norm"), (self.block._modules, self._part)]
        places += [(module.__dict__, name) for module in modules for name in ("forward", "training")]
        self._places = [kept for kept, _ in places], [name for _, name in places]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._there, self._made_for = self._present(), dtype
        try:
            self._step = (
                None if any("forward" in module.__dict__ for module in modules) else self._make(self.block, dtype)
            )
        except _NoStepError:
            self._step = None
        self._addresses = [] if self._step is None else self._step.addresses()
        return self._step


def _kept_by(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _attention_step(block: Any, dtype: torch.dtype) -> AttentionStep:
    attn = _exactly(block.attn, Attention)
    _plain_block(block)
    if attn.extras:
        raise _NoStepError(f"the attention has {', '.join(attn.extras)}")
    norms = [block.attn_norm] + ([] if type(attn.q_norm) is nn.Identity else [attn.q_norm, attn.k_norm])
    weights = [_norm(each, block.attn_norm.eps) for each in norms]
    q, k, v, o = (_linear(each, dtype) for each in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
    return AttentionStep(
        norm=weights[0],
        eps=block.attn_norm.eps,
        q=q,
        k=k,
        v=v,
        o=o,
        head_norms=(weights[1], weights[2]) if weights[1:] else None,
        head_dim=attn.head_dim,
        dtype=dtype,
    )


def _mlp_step(block: Any, dtype: torch.dtype) -> MLPStep:
    _plain_block(block)
    norm, mlp = _norm(block.mlp_norm, block.mlp_norm.eps), block.mlp
    if type(mlp) is DenseMLP:
        dense = _dense(mlp, dtype)
        return MLPStep(norm=norm, eps=block.mlp_norm.eps, shared=dense, activation=mlp.activation, dtype=dtype)
    _exactly(mlp, MoE)
    _exactly(mlp.dispatcher, LocalDispatcher)
    shared = None if mlp.shared is None else _dense(_exactly(mlp.shared, SharedExperts), dtype)
    gate = None if shared is None else mlp.shared.gate
    return MLPStep(
        norm=norm,
        eps=block.mlp_norm.eps,
        gate=_gate(mlp.router),
        experts=_experts(mlp.experts, dtype),
        shared=shared,
        shared_gate=None if gate is None else _linear(gate, dtype).weight,
        activation=mlp.experts.activation,
        dtype=dtype,
    )


def _experts(experts: Any, dtype: torch.dtype) -> ExpertWeights:
    if getattr(experts, "clamped", False):
        raise _NoStepError("the experts have limits")
    biases = [each if each is None else _plain(each, dtype) for each in (experts.in_bias, experts.down_bias)]
    if experts.residency is not None:
        if dtype != torch.float32:
            raise _NoStepError("packed matrices multiply float32")
        return ExpertWeights(*experts.residency.matrices, *biases)
    if isinstance(getattr(experts, "gate_up", None), Matrices):  # the packed kind
        first, second = ([_packed(each, dtype) for each in m.weights] for m in (experts.gate_up, experts.down))
        return ExpertWeights(first, second, *biases)
    _exactly(experts, GroupedMLP, GroupedSwiGLU)
    return ExpertWeights(_plain(experts.in_proj, dtype), _plain(experts.down_proj, dtype), *biases)


def _dense(mlp: DenseMLP | SharedExperts, dtype: torch.dtype) -> MLPWeights:
    up, down = _linear(mlp.up_proj, dtype), _linear(mlp.down_proj, dtype)
    return MLPWeights(up, None, down) if mlp.gate_proj is None else MLPWeights(_linear(mlp.gate_proj, dtype), up, down)


def _plain_block(block: Any) -> None:
    if not block.is_plain:
        raise _NoStepError("the block does more than add to the stream")


def _gate(router: Router) -> TopKGate | None:
    """None for a router that the step does not know."""
    config = router.config
    noisy = router.training and router._is_noisy()
    plain = type(router) is TopKRouter and router.bias is None and router.selection_bias is None
    if not plain or router.options.groups is not None or config.capacity is not None or noisy:
        return None
    return TopKGate(
        weight=_plain(router.weight, None),
        top_k=config.top_k,
        softmax_first=config.gate_order == "softmax_topk",
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def _linear(module: Any, dtype: torch.dtype) -> Weights:
    packed = getattr(module, "packed", None)
    if not isinstance(packed, Packed):
        _exactly(module, Linear, nn.Linear)
    bias = None if module.bias is None else _plain(module.bias, dtype)
    return Weights(_plain(module.weight, dtype) if packed is None else _packed(packed, dtype), bias)


def _packed(weight: Any, dtype: torch.dtype) -> Packed:
    """One packed matrix, which the kernels multiply with float32 alone."""
    if not isinstance(weight, Packed) or len(weight.shape) != 2:
        raise _NoStepError("its packed matrices are not one by one")
    if dtype != torch.float32 or weight.data.device.type != "cpu":
        raise _NoStepError("packed matrices multiply float32 in memory")
    return weight


def _norm(module: Any, eps: float) -> Tensor:
    if _exactly(module, RMSNorm).eps != eps:
        raise _NoStepError("its norms differ in eps")
    return _plain(module.weight, None)


def _plain(weight: Any, dtype: torch.dtype | None) -> Tensor:
    """A tensor that the kernels read as it is, of this dtype or of any that they know."""
    if not can_multiply(weight) or (dtype is not None and weight.dtype != dtype):
        raise _NoStepError(f"a {tuple(weight.shape)} tensor is not a contiguous one of the model's dtype in memory")
    tensor: Tensor = weight
    return tensor


def _exactly(module: Any, *kinds: type) -> Any:
    """The module, if it is one of these and of no other class that computes something else."""
    if type(module) not in kinds:
        raise _NoStepError(f"{type(module).__name__} has no step")
    return module


class _NoStepError(Exception):
    """Why the modules must run."""
