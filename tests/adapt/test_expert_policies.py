"""Cache policies beside textbook ones that look at everything each time, and Belady beside all choices there are."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.adapt.expert_policies import HEAT_TURNS, POLICIES, Forecast, make_policy
from moekit.adapt.expert_simulate import simulate
from moekit.errors import ConfigError, UnknownNameError

EXPERTS = st.integers(0, 5)
STEP = st.tuples(st.integers(0, 2), st.lists(EXPERTS, min_size=1, max_size=3, unique=True))
TRACES = st.lists(STEP.map(lambda step: [(step[0], expert) for expert in step[1]]), min_size=1, max_size=40)
SLOTS = st.integers(3, 12)
HEATS = st.dictionaries(st.tuples(st.integers(0, 2), EXPERTS), st.sampled_from([0.25, 0.5, 0.75]), max_size=6)


class Textbook:
    """What a policy's reference knows: every use so far, in order. The least `rank` leaves."""

    def __init__(self, slots, heat):
        self.slots, self.heat, self.history, self.all = slots, heat, [], []
        self.hottest = sorted(heat, key=lambda key: (-heat[key], key))[: slots * 3 // 4]
        self.since: dict = {}
        self.fixed: dict = {}
        self.age = 0

    def use(self, keys, resident):
        self.all += keys
        for key in keys:
            if key in resident:
                self.touch(key)

    def touch(self, key):
        self.history.append(key)
        self.since[key] += 1
        self.fixed[key] = self.since[key] + self.age

    def came(self, key):
        self.since[key] = 0
        self.touch(key)

    def recency(self, key):
        return max(time for time, used in enumerate(self.history) if used == key)

    def lru(self, key):
        return self.recency(key)

    def lfu(self, key):
        return self.all.count(key) + HEAT_TURNS * self.heat.get(key, 0), self.recency(key)

    def lfuda(self, key):
        return self.fixed[key], self.recency(key)

    def pinned(self, key):
        if key in self.hottest:
            return 1, -self.hottest.index(key)
        return 0, self.recency(key)


def textbook_misses(trace, slots, name, heat):
    book, resident, misses = Textbook(slots, heat), set(), 0
    for keys in trace:
        missing = [key for key in keys if key not in resident]
        misses += len(missing)
        book.use(keys, resident)
        for _ in range(len(resident) + len(missing) - slots):
            victim = min(resident - set(keys), key=getattr(book, name))
            book.age = book.fixed[victim]
            resident.remove(victim)
        for key in missing:
            book.came(key)
            resident.add(key)
    return misses


@pytest.mark.parametrize("name", ["lru", "lfu", "lfuda", "pinned"])
@given(trace=TRACES, slots=SLOTS, heat=HEATS)
def test_policies_are_the_textbooks(name, trace, slots, heat):
    assert simulate(trace, slots, name, heat).misses == textbook_misses(trace, slots, name, heat)


class SlowForecast:
    """The formula of `Forecast` written out: every share is a sum over all past turns."""

    def __init__(self, heat):
        self.heat, self.turns, self.when, self.steps = heat, {}, {}, 0
        self.weights, self.last = [1 / 3] * 3, None

    def shares(self, key):
        turns, found = self.turns.get(key[0], []), []
        for half in Forecast.HALVES:
            fade = 0.5 ** (1 / half)
            share = sum((1 - fade) * fade**age for age, used in enumerate(reversed(turns)) if key[1] in used)
            if self.heat:
                share += self.heat.get(key, 0) * fade ** len(turns)
            elif turns:
                share /= 1 - fade ** len(turns)
            found.append(share)
        return found

    def learn(self, keys):
        parts = []
        for key in keys:
            terms = [weight * (share + 1e-3) for weight, share in zip(self.weights, self.shares(key), strict=True)]
            parts.append([term / sum(terms) for term in terms])
        means = [sum(column) / len(keys) for column in zip(*parts, strict=True)]
        self.weights = [0.99 * weight + 0.01 * mean for weight, mean in zip(self.weights, means, strict=True)]

    def use(self, keys, missing):
        layer, experts = keys[0][0], {expert for _, expert in keys}
        known = self.when.keys() | {layer for layer, _ in self.heat}
        if layer == self.last and len(known) > 1 and not self.turns[layer][-1] & experts:
            self.turns[layer][-1] |= experts
            return
        if missing and self.turns.get(layer):
            self.learn(keys)
        self.turns.setdefault(layer, []).append(experts)
        self.when[layer], self.steps, self.last = self.steps, self.steps + 1, layer

    def expected(self, key):
        chance = sum(weight * share for weight, share in zip(self.weights, self.shares(key), strict=True))
        return 1 / max(chance, 1e-6) + self.when[key[0]] / len(self.when)


@given(trace=TRACES, slots=SLOTS, heat=HEATS)
@settings(max_examples=60)
def test_forecast_evicts_what_its_formula_expects_last(trace, slots, heat):
    """Step by step beside the formula. Layers are ranked when they are visited; weights move by 1 % a step, so the
    formula's own weights may rank another layer's expert a little later than the one chosen."""
    layers = {key[0] for keys in trace for key in keys} | {key[0] for key in heat}
    trace = [[(layer, 0)] for layer in layers] + trace  # from then on the number of layers is known
    policy, slow, resident = make_policy("forecast", slots, heat), SlowForecast(heat), set()
    for keys in trace:
        missing = [key for key in keys if key not in resident]
        slow.use(keys, missing)
        policy.use(keys)
        assert policy.weights.tolist() == pytest.approx(slow.weights)
        count = max(len(resident) + len(missing) - slots, 0)
        for victim in policy.victims(count, set(keys).__contains__):
            idle = resident - set(keys)
            assert victim in idle
            own_layer = [slow.expected(key) for key in idle if key[0] == victim[0]]
            assert slow.expected(victim) >= max(own_layer) * (1 - 1e-9)
            assert slow.expected(victim) >= max(map(slow.expected, idle)) * 0.9
            resident.remove(victim)
        for key in missing:
            policy.add(key)
        resident.update(missing)
        assert len(resident) <= slots


def fewest_misses(trace, slots):
    """Over all choices of who leaves."""
    best = {frozenset(): 0}
    for keys in trace:
        after = {}
        for resident, misses in best.items():
            missing = set(keys) - resident
            count = max(len(resident) + len(missing) - slots, 0)
            for leaving in itertools.combinations(sorted(resident - set(keys)), count):
                state = (resident - set(leaving)) | missing
                after[state] = min(after.get(state, 10**9), misses + len(missing))
        best = after
    return min(best.values())


@given(trace=st.lists(STEP.map(lambda s: [(s[0], expert) for expert in s[1]]), min_size=1, max_size=9), slots=SLOTS)
def test_belady_is_optimal(trace, slots):
    assert simulate(trace, slots, "belady").misses == fewest_misses(trace, slots)


@given(trace=TRACES, slots=SLOTS, heat=HEATS, name=st.sampled_from(sorted(POLICIES)))
def test_no_policy_misses_less_than_belady(trace, slots, heat, name):
    best, found = simulate(trace, slots, "belady"), simulate(trace, slots, name, heat)
    assert best.misses <= found.misses
    assert sum(best) == sum(found) == sum(map(len, trace))


def routing(kind, layers=8, experts=32, k=4, tokens=120):
    """Top-k of random logits: even, with favourites, or with a liking for what the last token used."""
    rng = np.random.default_rng(0)
    favour = rng.normal(size=(layers, experts)) * (1.5 if kind == "skewed" else 0)
    last = np.zeros((layers, experts))
    trace = []
    for _, layer in itertools.product(range(tokens), range(layers)):
        chosen = np.argsort(-(favour[layer] + last[layer] + rng.gumbel(size=experts)))[:k]
        if kind == "sticky":
            last[layer] = 0
            last[layer][chosen] = 3
        trace.append([(layer, int(expert)) for expert in chosen])
    return trace


@pytest.mark.parametrize("kind", ["random", "skewed", "sticky"])
def test_the_default_loses_to_no_other(kind):
    trace = routing(kind)
    for slots in (26, 64, 128, 192):
        hits = {name: simulate(trace, slots, name).hits for name in POLICIES}
        assert hits["forecast"] >= 0.97 * max(hits.values()), (slots, hits)


def test_a_prompt_in_parts_is_one_turn():
    whole, parts = make_policy("forecast", 8), make_policy("forecast", 8)
    for layer in (0, 1, 0, 1):
        keys = [(layer, expert) for expert in range(6)]
        whole.use(keys)
        for first in (0, 2, 4):
            parts.use(keys[first : first + 2])
    assert (whole._layers[1].shares[:, :6] == parts._layers[1].shares[:, :6]).all()
    assert whole._layers[1].turns == parts._layers[1].turns == 2


def test_layers_in_turn_with_a_cache_of_half():
    """What recency is worst at: everything is used again, just after LRU let it go."""
    trace = [[(layer, expert) for expert in range(4)] for _ in range(50) for layer in range(8)]
    assert simulate(trace, 16, "lru").hits == 0
    assert simulate(trace, 16).misses == simulate(trace, 16, "belady").misses


def test_names_and_steps_that_do_not_fit():
    with pytest.raises(UnknownNameError, match="forecast, lfu, lfuda, lru, pinned"):
        simulate([], 4, "fifo")
    with pytest.raises(ConfigError, match="more experts than the 2"):
        simulate([[(0, 0), (0, 1), (0, 2)]], 2)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_removed_or_busy_is_no_victim(name):
    policy, rng = make_policy(name, 8), random.Random(0)
    resident = set()
    for _ in range(300):
        key = (rng.randrange(3), rng.randrange(6))
        policy.use([key])
        if key not in resident:
            policy.add(key)
            resident.add(key)
        if rng.random() < 0.3:
            gone = rng.choice(sorted(resident))
            policy.remove(gone)
            resident.remove(gone)
        busy = set(rng.sample(sorted(resident), len(resident) // 2))
        victims = policy.victims(rng.randrange(4), busy.__contains__)
        assert set(victims) <= resident - busy
        assert len(set(victims)) == len(victims)
        resident -= set(victims)
    assert set(policy.victims(100, lambda _: False)) == resident
