"""Routings kept through checkpointing: counted once, and a router loss reaches the router once, in both modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moekit import losses
from moekit.adapt import routings, to_moe
from moekit.adapt.drop_in import DropIn
from moekit.adapt.surgery import after_step
from moekit.config import CapacityConfig, SurgeryConfig
from moekit.errors import UnsupportedError
from tolerances import near

MODES = ["none", "non-reentrant", "reentrant"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Dropout(0.2))

    def forward(self, x):
        x = x + self.mlp(self.norm(x))
        return x + self.mlp(self.norm(x)) if self.twice else x

    twice = False


class Stack(nn.Module):
    def __init__(self, mode: str, twice: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.mode = mode
        for block in self.blocks:
            block.twice = twice

    def forward(self, x):
        for block in self.blocks:
            if self.mode == "none" or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


def stack(mode: str, twice: bool = False, **settings) -> Stack:
    torch.manual_seed(0)
    config = SurgeryConfig(num_experts=4, top_k=2, router_init_scale=4.0, **settings)
    return to_moe(Stack(mode, twice).double(), "blocks.*.mlp", config).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def router_loss(model: nn.Module) -> torch.Tensor:
    """Every tensor of a routing that a loss can be made of."""
    kept = routings(model)
    total = losses.load_balancing(kept) + 0.1 * losses.z_loss(kept) + losses.importance(kept)
    return total + losses.load(kept) if kept[0].load_TE is not None else total


def run(mode: str, coefficient: float, *, twice: bool = False, passes: int = 1, **settings) -> tuple[Stack, list]:
    model = stack(mode, twice, **settings)
    torch.manual_seed(1)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    total, counts = torch.zeros(()), []
    for number in range(passes):
        y = model(x * (number + 1))
        total = total + y.square().mean()
        counts += [routing.counts_E.tolist() for routing in routings(model)]
        if coefficient:
            total = total + coefficient * router_loss(model)
    total.backward()
    return model, counts


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "noisy_topk"},
        {"router": "gumbel"},
        {"capacity": CapacityConfig(tokens=6)},
        {"twice": True},
        {"passes": 2},
        {"twice": True, "passes": 2, "router": "noisy_topk"},
    ],
    ids=str,
)
def test_every_gradient_is_that_without_checkpointing(mode, settings):
    plain, counts = run("none", 0.3, **settings)
    model, again = run(mode, 0.3, **settings)
    assert counts == again
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(plain)[name], **near("fp64"), msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_the_router_loss_flows_once(mode):
    """grad(α) − grad(0) = α · ∂L/∂W, with L differentiated on its own."""
    with_loss, without = gradients(run(mode, 0.3)[0]), gradients(run(mode, 0.0)[0])
    model = stack("none")
    torch.manual_seed(1)
    model(torch.randn(2, 9, 8, dtype=torch.float64))
    parameters = dict(model.named_parameters())
    alone = torch.autograd.grad(router_loss(model), list(parameters.values()), allow_unused=True)
    for name, grad in zip(parameters, alone, strict=True):
        want = torch.zeros_like(parameters[name]) if grad is None else 0.3 * grad
        torch.testing.assert_close(with_loss[name] - without[name], want, **near("fp64"), msg=name)
    assert alone[list(parameters).index("blocks.0.mlp.moe.router.weight")].abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
def test_scaling_the_loss_scales_the_router_loss_too(mode):
    """As a GradScaler or a division by accumulation steps does."""
    model, _ = run(mode, 0.3)
    scaled = stack(mode)
    torch.manual_seed(1)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    loss = scaled(x).square().mean()
    (1024 * (loss + 0.3 * router_loss(scaled))).backward()
    for name, grad in gradients(scaled).items():
        torch.testing.assert_close(grad / 1024, gradients(model)[name], **near("fp64"), msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_totals_count_every_micro_batch_once(mode):
    model = stack(mode, router="sigmoid", norm_topk_prob=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    bias = model.blocks[0].mlp.moe.router.selection_bias
    for _ in range(3):
        model(x).sum().backward()
    with torch.no_grad():
        model.eval()(x)  # not training: not counted
    layer = model.train().blocks[0].mlp
    assert layer._totals.tokens == 3 * 18
    counts = layer._totals.chosen_E
    assert counts.sum() == 2 * 3 * 18
    after_step(model)
    expected = 0.001 * (counts.float().mean() - counts).sign()
    assert torch.equal(bias, expected.float())
    after_step(model)  # nothing was routed since
    assert torch.equal(bias, expected.float())


def test_a_pass_in_between_does_not_take_the_debt():
    """Reentrant: the routings of a pass without graph (a reference model's, say) stand beside those of training."""
    plain, model = stack("none"), stack("reentrant")
    for one in (plain, model):
        torch.manual_seed(1)
        x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
        loss = one(x).square().mean() + router_loss(one)
        with torch.no_grad(), torch.random.fork_rng():
            one(x + 1)
        loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(plain)[name], **near("fp64"), msg=name)


def test_a_router_loss_that_comes_too_late_is_an_error_not_a_silence():
    model = stack("reentrant")
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    loss = model(x).sum()
    balance = losses.load_balancing(routings(model))
    loss.backward()
    balance.backward()
    with pytest.raises(UnsupportedError, match="add it to the model's loss and call backward once"):
        model(x)
    for layer in model.modules():
        if isinstance(layer, DropIn):
            layer._debts.clear()
    model(x)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_pass_is_kept_beyond_the_next(mode):
    model = stack(mode)
    for _ in range(3):
        loss = model(torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)).sum()
        (loss + router_loss(model)).backward()
        assert [len(block.mlp.routings) for block in model.blocks] == [1, 1, 1]
        assert all(not block.mlp._debts for block in model.blocks)
