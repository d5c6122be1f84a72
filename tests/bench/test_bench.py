"""The bench compares like with like: contenders agree before they are timed, and the figures add up."""

from __future__ import annotations

import pytest
import torch

from moekit.bench import LayerShape, cases, experts, gemm_rate, layer, read_bandwidth
from moekit.bench.timing import interleaved

TINY = LayerShape(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, tokens=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_layer_rows(dtype, backward):
    rows = {row.contender: row for row in layer(TINY, dtype, backward, repeats=3)}
    assert set(rows) == {"dense (limit)", "moekit", "transformers grouped_mm", "transformers eager"}
    limit = rows["dense (limit)"]
    assert limit.ratio == 1.0
    for row in rows.values():
        assert row.ratio == pytest.approx(limit.milliseconds / row.milliseconds)
        # Three matrices of 8 × 16, two experts, 32 tokens, two FLOPs each; backward costs twice the forward.
        flops = 2 * 3 * 8 * 16 * 2 * 32 * (3 if backward else 1)
        assert row.gflops == pytest.approx(flops / row.milliseconds / 1e6)


def test_more_experts_do_the_same_flops():
    rows = experts(TINY, (2, 8), torch.float32, backward=True, repeats=2)
    assert [row.contender for row in rows] == ["2 experts", "8 experts"]
    for row in rows:
        assert row.ratio == pytest.approx(rows[0].milliseconds / row.milliseconds)
        assert row.gflops == pytest.approx(3 * 2 * 3 * 8 * 16 * 2 * 32 / row.milliseconds / 1e6)


def test_a_contender_that_computes_something_else_is_caught(monkeypatch):
    honest = cases.transformers_layer

    def lazy(ours, implementation):
        peer = honest(ours, implementation)
        if implementation == "grouped_mm":
            peer.experts.down_proj.data[1:] = 0
        return peer

    monkeypatch.setattr(cases, "transformers_layer", lazy)
    with pytest.raises(AssertionError, match="grouped_mm disagrees"):
        layer(TINY, torch.float32, backward=False, repeats=1)


def test_contenders_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert all(value >= 0 for value in seconds.values())


def test_limits_are_rates():
    assert read_bandwidth(size=1 << 22, repeats=2) > 1e8
    assert gemm_rate(torch.float32, largest=256, repeats=2) > 1e8
