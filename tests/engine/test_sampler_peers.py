"""Penalties and filters against transformers' own logits processors, in the order that its `generate` gives them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from moekit.config import SamplingConfig
from moekit.engine.sampler import Sampler, penalised, probabilities
from tolerances import near

VOCABULARY = 200


class Theirs(GenerationMixin):
    """As much of a model as the making of the processors asks for."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def processors(self, **settings):
        config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
        return self._get_logits_processor(generation_config=config, input_ids_seq_length=1)


def random_logits(seed):
    """Normal, so that no two are equal: which of two equals is kept is nobody's promise. Wide enough for every cut."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, VOCABULARY))


def counts(ids):
    return torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=VOCABULARY)


def theirs(logits, ids, **settings):
    """Probabilities of transformers' processors, in float64."""
    scores = Theirs().processors(**settings)(torch.tensor([ids]), logits[None].clone())
    return scores.softmax(dim=-1)[0]


def ours(logits, prompt, new, **settings):
    config = SamplingConfig(**{"temperature": 1.0, **settings})
    return probabilities(penalised(logits, counts(prompt), counts(new), config), config)


IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**31)
SETTINGS = {
    "temperature": st.floats(0.05, 5),
    "top_k": st.integers(1, 2 * VOCABULARY),
    "top_p": st.floats(0.01, 0.999),
    "min_p": st.floats(0.001, 1),
    "repetition_penalty": st.floats(0.3, 3),
}


@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data(), seed=SEEDS, prompt=IDS, new=IDS)
def test_each_setting_alone(name, data, seed, prompt, new):
    logits, setting = random_logits(seed), {name: data.draw(SETTINGS[name])}
    wanted = theirs(logits, prompt + new, **setting)
    np.testing.assert_allclose(ours(logits, prompt, new, **setting), wanted, **near("fp64 scalar"))


@given(seed=SEEDS, prompt=IDS, new=IDS, settings=st.fixed_dictionaries({}, optional=SETTINGS))
def test_any_settings_together_in_their_order(seed, prompt, new, settings):
    logits = random_logits(seed)
    got, wanted = ours(logits, prompt, new, **settings), theirs(logits, prompt + new, **settings)
    np.testing.assert_array_equal(got > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, **near("fp64 scalar"))


def test_the_order_is_seen():
    """Top-p before min-p or after it, temperature before or after the cuts: other orders give other tokens."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    hot = {"temperature": 3.0, "top_p": 0.6, "min_p": 0.3}
    kept = int((probabilities(logits, SamplingConfig(**hot)) > 0).sum())
    assert kept == int((theirs(logits, [0], **hot) > 0).sum()) == 3
    cuts_first = probabilities(logits, SamplingConfig(temperature=1.0, top_p=0.6, min_p=0.3))
    assert int((cuts_first > 0).sum()) < kept


@given(seed=SEEDS, prompt=IDS, new=IDS, presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_presence_and_frequency_are_openais_formula(seed, prompt, new, presence, frequency):
    """mu[j] − c[j] · alpha_frequency − float(c[j] > 0) · alpha_presence, c counting what was sampled so far."""
    logits = random_logits(seed)
    config = SamplingConfig(presence_penalty=presence, frequency_penalty=frequency)
    wanted = [mu - new.count(j) * frequency - float(new.count(j) > 0) * presence for j, mu in enumerate(logits.numpy())]
    np.testing.assert_allclose(penalised(logits, counts(prompt), counts(new), config), wanted, **near("fp64 scalar"))


@given(seed=SEEDS, prompt=IDS, repetition=st.floats(1.1, 3), presence=st.floats(0.1, 2))
def test_a_sampler_counts_its_own_tokens(seed, prompt, repetition, presence):
    settings = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": 0.5}
    config = SamplingConfig(**settings)
    sample, new, logits = Sampler(config, prompt), [], random_logits(seed)
    for _ in range(12):
        wanted = penalised(logits, counts(prompt), counts(new), config).argmax()
        new.append(sample(logits))
        assert new[-1] == wanted
    assert len(set(new)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_dtype_are_left_alone(dtype):
    logits = random_logits(0).to(dtype)
    before = logits.clone()
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.5}
    sample = Sampler(SamplingConfig(**settings, presence_penalty=1.0, seed=1), [3, 4])
    assert len({sample(logits) for _ in range(50)}) > 1
    assert torch.equal(logits, before)
