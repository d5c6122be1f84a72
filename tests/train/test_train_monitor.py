"""The measures of balance against plain loops over the counts, and the forms they leave in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import tiny_decoder

from moekit.config import CapacityConfig, MoEConfig
from moekit.errors import MissingExtraError
from moekit.moe import MoE, RoutingTotals
from moekit.moe.measures import Drift, Similarity
from moekit.train import LayerRouting, RoutingMonitor
from moekit.train.monitor import to_jsonl, to_prometheus


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [20, 0, 0, 0], [7, 1, 0, 3, 9], [4]])
def test_measures_against_plain_loops(counts: list[int]) -> None:
    found = LayerRouting.of(3, counts)
    mean = statistics.fmean(counts)
    assert found.max_vio == pytest.approx(max(counts) / mean - 1)
    assert found.balance_score == pytest.approx(statistics.pstdev(counts) / mean)
    assert found.dead_experts == tuple(i for i, c in enumerate(counts) if c == 0)
    assert found.utilisation == pytest.approx(sum(c > 0 for c in counts) / len(counts))
    entropy = 0.0
    for count in counts:
        if count:
            entropy -= count / sum(counts) * math.log(count / sum(counts))
    assert found.entropy == pytest.approx(entropy / math.log(len(counts)) if len(counts) > 1 else 0.0)


def test_without_tokens_everything_is_zero_and_json() -> None:
    found = RoutingMonitor([0], 3).as_dict()
    assert found[0]["dead_experts"] == (0, 1, 2)
    assert json.loads(json.dumps(found, allow_nan=False))[0]["max_vio"] == 0


def test_update_counts_what_the_layers_chose() -> None:
    decoder = tiny_decoder(num_hidden_layers=3, dense_layers=(1,))
    monitor = RoutingMonitor(decoder.config.moe_layers, 4)
    expected = torch.zeros(2, 4, dtype=torch.int64)
    for _ in range(2):
        routings = decoder.features(torch.randint(0, 257, (2, 9))).routings
        monitor.update(routings)
        for row, routing in enumerate(routings):
            for expert in routing.expert_ids_TK.flatten().tolist():
                expected[row, expert] += 1
    assert [layer.layer for layer in monitor.report()] == [0, 2]
    assert torch.equal(monitor.counts_ME, expected)
    assert monitor.experts_used == int((expected > 0).sum())


def test_heatmap_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monitor = RoutingMonitor([0, 2], 4)
    monitor.add(torch.tensor([[9, 1, 0, 2], [3, 3, 3, 3]]))
    monitor.save_heatmap(tmp_path / "deep" / "routing.png")
    assert (tmp_path / "deep" / "routing.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["routing.png"]


def test_heatmap_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"moekit\[train\]"):
        RoutingMonitor([0], 2).save_heatmap(tmp_path / "x.png")


@pytest.mark.parametrize("overflow", ["drop", "next"])
def test_drops_are_counted_as_a_loop_over_the_choice_does(overflow: str) -> None:
    torch.manual_seed(0)
    capacity = CapacityConfig(factor=0.75, overflow=overflow)
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=5, top_k=2, capacity=capacity))
    monitor = RoutingMonitor([4], 5)
    chosen, kept, tokens = [0] * 5, [0] * 5, 0
    for length in (7, 12):
        x, mask = torch.randn(length, 8), torch.rand(length) > 0.3
        _, routing = layer(x, mask)
        monitor.update([routing])
        best = (x @ layer.router.weight.T).topk(2).indices
        tokens += int(mask.sum())
        for token in mask.nonzero().flatten().tolist():
            for expert in best[token].tolist():
                chosen[expert] += 1
        for token, expert in zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True):
            kept[expert] += int(mask[token])
    assert monitor.chosen_ME.tolist() == [chosen]
    assert monitor.counts_ME.tolist() == [kept]
    (found,) = monitor.report()
    assert found.drop_rate == pytest.approx(1 - sum(kept) / sum(chosen))
    assert found.drop_rate == pytest.approx(monitor.drop_rate)
    assert found.mean_k == pytest.approx(sum(chosen) / tokens) == 2
    assert 0 < found.drop_rate < 0.5


def test_a_state_is_the_monitor_and_monitors_add_up() -> None:
    torch.manual_seed(0)
    decoder = tiny_decoder()
    half, whole = RoutingMonitor((0, 1), 4), RoutingMonitor((0, 1), 4)
    for number in range(4):
        routings = decoder.features(torch.randint(0, 257, (2, 9))).routings
        whole.update(routings)
        if number < 2:
            half.update(routings)
    saved = {name: tensor.clone() for name, tensor in half.state().items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.int64}
    rest = RoutingMonitor((0, 1), 4)
    rest.add_totals([a_less_b(a, b) for a, b in zip(whole.totals(), half.totals(), strict=True)])
    again = RoutingMonitor.of_state((0, 1), saved)
    assert again.report() == half.report()
    again.merge(rest)
    assert again.report() == whole.report()
    assert half.report() == RoutingMonitor.of_state((0, 1), saved).report(), "merging must not change the other"


def a_less_b(a: RoutingTotals, b: RoutingTotals) -> RoutingTotals:
    return RoutingTotals(a.chosen_E - b.chosen_E, a.kept_E - b.kept_E, a.tokens - b.tokens)


def test_totals_do_not_change_when_counting_goes_on() -> None:
    monitor = RoutingMonitor([0], 2)
    monitor.add(torch.tensor([[1, 2]]))
    (before,) = monitor.totals()
    monitor.add(torch.tensor([[5, 5]]))
    assert before.kept_E.tolist() == [1, 2]
    assert before.chosen_E.tolist() == [1, 2]


def test_counts_without_tokens_leave_the_mean_open() -> None:
    monitor = RoutingMonitor([0], 2)
    monitor.add(torch.tensor([[1, 2]]), tokens_M=torch.tensor([3]))
    assert monitor.report()[0].mean_k == 1
    monitor.add(torch.tensor([[1, 2]]))
    assert monitor.report()[0].mean_k is None
    assert "tokens" not in monitor.state()


def test_a_dense_model_has_nothing_to_monitor() -> None:
    monitor = RoutingMonitor([], 1)
    monitor.update([])
    assert (monitor.report(), monitor.max_vio, monitor.experts_used, monitor.drop_rate) == ([], 0.0, 0, 0.0)
    assert to_prometheus(monitor.report()) == ""


SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


def samples(text: str) -> dict[str, dict[str, float]]:
    """The metrics of an exposition: name to labels to value; every one declared once, before its samples."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in found
            found[name] = {}
        elif not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            found[match[1]][match[2]] = float(match[3])
    return found


def test_prometheus_text_holds_the_whole_report() -> None:
    report = [LayerRouting.of(0, [3, 1, 0], dropped=1, tokens=5), LayerRouting.of(2, [2, 2, 2])]
    drift = [Drift(0, math.inf, 0.5, 0.0)]
    similarity = [Similarity(2, 0.25, 1.0, (0, 1), 1, 3)]
    text = to_prometheus(report, drift=drift, similarity=similarity, labels={"model": 'a "b"\\c\n'})
    assert text.endswith("\n")
    found = samples(text)
    model = r'model="a \"b\"\\c\n"'
    assert found["moekit_expert_assignments_total"] == {
        f'{model},layer="{layer.layer}",expert="{expert}"': count
        for layer in report
        for expert, count in enumerate(layer.counts)
    }
    for field in ("utilisation", "entropy", "max_vio", "balance_score", "drop_rate"):
        want = {f'{model},layer="{layer.layer}"': getattr(layer, field) for layer in report}
        assert found[f"moekit_routing_{field}"] == want
    assert found["moekit_routing_mean_k"] == {f'{model},layer="0"': 1.0}, "unknown in layer 2"
    assert found["moekit_routing_dead_experts"] == {f'{model},layer="0"': 1, f'{model},layer="2"': 0}
    assert found["moekit_router_drift"] == {f'{model},layer="0"': math.inf}
    assert found["moekit_expert_twins"] == {f'{model},layer="2"': 1}


def test_prometheus_text_as_the_official_client_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    text = to_prometheus([LayerRouting.of(0, [3, 1], tokens=2)], labels={"run": 'x"\\'})
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["moekit_expert_assignments"].type == "counter"
    (entropy,) = families["moekit_routing_entropy"].samples
    assert entropy.labels == {"run": 'x"\\', "layer": "0"}
    assert entropy.value == LayerRouting.of(0, [3, 1]).entropy


def test_jsonl_has_a_line_a_layer() -> None:
    report = [LayerRouting.of(0, [3, 1]), LayerRouting.of(4, [2, 2], tokens=4)]
    lines = to_jsonl(report, step=9).splitlines()
    for line, layer in zip(lines, report, strict=True):
        read = json.loads(line)
        assert read.pop("step") == 9
        assert read == json.loads(json.dumps(dataclasses.asdict(layer)))
