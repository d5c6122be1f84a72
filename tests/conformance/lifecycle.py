"""Traps 28 to 38: several processes, and the life of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.adapter import Adapter, Shape
from conformance.judge import Absent, Check, each, off
from tolerances import rel

TWIN = rel("fp32 twin")
MODEL = rel("fp32 model")


def trap_28(adapter: Adapter) -> Iterator[Check]:
    yield Check("EP = n equals EP = 1: loss, gradients, clipped update", adapter.several_processes)


def trap_29(adapter: Adapter) -> Iterator[Check]:
    yield Check("the global norm counts each expert once", adapter.several_processes)


def trap_30(adapter: Adapter) -> Iterator[Check]:
    yield Check("backward swaps the splits; compression has a bound; overlap changes no bit", adapter.several_processes)


def trap_31(adapter: Adapter) -> Iterator[Check]:
    yield Check("saved at EP = a, loaded at EP = b, a missing expert fails", adapter.several_processes)


def trap_32(adapter: Adapter) -> Iterator[Check]:
    for form in ("copy", "split", "copy, weights not normalised", "split, weights not normalised"):
        yield Check(
            f"{form}: the dense model's logits", lambda form=form: off(*reversed(adapter.upcycled(form))), MODEL
        )

    def redrawn() -> float:
        dense_FD, expert_FD = adapter.drop_upcycled(0.25)
        return abs((dense_FD != expert_FD).any(1).float().mean().item() - 0.25)

    def statistics() -> float:
        dense_FD, expert_FD = adapter.drop_upcycled(1.0)
        return max(abs(expert_FD.std().item() / dense_FD.std().item() - 1), abs((expert_FD - dense_FD).mean().item()))

    yield Check("drop: the stated part of the inner units is drawn anew", redrawn)
    yield Check("drop: from the mean and deviation of what they replace", statistics, rel("standard deviation of many"))


def trap_33(adapter: Adapter) -> Iterator[Check]:
    yield Check("new experts that start at −∞ change nothing", lambda: off(*reversed(adapter.grown())), TWIN)
    yield Check("removing a never-used expert changes nothing", lambda: off(*reversed(adapter.pruned())), TWIN)
    yield Check("REAP saliency: mean of gate × output norm", lambda: off(*adapter.saliency()), TWIN)


def trap_34(adapter: Adapter) -> Iterator[Check]:
    both = ("gate_up_proj", "down_proj")
    cases = {
        "r ≠ E": (Shape(experts=4), 3, False, both),
        "r = E": (Shape(experts=4), 4, False, both),
        "2F = D": (Shape(hidden=16, inner=8, experts=4), 2, False, both),
        "E = 1": (Shape(experts=1, top_k=1), 3, False, both),
        "stored transposed": (Shape(experts=4), 3, True, both),
        "stored transposed, E = 1": (Shape(hidden=16, inner=12, experts=1, top_k=1), 3, True, both),
        "stored transposed, E = 1, square": (Shape(hidden=16, inner=8, experts=1, top_k=1), 3, True, both[:1]),
    }

    def equal(shape: Shape, rank: int, transposed: bool, stacks: tuple[str, ...]) -> float:
        case = adapter.lora(shape, rank, transposed=transposed, stacks=stacks)
        return max(off(other, case.expected) for other in (case.unmerged, case.merged, case.reloaded))

    for name, given in cases.items():
        yield Check(f"unmerged = merged = reloaded = W + s·BA, {name}", lambda given=given: equal(*given), MODEL)
    yield Check('"all MLPs" says so if the experts get no adapter', lambda: float(not adapter.says_experts_frozen()))


def trap_35(adapter: Adapter) -> Iterator[Check]:
    yield Check("the expert bytes covered are reported, none skipped silently", adapter.quantised)


def trap_36(adapter: Adapter) -> Iterator[Check]:
    def other_choice(mode: str, backend: str) -> float:
        """Experts that were used in forward and have no gradient, or the reverse."""
        layer = adapter.layer(Shape(experts=64), backend=backend)
        calls: list[int] = []

        def differ(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # What another kernel or another order of sums does to a near tie, made large enough to see.
            calls.append(1)
            noise_TD = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(len(calls)))
            return (args[0] + (2 * noise_TD if len(calls) > 1 else 0), *args[1:])

        handle = layer.router.register_forward_pre_hook(differ)
        x_BLD = torch.randn(1, 24, 16).requires_grad_()
        used_E = torch.zeros(64, dtype=torch.bool)
        used_E[(x_BLD[0] @ layer.parts().gate_ED.T).topk(2).indices.flatten()] = True
        run = adapter.recomputing(layer)
        y_BLD = checkpoint(run, x_BLD, use_reentrant=mode == "reentrant", preserve_rng_state=False)
        y_BLD.square().sum().backward()
        handle.remove()
        assert len(calls) > 1, "nothing was recomputed"
        stack = next(p for p in layer.module.parameters() if p.ndim == 3)
        return float((stack.grad.flatten(1).any(1) != used_E).sum())

    for mode in ("non-reentrant", "reentrant"):
        yield Check(
            f"scores that differ in the second forward change no choice, {mode} (experts that differ)",
            lambda mode=mode: each(adapter.backends, lambda backend: other_choice(mode, backend)),
        )


def trap_37(adapter: Adapter) -> Iterator[Check]:
    def counted(which: int) -> float:
        said, by_hand = adapter.parameter_counts()
        if said[which] is None:
            raise Absent("it counts all parameters only")
        return float(abs(said[which] - by_hand[which]))

    yield Check("total parameters", lambda: counted(0))
    yield Check("active parameters: router and shared experts once, K of E experts", lambda: counted(1))


def trap_38(adapter: Adapter) -> Iterator[Check]:
    yield Check("Muon on a stack of experts equals a loop over them", adapter.muon)
    yield Check("weight decay leaves the selection bias alone", lambda: float(len(adapter.decayed())))


TRAPS = {
    28: ("Expert parallelism changes no number", trap_28),
    29: ("The global gradient norm", trap_29),
    30: ("The exchange between processes", trap_30),
    31: ("Checkpoints across layouts", trap_31),
    32: ("Upcycling keeps the dense model", trap_32),
    33: ("Growing and pruning", trap_33),
    34: ("LoRA on experts", trap_34),
    35: ("Quantising reaches the experts", trap_35),
    36: ("Recomputation uses the stored choice", trap_36),
    37: ("Parameters are counted once", trap_37),
    38: ("Muon and weight decay", trap_38),
}
