"""The gradient of a router loss reaches the gate, once: recomputed, accumulated, in 16 bit; and over a whole batch."""

from __future__ import annotations

import pytest
import torch
from routings import EVERY_LOSS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moekit import MoE, MoEConfig, losses
from moekit.moe import RoutingRecord, RoutingTotals
from tolerances import near, rel

IDS_T = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0])
ALPHA = 0.5


def make(dtype: torch.dtype = torch.float64, **changes: object) -> MoE:
    """A layer with every kind of trouble: noise that must be the same in a recomputation, and dropped tokens."""
    settings = {"router": "noisy_topk", "gate_order": "softmax_topk"} | changes
    layer = MoE(MoEConfig(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2, **settings)).to(dtype)
    with torch.no_grad():  # noise rows that are not 0, so that they are told apart
        layer.router.weight.normal_()
    return layer


def auxiliary(routing) -> Tensor:
    """All losses together."""
    return sum(loss(routing, IDS_T) for loss in EVERY_LOSS.values())


def forward(layer: MoE, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """A main loss and the auxiliary one."""
    torch.manual_seed(3)  # the noise
    if mode == "kept":
        y, routing = layer(x)
    elif mode == "recomputed":
        y, routing = checkpoint(RoutingRecord().wrap(layer), x, use_reentrant=False, preserve_rng_state=False)
    else:  # a reentrant checkpoint hands out tensors alone, so the loss is computed inside
        y, aux = checkpoint(
            RoutingRecord().wrap(lambda x: _with_loss(layer, x)), x, use_reentrant=True, preserve_rng_state=False
        )
        return y.sin().sum(), aux
    return y.sin().sum(), auxiliary(routing)


def _with_loss(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    y, routing = layer(x)
    return y, auxiliary(routing)


def gradients_of(layer: MoE, total: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("mode", ["kept", "recomputed", "recomputed, reentrant"])
def test_the_gradient_of_the_loss_is_added_once(mode):
    layer = make()
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    _, aux = forward(layer, x, "kept")
    wanted = torch.autograd.grad(aux, layer.router.weight)[0]
    grads = {}
    for alpha in (0.0, ALPHA):
        main, aux = forward(layer, x, mode)
        grads[alpha] = gradients_of(layer, main + alpha * aux)
    assert (wanted != 0).all()
    for name, without in grads[0.0].items():
        difference = grads[ALPHA][name] - without
        if name == "router.weight":
            torch.testing.assert_close(difference, ALPHA * wanted, **near("fp64"))
        else:
            assert (difference == 0).all(), name


@pytest.mark.parametrize("mode", ["kept", "recomputed", "recomputed, reentrant"])
def test_recomputation_changes_no_gradient(mode):
    layer = make()
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    main, aux = forward(layer, x, "kept")
    wanted = gradients_of(layer, main + ALPHA * aux)
    main, aux = forward(layer, x, mode)
    for name, grad in gradients_of(layer, main + ALPHA * aux).items():
        torch.testing.assert_close(grad, wanted[name], **near("fp64"))


def test_accumulation_adds_each_micro_batch_once():
    layer = make(router="topk")
    xs = [torch.randn(11, 6, dtype=torch.float64) for _ in range(3)]
    shares = [0.5, 0.3, 0.2]

    def accumulated(alpha: float) -> Tensor:
        layer.zero_grad()
        for x, share in zip(xs, shares, strict=True):
            y, routing = layer(x)
            aux = losses.load_balancing(routing) + losses.z_loss(routing)
            (share * (y.sin().mean() + alpha * aux)).backward()
        return layer.router.weight.grad.clone()

    routings = [layer.router(x) for x in xs]
    aux = sum(s * (losses.load_balancing(r) + losses.z_loss(r)) for s, r in zip(shares, routings, strict=True))
    (wanted,) = torch.autograd.grad(aux, layer.router.weight)
    torch.testing.assert_close(accumulated(ALPHA) - accumulated(0.0), ALPHA * wanted, **near("fp64"))


@pytest.mark.parametrize("name", EVERY_LOSS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_fp32_under_autocast(name, dtype):
    layer = make(torch.float32)
    _, routing = layer(torch.randn(11, 6))
    wanted = EVERY_LOSS[name](routing, IDS_T)
    with torch.autocast("cpu", dtype=dtype):
        got = EVERY_LOSS[name](routing, IDS_T)
    assert got.dtype == torch.float32
    assert got.item() == wanted.item()


def test_the_gradient_is_added_once_under_autocast():
    layer = make(torch.float32)
    x = torch.randn(11, 6, requires_grad=True)
    grads = []
    for alpha in (0.0, ALPHA):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            main, aux = forward(layer, x, "recomputed")
        grads.append(gradients_of(layer, main.float() + alpha * aux)["router.weight"])
    (wanted,) = torch.autograd.grad(forward(layer, x, "kept")[1], layer.router.weight)
    torch.testing.assert_close(grads[1] - grads[0], ALPHA * wanted, **near("fp32 twin"))


@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["loss", "tiny loss"])
def test_loss_scaling_for_fp16_leaves_the_auxiliary_gradient_what_it_is(size):
    """The scale multiplies the sum of the losses, and goes out of both: also where fp16 could not hold the gradient."""
    layer = make(torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    x = torch.randn(11, 6)
    grads = []
    for alpha in (0.0, size):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            main, aux = forward(layer, x, "kept")
        scaler.scale(size * main.float() + alpha * aux).backward()
        scaler.unscale_(optimizer)
        grads.append(layer.router.weight.grad.clone())
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12, "no step was skipped"
    (wanted,) = torch.autograd.grad(forward(layer, x, "kept")[1], layer.router.weight)
    torch.testing.assert_close((grads[1] - grads[0]) / size, wanted, **near("fp32 twin"))


# The balance of a whole batch, however it is cut: conformance traps 7 and 10.

CUTS = {
    "one piece": [24],
    "even": [8, 8, 8],
    "uneven": [1, 17, 6],
    "a rank without a token": [10, 0, 14],
    "token by token": [1] * 24,
}


def batch(masked: bool) -> tuple[list[MoE], Tensor, Tensor | None]:
    """Two gates, the tokens of a batch whose topic changes on the way, and its padding."""
    layers = [make(router="topk") for _ in range(2)]
    x = torch.randn(24, 6, dtype=torch.float64) + 3 * torch.linspace(-1, 1, 24).unsqueeze(1).double()
    return layers, x, torch.arange(24) % 5 > 0 if masked else None


def pieces(x: Tensor, mask_T: Tensor | None, cut: list[int]) -> list[tuple[Tensor, Tensor | None]]:
    masks = [None] * len(cut) if mask_T is None else mask_T.split(cut)
    return list(zip(x.split(cut), masks, strict=True))


def loss_of_pieces(layers: list[MoE], parts: list[tuple[Tensor, Tensor | None]], *, whole: bool) -> Tensor:
    """Σ share · loss, as gradient accumulation and data parallelism add it up."""
    routings = [[layer.router(x, mask_T) for layer in layers] for x, mask_T in parts]
    counts = [sum(part[one].chosen_counts_E for part in routings) for one in range(len(layers))]
    tokens = sum(part[0].real_tokens for part in routings)
    return sum(
        part[0].real_tokens / tokens * losses.load_balancing(part, counts_E=counts if whole else None)
        for part in routings
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_whole_batch_loss_does_not_depend_on_the_cut(cut, masked):
    layers, x, mask_T = batch(masked)
    weights = [layer.router.weight for layer in layers]
    wanted = losses.load_balancing([layer.router(x, mask_T) for layer in layers])
    got = loss_of_pieces(layers, pieces(x, mask_T, cut), whole=True)
    torch.testing.assert_close(got, wanted, **near("fp64 scalar"))
    for gradient, reference in zip(
        torch.autograd.grad(got, weights), torch.autograd.grad(wanted, weights), strict=True
    ):
        torch.testing.assert_close(gradient, reference, **near("fp64"))
    own = loss_of_pieces(layers, pieces(x, mask_T, cut), whole=False).item()
    if cut == [24]:
        assert own == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))
    else:
        # Each piece is less balanced than the whole: its own loss is another one, and a harder one here.
        assert own > wanted.item() * 1.05


def test_group_balance_of_a_whole_batch():
    layers, x, mask_T = batch(True)
    wanted = losses.group_balancing([layer.router(x, mask_T) for layer in layers], 2)
    parts = [[layer.router(*part) for layer in layers] for part in pieces(x, mask_T, [5, 19])]
    counts = [sum(part[one].chosen_counts_E for part in parts) for one in range(2)]
    tokens = sum(part[0].real_tokens for part in parts)
    got = sum(part[0].real_tokens / tokens * losses.group_balancing(part, 2, counts_E=counts) for part in parts)
    torch.testing.assert_close(got, wanted, **near("fp64 scalar"))


def test_counts_so_far_are_divided_by_themselves():
    """A running total of counts needs no number of tokens beside it: micro-batches may be of any size."""
    layers, x, _ = batch(False)
    parts = [layers[0].router(part) for part in x.split([20, 4])]
    totals = RoutingTotals.of(parts[0]) + RoutingTotals.of(parts[1])
    share_E = totals.chosen_E.double() / 48
    wanted = 4 * (share_E * parts[1].probs_TE.mean(0)).sum()
    got = losses.load_balancing(parts[1], counts_E=totals.chosen_E)
    torch.testing.assert_close(got, wanted, **near("fp64 scalar"))
