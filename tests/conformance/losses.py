"""Traps 1 to 10: losses. Every right answer here is the published equation, written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from conformance.adapter import MODES, Adapter
from conformance.judge import Check, Measured, each, off
from tolerances import rel

FP32 = rel("fp32 scalar")
GRADIENTS = rel("fp32 gradients")


def definition(probs_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """E / (K T²) Σ_i c_i Σ_t p_ti (2101.03961 eq 4–6 for K ≥ 1); counts without gradient."""
    counts_E = chosen_TE.sum(0).to(probs_TE.dtype)
    return probs_TE.shape[1] * (counts_E / counts_E.sum() * probs_TE.mean(0)).sum()


def top(logits_TE: Tensor, top_k: int) -> Tensor:
    """bool (T, E): the K highest."""
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, logits_TE.topk(top_k).indices, True)


def uniform() -> Tensor:
    """(8, 4) logits whose probabilities and top-2 counts are exactly uniform over the experts."""
    row_E = torch.tensor([3.0, 2.0, 0.0, -1.0])
    return torch.stack([row_E.roll(token) for token in range(8)])


def collapsed(expert: int, experts: int) -> Tensor:
    """(8, E) logits that leave no doubt."""
    return 200.0 * torch.nn.functional.one_hot(torch.full((8,), expert), experts).float()


def padded(real_T: Tensor, garbage: float) -> tuple[Tensor, Tensor]:
    """The rows among as many rows of garbage, and the mask of the real ones."""
    shape = (2 * real_T.shape[0], real_T.shape[1])
    mask_T = torch.arange(shape[0]) % 2 == 0
    rows_T = (garbage * torch.randn(shape)).to(real_T.dtype)
    return rows_T.masked_scatter(mask_T.unsqueeze(1), real_T), mask_T


def trap_01(adapter: Adapter) -> Iterator[Check]:
    yield Check(
        "uniform counts and probabilities give 1", lambda: abs(adapter.balance_loss([uniform()], 2).item() - 1), FP32
    )
    yield Check(
        "everything to one expert, K = 1, gives E",
        lambda: abs(adapter.balance_loss([collapsed(2, 4)], 1).item() - 4),
        FP32,
    )

    def converted() -> float:
        logits_TE = torch.randn(40, 6)
        values = [
            adapter.balance_loss([logits_TE], k).item() / adapter.balance_factor(k)
            - definition(logits_TE.softmax(1), top(logits_TE, k)).item()
            for k in (1, 2, 4)
        ]
        return max(map(abs, values))

    yield Check("equals the definition after the stated factor", converted, FP32)


def trap_02(adapter: Adapter) -> Iterator[Check]:
    yield Check(
        "two layers collapsed on different experts, E = 2, K = 1, give 2",
        lambda: abs(adapter.balance_loss([collapsed(0, 2), collapsed(1, 2)], 1).item() - 2),
        FP32,
    )


def trap_03(adapter: Adapter) -> Iterator[Check]:
    def balance() -> float:
        real_TE = torch.randn(9, 6)
        rows_TE, mask_T = padded(real_TE, 100.0)
        return abs((adapter.balance_loss([rows_TE], 2, mask_T) - adapter.balance_loss([real_TE], 2)).item())

    def gradient() -> float:
        real_TE = torch.randn(9, 6, requires_grad=True)
        rows_TE, mask_T = padded(real_TE.detach(), 100.0)
        (want_TE,) = torch.autograd.grad(adapter.balance_loss([real_TE], 2), real_TE)
        (got_TE,) = torch.autograd.grad(adapter.balance_loss([rows_TE.requires_grad_()], 2, mask_T), rows_TE)
        return max(off(got_TE[mask_T], want_TE), got_TE[~mask_T].abs().max().item())

    def z_value() -> float:
        real_TE = torch.randn(9, 6)
        rows_TE, mask_T = padded(real_TE, 100.0)
        return off(adapter.z_loss(rows_TE, mask_T), adapter.z_loss(real_TE))

    def nothing_real() -> float:
        loss = adapter.balance_loss([torch.randn(4, 6)], 2, torch.zeros(4, dtype=torch.bool))
        return 0.0 if loss.isfinite() else float("inf")

    def room() -> float:
        real_TD, gate_ED = torch.randn(9, 16), torch.randn(4, 16)
        rows_TD, mask_T = padded(real_TD, 100.0)
        want = adapter.route("capacity", real_TD, gate_ED, 1, rows=2)
        got = adapter.route("capacity", rows_TD, gate_ED, 1, rows=2, mask_T=mask_T)
        return (got.chosen_TE[mask_T] != want.chosen_TE).float().sum().item()

    yield Check("balance loss unchanged by padding", balance, FP32)
    yield Check("its gradient unchanged, and 0 on padding", gradient, FP32)
    yield Check("z-loss unchanged by padding", z_value, FP32)
    yield Check("a batch of padding alone gives a number", nothing_real)
    yield Check("padding takes no capacity (tokens that lose or gain an expert)", room)


def trap_04(adapter: Adapter) -> Iterator[Check]:
    def by_loop(interleaved: bool) -> float:
        logits_TE, sequence_T = torch.randn(23, 6), torch.tensor([0] * 3 + [1] * 13 + [2] * 7)
        if interleaved:
            sequence_T = sequence_T[torch.randperm(23)]
        mask_T = torch.rand(23) > 0.3
        losses = []
        for sequence in range(3):
            rows_TE = logits_TE[mask_T & (sequence_T == sequence)]
            losses.append(definition(rows_TE.softmax(1), top(rows_TE, 2)).item())
        got = adapter.sequence_loss(logits_TE, sequence_T, 2, mask_T).item()
        return abs(got - sum(losses) / 3)

    yield Check("unequal lengths, with padding: the mean of a loop over sequences", lambda: by_loop(False), FP32)
    yield Check("packed in any order: the same", lambda: by_loop(True), FP32)


def trap_05(adapter: Adapter) -> Iterator[Check]:
    def biased() -> float:
        # What a bias is for: two experts that all tokens prefer, and a bias that sends most of them elsewhere.
        favour_E = torch.tensor([2.0, 2.0, 0, 0, 0, 0])
        logits_TE, bias_E = torch.randn(40, 6) + favour_E, -0.3 * favour_E
        loss, probs_TE, chosen_TE = adapter.biased_balance(logits_TE, bias_E, 2)
        return abs(loss.item() / adapter.balance_factor(2) - definition(probs_TE, chosen_TE).item())

    def limited(count: str) -> float:
        logits_TE = torch.randn(24, 4)
        chosen_TE = top(logits_TE, 1)
        kept_TE = chosen_TE & (chosen_TE.cumsum(0) <= 3)
        want = definition(logits_TE.softmax(1), kept_TE if count == "kept" else chosen_TE)
        return abs((adapter.limited_balance(logits_TE, 3, count) - want).item())

    yield Check("with a selection bias, f counts the experts that were used", biased, FP32)
    yield Check("with a capacity, f can count what was chosen", lambda: limited("chosen"), FP32)
    yield Check("with a capacity, f can count what was kept", lambda: limited("kept"), FP32)


def trap_06(adapter: Adapter) -> Iterator[Check]:
    def gradient() -> float:
        logits_TE = (4 * torch.randn(9, 6)).requires_grad_()
        (got_TE,) = torch.autograd.grad(adapter.z_loss(logits_TE), logits_TE)
        lse_T1 = logits_TE.logsumexp(1, keepdim=True)
        return off(got_TE, 2 * lse_T1 * logits_TE.softmax(1) / 9)

    def value() -> float:
        logits_TE = 4 * torch.randn(9, 6)
        return off(adapter.z_loss(logits_TE), logits_TE.logsumexp(1).square().mean())

    def narrow() -> float:
        x_TD, gate_ED = torch.randn(64, 16).bfloat16(), torch.randn(6, 16).bfloat16()
        want = (x_TD.double() @ gate_ED.double().T).logsumexp(1).square().mean()
        return off(adapter.z_loss(adapter.z_logits(x_TD, gate_ED)), want)

    yield Check("value: mean of logsumexp²", value, FP32)
    yield Check("gradient: 2 · lse · softmax / T", gradient, GRADIENTS)
    yield Check("in fp32 for a bf16 model", narrow, FP32)


def trap_07(adapter: Adapter) -> Iterator[Check]:
    def cut(*sizes: int) -> float:
        logits_TE = torch.randn(24, 6)
        want = definition(logits_TE.softmax(1), top(logits_TE, 2))
        return abs((adapter.global_loss(list(logits_TE.split(list(sizes))), 2) - want).item())

    yield Check("in equal micro-batches: the loss of the whole", lambda: cut(8, 8, 8), FP32)
    yield Check("in unequal micro-batches: the loss of the whole", lambda: cut(3, 20, 1), FP32)


def trap_08(adapter: Adapter) -> Iterator[Check]:
    coef = 0.5

    def flows(mode: str, micro_batches: int = 1, scaled: bool = False) -> float:
        options = {"micro_batches": micro_batches, "scaled": scaled}
        with_loss, without = (adapter.trained(c, mode, **options) for c in (coef, 0.0))
        want = adapter.aux_gradients(mode, micro_batches)
        assert all(gradient.abs().max() > 0 for gradient in want.values())
        return max(off(with_loss[name] - without[name], coef * want[name]) for name in want)

    for mode in MODES:
        yield Check(f"grad(α) − grad(0) = α · ∂L/∂W, checkpointing {mode}", lambda mode=mode: flows(mode), GRADIENTS)
    yield Check("the same over two micro-batches", lambda: flows("none", micro_batches=2), GRADIENTS)
    yield Check("the same through a GradScaler", lambda: flows("none", scaled=True), GRADIENTS)


def trap_09(adapter: Adapter) -> Iterator[Check]:
    def gradient() -> float:
        logits_TE = torch.randn(9, 6, requires_grad=True)
        (got_TE,) = torch.autograd.grad(adapter.balance_loss([logits_TE], 2), logits_TE)
        (want_TE,) = torch.autograd.grad(definition(logits_TE.softmax(1), top(logits_TE, 2)), logits_TE)
        return off(got_TE / adapter.balance_factor(2), want_TE)

    yield Check("the gradient is that of P alone", gradient, GRADIENTS)


def trap_10(adapter: Adapter) -> Iterator[Check]:
    def one_softmax() -> Measured:
        inputs = adapter.loss_inputs(torch.randn(9, 16), torch.randn(6, 16))
        return each(inputs, lambda name: off(*inputs[name]))

    yield Check("the loss softmaxes logits, not probabilities", one_softmax, GRADIENTS)
    yield Check("a coefficient whose loss is off is mentioned", lambda: float(not adapter.says_switched_off()))
    yield Check("the same value on any number of processes", adapter.several_processes)


TRAPS = {
    1: ("The balance loss is 1 at balance, for any K", trap_01),
    2: ("It is a mean over layers, not of pooled tokens", trap_02),
    3: ("Padding changes nothing", trap_03),
    4: ("Sequence-wise loss, lengths unequal or packed", trap_04),
    5: ("f counts the routing that it says", trap_05),
    6: ("z-loss, value and gradient, in fp32", trap_06),
    7: ("Global-batch loss, however the batch is cut", trap_07),
    8: ("The auxiliary gradient flows, once", trap_08),
    9: ("Counts have no gradient, probabilities have", trap_09),
    10: ("One softmax, any world size, never silently off", trap_10),
}
