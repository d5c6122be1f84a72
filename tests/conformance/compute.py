"""Traps 22 to 27: computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.adapter import Adapter, Layer, Parts, Shape
from conformance.judge import Check, Measured, each, off
from tolerances import rel

TWIN = rel("fp32 twin")

SHAPES = {
    "2 sequences of 9": (Shape(), (2, 9)),
    "no token": (Shape(), (1, 0)),
    "one token": (Shape(), (1, 1)),
    "one expert": (Shape(experts=1, top_k=1), (1, 9)),
    "K = E": (Shape(experts=4, top_k=4), (1, 9)),
    "more experts than tokens": (Shape(experts=64), (1, 5)),
    "sizes not multiples of 8": (Shape(hidden=13, inner=7, experts=5, top_k=3), (1, 11)),
    "2F = D": (Shape(hidden=16, inner=8), (1, 9)),
    "F = D": (Shape(hidden=16, inner=16), (1, 9)),
}


def plain(parts: Parts, x_BLD: Tensor, top_k: int) -> Tensor:
    """Token by token: softmax over the K highest logits, y = Σ w · down · (silu(gate · x) ⊙ up · x)."""
    rows = []
    for x_D in x_BLD.flatten(0, 1):
        values_K, ids_K = (parts.gate_ED @ x_D).topk(top_k)
        y_D = torch.zeros_like(x_D)
        for weight, expert in zip(values_K.softmax(0), ids_K.tolist(), strict=True):
            gate_F, up_F = (parts.gate_up_EGD[expert] @ x_D).chunk(2)
            y_D = y_D + weight * (parts.down_EDF[expert] @ (F.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows).view(x_BLD.shape) if rows else x_BLD * parts.gate_ED.sum()


def compare(layer: Layer, x_BLD: Tensor, top_k: int) -> float:
    """The worst of output and all gradients, beside `plain` in fp64."""
    x_BLD.requires_grad_()
    parameters = [x_BLD, *layer.module.parameters()]
    y_BLD = layer.run(x_BLD)
    seed_BLD = torch.randn(y_BLD.shape, dtype=y_BLD.dtype)
    got = torch.autograd.grad((y_BLD * seed_BLD).sum(), parameters)
    wide = Parts(*(part.double() for part in layer.parts()))
    want_BLD = plain(wide, x_BLD.double(), top_k)
    want = torch.autograd.grad((want_BLD * seed_BLD).sum(), parameters, allow_unused=True)
    pairs = [(g, torch.zeros_like(g) if w is None else w) for g, w in zip(got, want, strict=True)]
    return max(off(y_BLD, want_BLD), *(off(g, w) for g, w in pairs))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def each_backend(adapter: Adapter, measure: Callable[[str], float]) -> Measured:
    return each(adapter.backends, measure)


def trap_22(adapter: Adapter) -> Iterator[Check]:
    limit = rel(adapter.layer_tolerance)

    def at(shape: Shape, size: tuple[int, int]) -> Measured:
        return each_backend(
            adapter,
            lambda backend: compare(
                adapter.layer(shape, backend=backend), torch.randn(*size, shape.hidden), shape.top_k
            ),
        )

    def all_to_one() -> Measured:
        def measure(backend: str) -> float:
            row_D = torch.randn(16)
            return compare(adapter.layer(Shape(), backend=backend), row_D.repeat(1, 9, 1), 2)

        return each_backend(adapter, measure)

    def strided() -> Measured:
        def measure(backend: str) -> float:
            return compare(adapter.layer(Shape(), backend=backend), torch.randn(1, 16, 9).mT, 2)

        return each_backend(adapter, measure)

    def gradcheck() -> float:
        def measure(backend: str) -> float:
            layer = adapter.layer(Shape(hidden=4, inner=3, experts=3), torch.float64, backend)
            x_BLD = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
            return float(not torch.autograd.gradcheck(layer.run, (x_BLD,), raise_exception=False))

        return measure(adapter.backends[0])

    for name, (shape, size) in SHAPES.items():
        yield Check(f"output and every gradient beside a loop in fp64: {name}", lambda s=shape, n=size: at(s, n), limit)
    yield Check("the same: all tokens to the same experts", all_to_one, limit)
    yield Check("the same: non-contiguous input", strided, limit)
    yield Check("gradcheck of the first backend in fp64", gradcheck)


def trap_23(adapter: Adapter) -> Iterator[Check]:
    def empty(tokens: int) -> Measured:
        def measure(backend: str) -> float:
            layer = adapter.layer(Shape(experts=8), backend=backend)
            with poisoned():
                layer.run(torch.randn(1, 1, 16).repeat(1, tokens, 1)).square().sum().backward()
            grads = {name: p.grad for name, p in layer.module.named_parameters() if p.ndim == 3}
            assert grads
            if any(grad is None for grad in grads.values()):
                return float("inf")
            used_E = torch.stack([grad.flatten(1).abs().sum(1) for grad in grads.values()])
            idle = used_E.sort(dim=1).values[:, :6] if tokens else used_E  # two of eight experts work
            return idle.abs().max().item() if used_E.isfinite().all() else float("inf")

        return each_backend(adapter, measure)

    yield Check("two of eight experts used: the others' gradients are exactly 0", lambda: empty(9))
    yield Check("no token at all: every expert's gradient is exactly 0", lambda: empty(0))


def trap_24(adapter: Adapter) -> Iterator[Check]:
    def tail() -> Measured:
        with poisoned():
            return adapter.poisoned_tail()

    yield Check("NaN past the last expert's rows reaches no output and no gradient", tail, TWIN)


def trap_25(adapter: Adapter) -> Iterator[Check]:
    def weighed() -> float:
        run, weights, experts, hidden = adapter.down_biased()
        x_BLD, bias_ED = torch.randn(1, 9, hidden), torch.randn(experts, hidden)
        added_BLD = run(x_BLD, bias_ED) - run(x_BLD, torch.zeros_like(bias_ED))
        return off(added_BLD[0], weights(x_BLD) @ bias_ED)

    yield Check("a token gets Σ weight · bias of its experts", weighed, rel(adapter.layer_tolerance))


def trap_26(adapter: Adapter) -> Iterator[Check]:
    def repeated(dtype: torch.dtype) -> Measured:
        def measure(backend: str) -> float:
            layer, x_BLD = adapter.layer(Shape(experts=8, top_k=4), dtype, backend), torch.randn(2, 20, 16).to(dtype)
            first_BLD = layer.run(x_BLD)
            return max((layer.run(x_BLD) - first_BLD).abs().max().item() for _ in range(4))

        return each_backend(adapter, measure)

    def alone() -> Measured:
        def measure(backend: str) -> float:
            layer, x_BLD = adapter.layer(Shape(experts=8, top_k=4), backend=backend), torch.randn(3, 7, 16)
            return off(torch.cat([layer.run(one_BLD) for one_BLD in x_BLD.split(1)]), layer.run(x_BLD))

        return each_backend(adapter, measure)

    yield Check("the same bits every time, fp32", lambda: repeated(torch.float32))
    yield Check("the same bits every time, bf16", lambda: repeated(torch.bfloat16))
    yield Check("a sequence alone and in a batch", alone, rel(adapter.layer_tolerance))


def trap_27(adapter: Adapter) -> Iterator[Check]:
    def kept() -> float:
        changed = 0
        for made in adapter.dtype_layers().values():
            module, x_BLD = made()
            before = {name: parameter.dtype for name, parameter in module.named_parameters()}
            y = module(x_BLD)
            (y[0] if isinstance(y, tuple) else y).float().sum().backward()
            changed += sum(parameter.dtype != before[name] for name, parameter in module.named_parameters())
        return float(changed)

    def fp32() -> Measured:
        return each_backend(
            adapter, lambda backend: compare(adapter.layer(Shape(), backend=backend), torch.randn(1, 9, 16), 2)
        )

    yield Check("no parameter of a bf16 layer changes dtype in a training step (number that do)", kept)
    yield Check("fp32 experts compute in fp32", fp32, TWIN)


TRAPS = {
    22: ("Every backend, every size", trap_22),
    23: ("Experts without tokens", trap_23),
    24: ("Rows that belong to nobody", trap_24),
    25: ("The down-projection's bias", trap_25),
    26: ("Bitwise repeatable", trap_26),
    27: ("Parameters keep their dtype", trap_27),
}
