"""Measures over texts and over pairs of experts, against plain loops, simulations and figures known beforehand."""

import itertools
import math
import random

import pytest
import torch

from moekit.moe.measures import Specialisation, domain_shares, expected_pairs, expert_pairs, pair_counts
from tolerances import NEAR

EXACT, _ = NEAR["fp64 scalar"]


def loop_mutual_information(counts):
    """Σ p(d, e) log2(p(d, e) / (p(d) p(e))), every domain as likely."""
    domains, experts = len(counts), len(counts[0])
    joint = [[counts[d][e] / sum(counts[d]) / domains for e in range(experts)] for d in range(domains)]
    bits = 0.0
    for d, e in itertools.product(range(domains), range(experts)):
        p_e = sum(joint[other][e] for other in range(domains))
        if joint[d][e]:
            bits += joint[d][e] * math.log2(joint[d][e] / (1 / domains * p_e))
    return bits


@pytest.mark.parametrize(("domains", "experts"), [(2, 2), (3, 8), (5, 1), (1, 4), (4, 61)])
def test_specialisation_is_the_mutual_information_of_a_loop(domains, experts):
    counts = torch.randint(0, 9, (domains, experts), generator=torch.Generator().manual_seed(experts)) + 1
    counts[0, : experts // 2] = 0
    counts[-1] *= 7
    found = Specialisation.of(3, counts)
    assert found.layer == 3
    assert found.bits == pytest.approx(loop_mutual_information(counts.tolist()), rel=EXACT, abs=EXACT)
    assert found.bits == pytest.approx(sum(found.domains) / domains, rel=EXACT, abs=EXACT)
    assert 0 <= found.bits <= math.log2(min(domains, experts)) + EXACT


def test_specialisation_at_its_ends():
    apart = Specialisation.of(0, torch.tensor([[4, 0, 0, 0], [0, 9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]]))
    assert apart.bits == pytest.approx(2.0)
    assert apart.domains == pytest.approx((2.0,) * 4)
    alike = Specialisation.of(0, torch.tensor([[3, 1], [300, 100]]))
    assert alike.bits == pytest.approx(0.0, abs=1e-12)
    silent = Specialisation.of(0, torch.tensor([[3, 1], [0, 0], [1, 3]]))
    two = Specialisation.of(0, torch.tensor([[3, 1], [1, 3]]))
    assert (silent.bits, silent.chance) == (two.bits, two.chance)
    assert silent.domains == (two.domains[0], 0.0, two.domains[1])
    nothing = Specialisation.of(0, torch.zeros(2, 3, dtype=torch.int64))
    assert (nothing.bits, nothing.chance, nothing.domains) == (0.0, 0.0, (0.0, 0.0))


def test_chance_is_what_texts_without_a_difference_give():
    generator, sizes = torch.Generator().manual_seed(0), (400, 900, 2000)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])
    bits, chances = [], []
    for _ in range(400):
        drawn = [torch.multinomial(shares, size, replacement=True, generator=generator) for size in sizes]
        found = Specialisation.of(0, torch.stack([torch.bincount(ids, minlength=6) for ids in drawn]))
        bits.append(found.bits)
        chances.append(found.chance)
    # The mean of 400 figures that are nearly χ² of 8 degrees of freedom errs by √(2/8/400) = 2.5 %; four times that.
    assert sum(bits) / 400 == pytest.approx(sum(chances) / 400, rel=0.1)


def test_shares_are_those_of_a_loop():
    counts = [[30, 10, 0, 0], [1, 3, 4, 0], [5, 5, 5, 0]]
    shares = domain_shares(torch.tensor(counts))
    for e in range(4):
        rates = [row[e] / sum(row) for row in counts]
        for d in range(3):
            assert shares[d, e].item() == pytest.approx(rates[d] / sum(rates) if sum(rates) else 0.0, rel=EXACT)


def test_pairs_are_counted_as_a_loop_does():
    draw = random.Random(0)
    rows = [draw.sample(range(7), draw.randint(0, 4)) for _ in range(101)]
    ids = torch.tensor([row + [-1] * (4 - len(row)) for row in rows], dtype=torch.int16)
    expected = [[sum(i in row and j in row for row in rows) for j in range(7)] for i in range(7)]
    assert pair_counts(ids, 7).tolist() == expected
    assert pair_counts(ids, 7).dtype == torch.int64


def classic_fit(pairs, rounds=4000):
    """Iterative proportional fitting of a table with an empty diagonal: rows, then columns, over and over."""
    size = len(pairs)
    sums = [sum(row[j] for j in range(size) if j != i) for i, row in enumerate(pairs)]
    table = [[float(i != j and sums[i] > 0 and sums[j] > 0) for j in range(size)] for i in range(size)]
    for _ in range(rounds):
        table = [[value * sums[i] / (sum(row) or 1) for value in row] for i, row in enumerate(table)]
        columns = [sum(column) for column in zip(*table, strict=True)]
        table = [[value * sums[j] / (columns[j] or 1) for j, value in enumerate(row)] for row in table]
    return table


def test_expected_pairs_are_those_of_the_classic_fit():
    draw = random.Random(1)
    rows = [draw.sample([0, 0, 0, 1, 1, 2, 3, 3, 5], 3) for _ in range(500)]
    rows = [sorted(set(row)) for row in rows]
    pairs = [[sum(i in row and j in row for row in rows) for j in range(6)] for i in range(6)]
    before = torch.tensor(pairs)
    expected = expected_pairs(before)
    assert before.tolist() == pairs
    torch.testing.assert_close(expected, torch.tensor(classic_fit(pairs), dtype=torch.float64), rtol=1e-6, atol=1e-9)
    off = torch.tensor(pairs).fill_diagonal_(0).sum(dim=1).double()
    torch.testing.assert_close(expected.sum(dim=1), off, rtol=1e-6, atol=1e-9)
    assert expected[4].sum() == 0


def test_independent_draws_of_unequal_experts_show_no_pair():
    """Two draws, again when equal: the ratio is 1 for every pair, where n_i n_j / T would say 0.6 to 0.8."""
    shares, generator = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.Generator().manual_seed(0)
    two = torch.multinomial(shares, 2 * 200_000, replacement=True, generator=generator).view(-1, 2)
    pairs = pair_counts(two[two[:, 0] != two[:, 1]], 4)
    lifts = (pairs / expected_pairs(pairs))[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(lifts, torch.ones_like(lifts), rtol=0.02, atol=0)  # 6,000 tokens in the rarest: σ 1.3 %


def test_top_pairs_are_ordered_by_tokens_beyond_expectation():
    pairs = torch.zeros(4, 4, dtype=torch.int64)
    for i, j, count in ((0, 1, 50), (2, 3, 30), (0, 2, 10), (1, 3, 10)):
        pairs[i, j] = pairs[j, i] = count
    expected = expected_pairs(pairs)
    found = expert_pairs(9, pairs, top=2)
    assert [(one.layer, one.experts, one.together) for one in found] == [(9, (0, 1), 50), (9, (2, 3), 30)]
    assert found[0].lift == 50 / expected[0, 1].item()
    assert expert_pairs(0, torch.zeros(1, 1, dtype=torch.int64), top=2) == []
