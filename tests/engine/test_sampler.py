"""Sampling against a plain-numpy reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.config import SamplingConfig
from moekit.engine.sampler import HEAD, Sampler, draw, probabilities
from tolerances import near

# Different enough that no two have the same probability: which of two equal ones is kept is nobody's promise.
DISTINCT_LOGITS = st.lists(st.integers(-64, 64), min_size=2, max_size=40, unique=True).map(
    lambda eighths: np.array(eighths, np.float32) / 8
)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Rank, cut at k, cut where the mass before a token reaches p, renormalise: one token at a time."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    ranked = ranked[:top_k] if top_k else ranked
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass < top_p:
            kept.append(i)
        mass += weights[i] / total
    probs = np.zeros(len(logits))
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs


@settings(max_examples=200, deadline=None)
@given(
    logits=DISTINCT_LOGITS,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([0.05, 0.33, 0.5, 0.9, 0.99, 1.0]),
)
def test_probabilities_equal_the_reference(logits, temperature, top_k, top_p):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    probs = probabilities(torch.from_numpy(logits), config).numpy()
    np.testing.assert_allclose(probs, reference(logits, temperature, top_k, top_p), **near("fp64 scalar"))


def test_top_p_ranks_past_the_head_when_the_head_does_not_hold_the_mass():
    logits = np.linspace(0, 0.01, 3 * HEAD).astype(np.float32)
    probs = probabilities(torch.from_numpy(logits), SamplingConfig(temperature=1.0, top_p=0.9)).numpy()
    assert np.count_nonzero(probs) > 2 * HEAD
    np.testing.assert_allclose(probs, reference(logits, 1.0, 0, 0.9), **near("fp64 scalar"))


def test_equal_logits_still_keep_exactly_k():
    probs = probabilities(torch.zeros(10), SamplingConfig(temperature=1.0, top_k=3))
    assert sorted(probs.tolist()) == pytest.approx([0.0] * 7 + [1 / 3] * 3)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e30])
def test_extreme_temperatures_give_numbers(temperature):
    probs = probabilities(torch.tensor([1.0, 5.0, 2.0]), SamplingConfig(temperature=temperature))
    expected = [0, 1, 0] if temperature < 1 else [1 / 3] * 3
    assert probs.tolist() == pytest.approx(expected)


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([draw(probs, generator) for _ in range(20_000)], minlength=5) / 20_000
    assert drawn[1] == drawn[4] == 0
    np.testing.assert_allclose(drawn, probs, atol=4 * 0.5 / 20_000**0.5)  # four standard errors


def test_temperature_zero_is_the_first_largest():
    assert Sampler(SamplingConfig(temperature=0))(torch.tensor([0.0, 2.0, 2.0])) == 1


def test_same_seed_same_tokens_and_another_seed_others():
    logits = torch.zeros(1000)

    def tokens(seed):
        sample = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sample(logits) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Sampler(SamplingConfig(temperature=1.0))(torch.zeros(10))
    assert torch.equal(before, torch.get_rng_state())
