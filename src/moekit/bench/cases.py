"""What is measured. A case builds its contenders, checks that they agree, and times them in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.bench.limits import gemm_rate, int8_gemm_rate, read_bandwidth
from moekit.bench.peers import transformers_layer
from moekit.bench.timing import interleaved
from moekit.config import MoEConfig
from moekit.models.blocks import DenseMLP
from moekit.moe import MoE
from moekit.train.memory import freed_memory_kept

__all__ = ["EXPERT_COUNTS", "EXPERT_SHAPE", "LAYER_SHAPES", "LayerShape", "Row", "experts", "layer", "limits"]


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer and how many tokens it sees."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden_size}, width {self.intermediate_size}, {self.num_experts} experts, "
            f"top-{self.top_k}, {self.tokens} tokens"
        )


LAYER_SHAPES = (
    LayerShape(1024, 512, 64, 8, 2048),
    LayerShape(2048, 1024, 64, 8, 1024),
    LayerShape(1024, 2048, 8, 2, 2048),
)

EXPERT_SHAPE = LayerShape(1024, 512, 8, 8, 2048)
EXPERT_COUNTS = (8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Row:
    """One measurement: `ratio` is the speed relative to the first row of its table, which does the same FLOPs."""

    what: str
    contender: str
    milliseconds: float
    gflops: float
    ratio: float


def limits() -> dict[str, float]:
    """Reading memory in GB/s, PyTorch's matrix product in GFLOP/s (int8: whole-number operations)."""
    return {
        "read_gb_s": read_bandwidth() / 1e9,
        "gemm_fp32_gflop_s": gemm_rate(torch.float32) / 1e9,
        "gemm_bf16_gflop_s": gemm_rate(torch.bfloat16) / 1e9,
        "gemm_int8_gflop_s": int8_gemm_rate() / 1e9,
    }


def layer(shape: LayerShape, dtype: torch.dtype, backward: bool, repeats: int) -> list[Row]:
    """Time our layer, transformers' two backends, and a dense SwiGLU of equal active FLOPs, which is the limit.

    Raises:
        AssertionError: a contender computes something else than ours.
    """
    torch.manual_seed(0)
    ours = MoE(_config(shape)).to(dtype)
    layers: dict[str, nn.Module] = {
        "dense (limit)": DenseMLP(shape.hidden_size, shape.intermediate_size * shape.top_k).to(dtype),
        "moekit": ours,
        "transformers grouped_mm": transformers_layer(ours, "grouped_mm"),
        "transformers eager": transformers_layer(ours, "eager"),
    }
    x = torch.randn(1, shape.tokens, shape.hidden_size).to(dtype).requires_grad_(backward)
    _check_agreement(layers, x)
    seconds = interleaved({name: _step(module, x, backward) for name, module in layers.items()}, repeats)
    return _rows(seconds, f"{_pass(dtype, backward)}, {shape}", shape, backward)


def experts(shape: LayerShape, counts: Sequence[int], dtype: torch.dtype, backward: bool, repeats: int) -> list[Row]:
    """Time our layer with more and more experts of which each token takes equally many: the FLOPs stay the same.

    As in a training (`freed_memory_kept`), memory of one step serves the next.
    """
    torch.manual_seed(0)
    x = torch.randn(1, shape.tokens, shape.hidden_size).to(dtype).requires_grad_(backward)
    layers = {
        f"{count} experts": MoE(_config(dataclasses.replace(shape, num_experts=count))).to(dtype) for count in counts
    }
    with freed_memory_kept():
        seconds = interleaved({name: _step(module, x, backward) for name, module in layers.items()}, repeats)
    what = f"{_pass(dtype, backward)}, hidden {shape.hidden_size}, width {shape.intermediate_size}, "
    return _rows(seconds, f"{what}top-{shape.top_k} of more and more experts, {shape.tokens} tokens", shape, backward)


def _rows(seconds: Mapping[str, float], what: str, shape: LayerShape, backward: bool) -> list[Row]:
    flops = (3 if backward else 1) * 6 * shape.tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
    first = next(iter(seconds.values()))
    return [Row(what, who, 1e3 * took, flops / took / 1e9, first / took) for who, took in seconds.items()]


def _pass(dtype: torch.dtype, backward: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'forward + backward' if backward else 'forward'}"


def _config(shape: LayerShape) -> MoEConfig:
    return MoEConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
    )


def _output(module: nn.Module, x: Tensor) -> Tensor:
    result = module(x)
    y: Tensor = result[0] if isinstance(result, tuple) else result
    return y


def _step(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    def run() -> None:
        if not backward:
            with torch.inference_mode():
                _output(module, x)
            return
        module.zero_grad(set_to_none=True)
        x.grad = None
        y = _output(module, x)
        y.backward(torch.ones_like(y))

    return run


def _check_agreement(layers: dict[str, nn.Module], x: Tensor) -> None:
    """A faster layer that computes something else is no faster layer."""
    with torch.inference_mode():
        outputs = {name: _output(module, x).float() for name, module in layers.items() if "dense" not in name}
    expected = outputs["transformers eager"]
    for name, output in outputs.items():
        # bf16: router logits differ in the last bit between fp32 and bf16 products, so a few tokens change expert.
        off = (output - expected).norm() / expected.norm()
        assert off < (1e-4 if x.dtype == torch.float32 else 0.1), f"{name} disagrees by {off:.1e}"
