"""The loop: the golden curve, what accumulation, packing and recomputation may not change, and how it stops."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from tiny_training import EXPERTS, tiny_data, tiny_decoder
from torch.nn import functional as F

from moekit.config import CapacityConfig, TrainConfig
from moekit.errors import DivergenceError, UnknownNameError
from moekit.models.decoder import Decoder
from moekit.moe import losses
from moekit.train import StepMetrics, Trainer, TrainingData
from moekit.train.loss import chunked_cross_entropy
from tolerances import near, rel

UNEVEN_SEED = 14  # of an order whose first two batches of 2 rows have 63 and 36 labels
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_moe_20_steps.txt"


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**({"steps": 4, "lr": 3e-3, "autocast": "none", "save_every": 0} | changes))


def train(
    decoder: Decoder, data: TrainingData, folder: Path, **changes: object
) -> tuple[list[StepMetrics], dict[str, torch.Tensor]]:
    seen: list[StepMetrics] = []
    Trainer(decoder, data, config(**changes), folder, on_step=seen.append).run()
    return seen, {name: p.detach().clone() for name, p in decoder.named_parameters()}


def test_golden_curve(data: TrainingData, tmp_path: Path) -> None:
    """Twenty losses to 2e-5: fp32 sums differ between machines in the last bits, and 20 steps let them grow a little.

    MOEKIT_WRITE_GOLDEN=1 writes the file anew.
    """
    seen, _ = train(tiny_decoder(), data, tmp_path / "run", steps=20)
    found = [m.loss for m in seen]
    if os.environ.get("MOEKIT_WRITE_GOLDEN"):
        GOLDEN.write_text("".join(f"{m.step} {m.loss:.7f}\n" for m in seen))
    expected = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    assert found == pytest.approx(expected, rel=rel("golden curve"))
    assert found[-1] < found[0] - 0.4


def test_one_step_against_plain_pytorch(data: TrainingData, tmp_path: Path) -> None:
    """Loss, its parts, the norm and the clipped gradient of one step, written out with whole logits."""
    decoder, twin = tiny_decoder(), tiny_decoder()
    trainer = Trainer(decoder, data, config(steps=1, clip_norm=0.5, z_coef=0.1, balance_coef=0.3), tmp_path)
    metrics = trainer.run().last
    batch = data.train.batch(0, 4)
    out = twin(batch.input_ids_BL, document_ids=batch.document_ids_BL)
    lm = F.cross_entropy(out.logits.flatten(0, 1), batch.labels_BL.flatten())
    balance, z = losses.load_balancing(out.routings), losses.z_loss(out.routings)
    (lm + 0.3 * balance + 0.1 * z).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert metrics is not None
    wanted = [x.item() for x in (lm, balance, z, lm + 0.3 * balance + 0.1 * z, norm)]
    found = [metrics.lm_loss, metrics.balance_loss, metrics.z_loss, metrics.loss, metrics.grad_norm]
    assert found == pytest.approx(wanted, rel=rel("fp32 loss"))
    for (name, mine), theirs in zip(decoder.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **near("fp32 gradients"), msg=name)


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    """Micro-batches of unequal numbers of labels: the mean is over the step's labels, not over micro-batches."""
    data = tiny_data(tmp_path, seed=UNEVEN_SEED)
    counts = [data.train.batch(i, 2).num_labels for i in range(2)]
    assert counts[0] != counts[1]
    changes = {"steps": 1, "balance_coef": 0.0, "clip_norm": 0.0}
    one, two = tiny_decoder(), tiny_decoder()
    (big,), _ = train(one, data, tmp_path / "big", batch_size=4, **changes)
    (parts,), _ = train(two, data, tmp_path / "parts", batch_size=2, accumulate=2, **changes)
    assert parts.lm_loss == pytest.approx(big.lm_loss, rel=rel("fp32 scalar"))
    assert (parts.tokens, parts.experts_used, parts.max_vio) == (big.tokens, big.experts_used, big.max_vio)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **near("fp32 gradients"))


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("kind", ["moe", "block"])
def test_recomputation_changes_no_bit(data: TrainingData, tmp_path: Path, kind: str, autocast: str) -> None:
    kept, weights = train(tiny_decoder(), data, tmp_path / "none", autocast=autocast)
    again, recomputed = train(tiny_decoder(), data, tmp_path / kind, checkpointing=kind, autocast=autocast)
    assert [m.loss for m in kept] == [m.loss for m in again]
    assert [m.grad_norm for m in kept] == [m.grad_norm for m in again]
    assert all(torch.equal(weights[name], recomputed[name]) for name in weights)


def test_packed_documents_equal_documents_alone(tmp_path: Path) -> None:
    data = tiny_data(tmp_path, sequence_length=60)
    decoder, batch = tiny_decoder(), data.train.take([0])
    assert batch.document_ids_BL is not None

    def nll(ids: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        hidden = decoder.features(ids, document_ids=documents).hidden_BLD.flatten(0, 1)
        return chunked_cross_entropy(hidden, decoder.head_weight, labels.flatten(), denominator=1)

    packed = nll(batch.input_ids_BL, batch.labels_BL, batch.document_ids_BL)
    alone = torch.zeros(())
    for document in batch.document_ids_BL.unique():
        where = batch.document_ids_BL == document
        alone = alone + nll(batch.input_ids_BL[where][None], batch.labels_BL[where][None], None)
    torch.testing.assert_close(packed, alone, **near("fp32 scalar"))


def test_bfloat16_autocast_keeps_fp32_masters_and_losses(data: TrainingData, tmp_path: Path) -> None:
    decoder = tiny_decoder().bfloat16()
    seen, weights = train(decoder, data, tmp_path, autocast="bfloat16", steps=8)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert seen[-1].lm_loss < seen[0].lm_loss
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_before_the_weights_are_touched(data: TrainingData, tmp_path: Path, what: str) -> None:
    decoder = tiny_decoder()

    def spoil(metrics: StepMetrics) -> None:
        if metrics.step == 3 and what == "loss":
            with torch.no_grad():
                decoder.norm.weight[0] = float("nan")
        if metrics.step == 3 and what == "gradient":
            decoder.norm.weight.register_hook(lambda grad: grad * float("inf"))

    trainer = Trainer(decoder, data, config(steps=9, save_every=2), tmp_path, on_step=spoil)
    with pytest.raises(DivergenceError, match=rf"step 4: the {what}.*train\.lr.*checkpoint of step 2"):
        trainer.run()
    assert trainer.step == 3
    assert torch.isfinite(decoder.embed.weight).all()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert Trainer(tiny_decoder(), data, config(steps=9), tmp_path).step == 2


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(data: TrainingData, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_decoder(), data, config(steps=9), tmp_path, on_step=interrupt).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    whole, _ = train(tiny_decoder(), data, tmp_path / "whole", steps=9)
    rest, _ = train(tiny_decoder(), data, tmp_path, steps=9)
    assert [m.loss for m in rest] == [m.loss for m in whole[3:]]


def test_a_second_ctrl_c_stops_at_once(data: TrainingData, tmp_path: Path) -> None:
    def twice(metrics: StepMetrics) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_decoder(), data, config(), tmp_path, on_step=twice).run()
    assert not (tmp_path / "checkpoints").exists()


def test_runs_outside_the_main_thread(data: TrainingData, tmp_path: Path) -> None:
    steps: list[int] = []
    run = Trainer(tiny_decoder(), data, config(), tmp_path, on_step=lambda m: steps.append(m.step)).run
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert steps == [1, 2, 3, 4]


def test_metrics_lines_and_evaluation(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    data = TrainingData(data.train, data.train)
    trainer = Trainer(tiny_decoder(), data, config(steps=7, log_every=3, eval_every=3), tmp_path / "run")
    result = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert lines[-1]["valid_loss"] == result.evaluation.nll
    assert lines[0]["valid_loss"] > lines[-1]["valid_loss"]
    assert lines[0]["tokens"] == 3 * 4 * 32
    assert int(result.routing.counts_ME.sum()) == 7 * 4 * 32 * 2 * 2


def test_evaluation_can_be_left_out(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    result = Trainer(tiny_decoder(), TrainingData(data.train, data.train), config(), tmp_path / "run").run(
        evaluate=False
    )
    assert result.evaluation is None


@pytest.mark.parametrize(
    ("moe", "coef", "message"),
    [(False, 0.1, "no MoE layer"), (True, 0.0, "keeps the experts in balance"), (True, None, ""), (False, None, "")],
)
def test_a_coefficient_that_cannot_work_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moe: bool, coef: float | None, message: str
) -> None:
    data = tiny_data(tmp_path)
    decoder = tiny_decoder() if moe else tiny_decoder(moe=None)
    with caplog.at_level(logging.WARNING):
        result = Trainer(decoder, data, config(steps=1, balance_coef=coef), tmp_path).run()
    assert (message in caplog.text) if message else not caplog.records
    assert (result.last.balance_loss is None) == (not moe)


def test_tensorboard_events(data: TrainingData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, _ = train(tiny_decoder(), data, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([m.loss for m in seen])


STATEFUL = {
    "sigmoid": {"router": "sigmoid", "norm_topk_prob": True, "router_options": {"bias_rate": 0.25}},
    "gumbel": {"router": "gumbel", "router_options": {"anneal_steps": 4}},
    "top_p": {"router": "top_p", "gate_order": "softmax_topk", "router_options": {"target_k": 1.0, "rate": 0.5}},
}


def stateful(name: str) -> Decoder:
    return tiny_decoder(moe=dataclasses.replace(EXPERTS, **STATEFUL[name]))


@pytest.mark.parametrize("checkpointing", ["none", "moe", "block"])
def test_selection_bias_follows_the_step_and_not_the_recompute(data, tmp_path, checkpointing) -> None:
    """b += rate · sign(mean − load), once a step over all micro-batches (2408.15664 algorithm 1)."""
    decoder = stateful("sigmoid")
    twin = copy.deepcopy(decoder)
    settings = {"steps": 1, "accumulate": 2, "batch_size": 2, "checkpointing": checkpointing, "balance_coef": 0.0}
    Trainer(decoder, data, config(**settings), tmp_path).run()
    loads = [torch.zeros(4) for _ in twin.layers]
    for part in range(2):
        batch = data.train.batch(part, 2)
        routings = twin(batch.input_ids_BL, document_ids=batch.document_ids_BL).routings
        for number, routing in enumerate(routings):
            loads[number] += torch.bincount(routing.expert_ids_A, minlength=4)
    for layer, load in zip(decoder.layers, loads, strict=True):
        assert layer.mlp.router.selection_bias.tolist() == (0.25 * (load.mean() - load).sign()).tolist()


@pytest.mark.parametrize("name", STATEFUL)
def test_a_router_s_state_is_saved_and_resumed(data, tmp_path, name) -> None:
    trained, again, start = stateful(name), stateful(name), stateful(name)
    Trainer(trained, data, config(steps=3, save_every=3), tmp_path).run()
    Trainer(again, data, config(steps=3, save_every=3), tmp_path)
    buffers = dict(trained.named_buffers())
    assert buffers
    for key, value in buffers.items():
        assert torch.equal(value, again.get_buffer(key))
        assert not torch.equal(value, start.get_buffer(key))


@pytest.mark.parametrize("over", ["sequence", "step"])
def test_the_balance_may_be_taken_over_documents_or_over_the_step(data, tmp_path, over) -> None:
    decoder, twin = tiny_decoder(), tiny_decoder()
    settings = {"steps": 1, "accumulate": 2, "batch_size": 2, "balance_over": over, "balance_coef": 0.3}
    seen = Trainer(decoder, data, config(**settings), tmp_path).run().last
    batches = [data.train.batch(part, 2) for part in range(2)]
    shares = [batch.num_labels / sum(b.num_labels for b in batches) for batch in batches]
    expected, so_far = 0.0, [torch.zeros(4) for _ in twin.layers]
    for batch, share in zip(batches, shares, strict=True):
        routings = twin(batch.input_ids_BL, document_ids=batch.document_ids_BL).routings
        documents = torch.zeros(2, 32) if batch.document_ids_BL is None else batch.document_ids_BL
        values = []
        for number, routing in enumerate(routings):
            so_far[number] += torch.bincount(routing.expert_ids_A, minlength=4)
            counts = so_far[number]
            probs = routing.logits_TE.softmax(-1)
            if over == "step":
                values.append(4 * (counts / counts.sum()) @ probs.mean(0))
                continue
            ids = (documents + 1000 * torch.arange(2)[:, None]).flatten()
            for one in ids.unique():
                mine = ids == one
                f = torch.bincount(routing.expert_ids_TK[mine].flatten(), minlength=4) / (2 * mine.sum())
                values.append(4 * f @ probs[mine].mean(0) / len(ids.unique()))
        mean = sum(values) / len(routings)
        expected += share * mean.item()
    assert seen.balance_loss == pytest.approx(expected, rel=rel("fp32 loss"))


def test_other_router_losses_are_added_and_logged(data, tmp_path) -> None:
    decoder, twin = tiny_decoder(), tiny_decoder()
    weights = {"importance": 0.5, "entropy": 0.25}
    seen = Trainer(decoder, data, config(steps=1, balance_coef=0.0, aux_losses=weights), tmp_path).run().last
    batch = data.train.batch(0, 4)
    out = twin(batch.input_ids_BL, document_ids=batch.document_ids_BL)
    lm = F.cross_entropy(out.logits.flatten(0, 1), batch.labels_BL.flatten())
    probs = [routing.logits_TE.softmax(-1) for routing in out.routings]
    entropy = sum(-(p * p.log()).sum(-1).mean() for p in probs) / 2
    sums = [torch.zeros(4).index_add(0, r.expert_ids_A, r.weights_A) for r in out.routings]
    importance = sum(s.var(correction=0) / s.mean() ** 2 for s in sums) / 2
    assert dict(seen.aux_losses) == pytest.approx(
        {"importance": importance.item(), "entropy": entropy.item()}, rel=rel("fp32 loss")
    )
    assert seen.loss == pytest.approx((lm + 0.5 * importance + 0.25 * entropy).item(), rel=rel("fp32 loss"))
    with pytest.raises(UnknownNameError, match="unknown router loss 'importanse'"):
        Trainer(tiny_decoder(), data, config(aux_losses={"importanse": 1.0}), tmp_path / "other")


def test_dropped_choices_and_mean_k_are_reported(data, tmp_path) -> None:
    tight = dataclasses.replace(EXPERTS, capacity=CapacityConfig(tokens=3))
    seen = Trainer(tiny_decoder(moe=tight), data, config(steps=1, batch_size=2), tmp_path).run().last
    # 64 tokens choose 2 of 4 experts, which take 3 each.
    assert seen.mean_k == 2.0
    assert seen.dropped == pytest.approx(1 - 4 * 3 / 128)


def test_a_sick_run_raises_alarms_and_a_healthy_one_none(data, tmp_path, caplog) -> None:
    alarms: list = []
    Trainer(tiny_decoder(), data, config(steps=30), tmp_path / "healthy", on_alarm=alarms.append).run()
    assert alarms == []
    sick = tiny_decoder()
    with torch.no_grad():
        for layer in sick.layers:
            layer.mlp.router.weight *= 100
    with caplog.at_level(logging.WARNING):
        Trainer(sick, data, config(steps=30, balance_coef=0.0, lr=1e-9), tmp_path / "sick").run()
    assert any("router_saturated" in message and "set z_coef 0.001" in message for message in caplog.messages)
