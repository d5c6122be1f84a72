"""Alarms: silent on healthy runs, raised by sick ones that are really trained, with cause, remedy and the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_training import EXPERTS, tiny_config, tiny_data, tiny_decoder
from transformers import MixtralConfig, MixtralForCausalLM

from moekit.config import CapacityConfig, ExpertGroup, MoEConfig, TrainConfig
from moekit.models.decoder import Decoder
from moekit.moe import MoE, RoutingTotals
from moekit.moe.measures import Drift, Similarity
from moekit.train import RoutingMonitor, StepMetrics, Trainer
from moekit.train.alarms import Alarm, AlarmLimits, Alarms, Memory, RunFacts, Signals
from moekit.train.checks import CHECKS
from moekit.train.health import RunHealth, expert_stacks, moe_layers, router_weights
from tolerances import rel

FACTS = RunFacts(num_experts=8, top_k=2, balance_coef=0.01, lr=1e-3, warmup_steps=5)


class Run:
    """A tiny model, really trained, with a watch on it."""

    def __init__(self, folder: Path, moe: MoEConfig = EXPERTS, *, every: int = 5, **train: object) -> None:
        self.decoder = tiny_decoder(moe=moe)
        settings = {"steps": 40, "lr": 3e-3, "autocast": "none", "save_every": 0}
        self.config = TrainConfig(**(settings | train))
        self.folder, self.every = folder, every
        self.alarms: list[Alarm] = []
        self.metrics: list[StepMetrics] = []

    def train(self, prepare: Callable[[Decoder], object] | None = None) -> dict[str, Alarm]:
        """The alarms by name; the first of each."""
        with torch.no_grad():
            if prepare is not None:
                prepare(self.decoder)
        self.health = RunHealth(self.decoder, self.config, every=self.every)
        trainer = Trainer(self.decoder, tiny_data(self.folder), self.config, self.folder / "run", on_step=self._step)
        self.totals: list[RoutingTotals] = []
        for moe in moe_layers(self.decoder).values():
            moe.register_forward_hook(lambda _, args, output: self.totals.append(RoutingTotals.of(output[1])))
        trainer.run(evaluate=False)
        return {alarm.name: alarm for alarm in reversed(self.alarms)}

    def _step(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)
        self.alarms += self.health.step(metrics, self.totals)
        self.totals = []


def lean(decoder: Decoder) -> None:
    """Give all tokens one common direction, and two experts' router rows the same."""
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    decoder.embed.weight += 0.1 * direction
    for moe in moe_layers(decoder).values():
        assert moe.router.weight is not None
        moe.router.weight[:2] += direction


@pytest.mark.parametrize(
    "moe",
    [
        EXPERTS,
        MoEConfig(hidden_size=16, intermediate_size=4, num_experts=8, top_k=3, router="sigmoid"),
        MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, capacity=CapacityConfig(factor=2.0)),
    ],
    ids=["top 2 of 4", "sigmoid with bias", "capacity"],
)
def test_a_healthy_run_raises_nothing(tmp_path: Path, moe: MoEConfig) -> None:
    run = Run(tmp_path, moe)
    assert run.train() == {}
    assert run.health.alarms.active == {}
    assert [one.layer for one in run.health.drift] == [one.layer for one in run.health.similarity] == [0, 1]
    assert all(0 < one.distance < 0.5 and 0 < one.speed < 0.01 for one in run.health.drift)


def test_watching_changes_no_bit_of_what_is_learned(tmp_path: Path) -> None:
    watched = Run(tmp_path / "a", steps=12, every=1)
    watched.train()
    alone = tiny_decoder()
    seen: list[StepMetrics] = []
    Trainer(alone, tiny_data(tmp_path / "b"), watched.config, tmp_path / "b" / "run", on_step=seen.append).run()
    assert [m.loss for m in seen] == [m.loss for m in watched.metrics]
    for a, b in zip(alone.parameters(), watched.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_too_high_a_learning_rate(tmp_path: Path) -> None:
    found = Run(tmp_path, lr=3.0, warmup_steps=0, steps=30).train()
    blow_up = found["loss_blow_up"]
    assert blow_up.severity == "error"
    assert blow_up.step <= 5
    assert blow_up.evidence["loss"] > 1.3 * blow_up.evidence["best"]
    assert "lower lr (at most 3) or raise warmup_steps (now 0)" in blow_up.remedy
    assert "z_coef" in found["router_saturated"].remedy


def test_a_collapse_without_balance_loss_and_its_cure(tmp_path: Path) -> None:
    found = Run(tmp_path / "sick", balance_coef=0.0, steps=25).train(lean)
    collapse = found["collapse"]
    assert (collapse.severity, collapse.layer, set(collapse.experts)) == ("error", 0, {0, 1})
    assert collapse.evidence["effective_experts"] == pytest.approx(2, abs=0.2)
    assert "no balance loss is on" in collapse.cause
    assert collapse.remedy == "set balance_coef 0.01"
    assert str(collapse).startswith("step 20: collapse in layer 0 (experts ")
    cured = Run(tmp_path / "cured", balance_coef=0.1, router_lr_scale=1.0)
    assert cured.train(lean) == {}


def test_a_balance_loss_that_is_too_weak(tmp_path: Path) -> None:
    found = Run(tmp_path, balance_coef=1e-5, steps=20).train(lean)
    assert "too weak" in found["collapse"].cause
    assert "raise balance_coef to 0.0001" in found["collapse"].remedy


def test_a_capacity_that_is_too_small(tmp_path: Path) -> None:
    tight = CapacityConfig(factor=0.5)
    moe = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, capacity=tight)
    run = Run(tmp_path, moe, steps=25)
    found = run.train()
    alarm = found["drop_rate_high"]
    assert alarm.severity == "error"
    total = run.health.alarms.past.totals[0]
    dropped = (total.chosen_E - total.kept_E).sum() / total.chosen_E.sum()
    assert dropped >= 0.5
    busiest = run.health.alarms.active["drop_rate_high", 0].evidence["max_vio"] + 1
    assert busiest == pytest.approx((total.chosen_E.max() / total.chosen_E.double().mean()).item())
    assert f"raise capacity.factor to {busiest:.2f}" in run.health.alarms.active["drop_rate_high", 0].remedy


def test_a_router_that_no_optimizer_holds(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=15)
    found = run.train(lambda decoder: decoder.layers[1].mlp.router.weight.requires_grad_(False))
    assert list(found) == ["router_frozen"]
    assert found["router_frozen"].layer == 1
    assert found["router_frozen"].step == 15


def test_a_router_frozen_on_purpose_is_no_alarm(tmp_path: Path) -> None:
    assert "router_frozen" not in Run(tmp_path, steps=15, router_lr_scale=0.0).train()


def test_a_router_that_moves_too_fast(tmp_path: Path) -> None:
    found = Run(tmp_path, steps=8, router_lr_scale=100.0, every=2).train()
    assert found["drift_fast"].step == 2
    assert found["drift_fast"].evidence["speed"] > 0.05
    assert "router_lr_scale" in found["drift_fast"].remedy


def test_copies_that_do_not_become_different(tmp_path: Path) -> None:
    def copy(decoder: Decoder, train: bool) -> None:
        for moe in moe_layers(decoder).values():
            for parameter in moe.experts.parameters():
                parameter[:] = parameter[:1].clone()
                parameter.requires_grad_(train)

    found = Run(tmp_path / "frozen", steps=25).train(lambda decoder: copy(decoder, train=False))
    assert found["experts_identical"].step == 25
    assert found["experts_identical"].evidence["twins"] == found["experts_identical"].evidence["pairs"] == 6
    assert "experts_identical" not in Run(tmp_path / "free", steps=25).train(lambda decoder: copy(decoder, train=True))


def test_one_expert_a_token_with_renormalised_weights() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    found = {}
    for top_k in (1, 2):
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_experts_per_tok=top_k))
        ids = torch.randint(3, 64, (2, 17))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
        alarms = Alarms(RunFacts(num_experts=4, top_k=top_k))
        grad_norm = math.hypot(*norms.values())
        router = norms["model.layers.0.mlp.gate.weight"]
        found[top_k] = alarms.step(
            Signals(step=1, loss=loss.item(), grad_norm=grad_norm, router_grad_norm=router, lr=1e-3)
        )
    (alarm,) = found[1]
    assert (alarm.name, alarm.severity) == ("k1_renormalised", "error")
    assert found[2] == []
    assert Alarms(RunFacts(num_experts=4, top_k=1, renormalised=True)).step(step(1))[0].name == "k1_renormalised"


def test_padding_that_is_counted() -> None:
    decoder = tiny_decoder()
    ids, mask = torch.randint(0, 257, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    found = {}
    for given in (None, mask):
        monitor = RoutingMonitor((0, 1), 4)
        monitor.update(decoder.features(ids, mask=given).routings)
        signals = step(1, totals=monitor.totals(), real_tokens=int(mask.sum()), balance_loss=1.0)
        found[given is None] = Alarms(FACTS).step(signals)
    (alarm,) = found[True]
    assert alarm.name == "padding_counted"
    assert alarm.evidence == {"counted": 18, "real": 13, "padding": pytest.approx(5 / 18)}
    assert found[False] == []


def test_a_router_loss_that_is_switched_off() -> None:
    monitor = RoutingMonitor((0, 1), 4)
    monitor.update(tiny_decoder().features(torch.randint(0, 257, (1, 9))).routings)
    facts = RunFacts(num_experts=4, top_k=2, balance_coef=0.02, z_coef=0.001)
    (alarm,) = Alarms(facts).step(step(1, totals=monitor.totals(), balance_loss=None))
    assert (alarm.name, alarm.severity) == ("aux_switched_off", "error")
    assert alarm.evidence == {"balance_coef": 0.02, "z_coef": 0.001}
    assert "output_router_logits" in alarm.remedy
    assert Alarms(facts).step(step(1, totals=monitor.totals(), balance_loss=1.0, z_loss=4.0)) == []


def test_dead_experts_and_imbalance_by_hand() -> None:
    alarms = Alarms(FACTS, AlarmLimits(window=4, every=2))
    even = [40] * 8
    told = [alarm for number in range(1, 9) for alarm in alarms.step(step(number, totals=[total(even)]))]
    assert told == []
    dead = [0, 80, 40, 40, 40, 0, 40, 40]
    told = [alarm for number in range(9, 16) for alarm in alarms.step(step(number, totals=[total(dead)]))]
    assert [(alarm.name, alarm.step, alarm.experts) for alarm in told] == [("dead_experts", 12, (0, 5))]
    busy = [220, 20, 20, 20, 10, 10, 10, 10]
    told = [alarm for number in range(16, 25) for alarm in alarms.step(step(number, totals=[total(busy)]))]
    (alarm,) = told
    assert (alarm.name, alarm.experts) == ("imbalance", (0,))
    assert alarm.evidence["max_vio"] > 2
    assert ("dead_experts", 0) not in alarms.active


def test_few_assignments_are_not_judged() -> None:
    alarms = Alarms(FACTS, AlarmLimits(window=2, every=1))
    for number in range(1, 9):
        assert alarms.step(step(number, totals=[total([15, 15, 0, 0, 0, 0, 0, 0])])) == []


def test_the_window_forgets() -> None:
    alarms = Alarms(FACTS, AlarmLimits(window=3, every=1))
    for number, counts in enumerate([[9, 0], [1, 2], [3, 4], [5, 6]]):
        alarms.step(step(number, totals=[total(counts)], layers=[7]))
    (kept,) = alarms.past.totals
    assert kept.chosen_E.tolist() == [9, 12]
    assert kept.tokens == 3 // 2 + 7 // 2 + 11 // 2


def test_an_alarm_is_told_once_and_again_when_it_has_rested() -> None:
    told = []
    alarms = Alarms(FACTS, AlarmLimits(quiet=10))
    for number in range(1, 31):
        loss = math.inf if number in (5, 6, 9, 20) else 2.0
        told += [alarm.step for alarm in alarms.step(step(number, loss=loss))]
        assert (("loss_blow_up", None) in alarms.active) == math.isinf(loss)
    assert told == [5, 20]


def test_an_alarm_that_stays_is_told_once() -> None:
    alarms = Alarms(FACTS, AlarmLimits(quiet=3))
    told = [alarm for number in range(20) for alarm in alarms.step(step(number, loss=math.inf))]
    assert [alarm.step for alarm in told] == [0]


def test_a_warning_that_becomes_an_error_is_told_again() -> None:
    alarms = Alarms(FACTS, AlarmLimits(window=1, every=1))
    told = []
    for number, kept in enumerate([85, 85, 60, 60]):
        totals = [RoutingTotals(torch.tensor([100] * 8), torch.tensor([kept] * 8), 400)]
        told += [(alarm.severity, alarm.step) for alarm in alarms.step(step(number, totals=totals))]
    assert told == [("warning", 0), ("error", 2)]


@pytest.mark.parametrize(
    ("z_loss", "number", "cause"),
    [(400.0, 100, "logits have grown"), (9.0, 100, "too high"), (9.0, 8, "moments"), (None, 100, "too high")],
)
def test_why_a_loss_blew_up(z_loss: float | None, number: int, cause: str) -> None:
    alarms = Alarms(FACTS)
    for before in range(5):
        alarms.step(step(number - 5 + before, loss=2.0, z_loss=z_loss))
    told = alarms.step(step(number, loss=math.nan, z_loss=z_loss))
    assert cause in told[0].cause


def test_a_noisy_loss_is_no_blow_up() -> None:
    torch.manual_seed(0)
    alarms = Alarms(FACTS)
    for number in range(400):
        loss = 6 * math.exp(-number / 50) + 2 + 0.3 * torch.randn(()).item()
        assert alarms.step(step(number, loss=loss)) == []


def test_memory_in_pieces() -> None:
    gib = 1 << 30
    (alarm,) = Alarms(FACTS).step(step(1, memory=Memory(allocated=2 * gib, reserved=4 * gib)))
    assert alarm.name == "fragmentation"
    assert "expandable_segments" in alarm.remedy
    assert Alarms(FACTS).step(step(1, memory=Memory(allocated=8 * gib, reserved=10 * gib))) == []
    assert Alarms(FACTS).step(step(1, memory=Memory(allocated=100, reserved=gib))) == []


def test_every_alarm_names_a_cause_and_a_remedy() -> None:
    alarms = Alarms(
        RunFacts(num_experts=8, top_k=1, balance_coef=0.01, renormalised=True), AlarmLimits(window=1, every=1)
    )
    alarms.step(step(1, totals=[total([100] * 8)] * 4))
    layers = ([800, 0, 0, 0, 0, 0, 0, 0], [0] + [100] * 7, [600, 100, 100, 100, 100, 100, 100, 100], [100] * 8)
    totals = [total(counts) for counts in layers]
    totals[3] = RoutingTotals(totals[3].chosen_E, totals[3].kept_E // 2, totals[3].tokens)
    told = alarms.step(
        step(
            100,
            loss=math.inf,
            totals=totals,
            z_loss=900.0,
            balance_loss=None,
            real_tokens=1,
            drift=[Drift(0, 0.0, 1.0, 0.0), Drift(1, 1.0, 0.5, 0.2)],
            similarity=[Similarity(0, 0.5, 1.0, (0, 1), 1, 2)],
            memory=Memory(1, 3 << 30),
            lr=1e-3,
        )
    )
    first = {"k1_renormalised", "aux_switched_off"}
    assert {alarm.name for alarm in told} | first == set(CHECKS)
    assert [alarm.severity for alarm in told] == sorted(alarm.severity for alarm in told)
    of_layers = {(alarm.name, alarm.layer) for alarm in told if alarm.name in ("collapse", "dead_experts", "imbalance")}
    assert of_layers == {("collapse", 0), ("dead_experts", 1), ("imbalance", 2)}
    for alarm in told:
        assert alarm.evidence
        assert len(str(alarm).splitlines()) == 1
        assert alarm.cause in str(alarm)
        assert alarm.remedy in str(alarm)


def test_facts_of_our_own_runs() -> None:
    moe = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, router="sigmoid", norm_topk_prob=True)
    facts = RunFacts.of(tiny_config(moe=moe, router_aux_loss_coef=0.5), TrainConfig(lr=0.1, z_coef=0.2))
    assert facts == RunFacts(
        num_experts=4,
        top_k=2,
        balance_coef=0.5,
        balanced=True,
        renormalised=True,
        z_coef=0.2,
        lr=0.1,
        warmup_steps=5,
    )
    assert RunFacts.of(tiny_config(moe=None), TrainConfig(balance_coef=0.0)).num_experts == 1
    hashed = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, router="hash")
    assert not RunFacts.of(tiny_config(moe=hashed), TrainConfig()).router_trains


def test_speed_is_a_step_s_between_two_readings() -> None:
    decoder = tiny_decoder()
    health = RunHealth(decoder, TrainConfig(), every=5)
    with torch.no_grad():
        decoder.layers[1].mlp.router.weight += 0.01
    for number in (4, 5):
        health.step(
            StepMetrics(
                step=number,
                loss=2.0,
                lm_loss=2.0,
                balance_loss=1.0,
                z_loss=1.0,
                lr=1e-3,
                grad_norm=1.0,
                tokens=1,
                tokens_per_s=1.0,
                experts_used=8,
                max_vio=0.0,
            ),
            (),
        )
        assert [one.layer for one in health.drift] == ([] if number == 4 else [0, 1])
    assert health.drift[0].speed == 0
    assert health.drift[1].speed == pytest.approx(4 * 0.01 / 5, rel=rel("fp32 loss"))


def test_weights_that_are_read() -> None:
    groups = (
        ExpertGroup(count=2, kind="mlp"),
        ExpertGroup(count=1, kind="zero"),
        ExpertGroup(count=1, intermediate_size=4),
    )
    mixed = MoEConfig(
        hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, expert="mixed", expert_groups=groups, bias=True
    )
    stacks = expert_stacks(MoE(mixed))
    assert [(stack.first, [tuple(t.shape) for t in stack.tensors]) for stack in stacks] == [
        (0, [(2, 8, 16), (2, 16, 8)]),
        (3, [(1, 8, 16), (1, 16, 4)]),
    ]
    decoder = tiny_decoder(num_hidden_layers=3, dense_layers=(1,))
    assert {layer: weight.shape for layer, weight in router_weights(decoder).items()} == {0: (4, 16), 2: (4, 16)}
    hashed = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, router="hash")
    assert router_weights(tiny_decoder(moe=hashed)) == {}


def total(counts: list[int]) -> RoutingTotals:
    """K = 2 for half as many tokens."""
    return RoutingTotals(torch.tensor(counts), torch.tensor(counts), sum(counts) // 2)


def step(number: int, **changes: object) -> Signals:
    values = {"loss": 2.0, "grad_norm": 1.0, "balance_loss": 1.0, "lr": 1e-3}
    return Signals(step=number, **(values | changes))
