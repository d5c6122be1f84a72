"""The measures of balance against plain loops over the counts, and the picture of them."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import tiny_decoder

from moekit.errors import MissingExtraError
from moekit.train import LayerRouting, RoutingMonitor


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
