import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomal.tasks.philox import below, distinct, normal, permutations, philox, random_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**40), draws=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_words_depend_on_their_own_index_alone(seed, index, draws):
    alone = random_words(seed, 3, torch.tensor([index]), draws)
    among = random_words(seed, 3, torch.tensor([0, index, 7]), draws + 4)
    assert torch.equal(alone[0], among[1, :draws])
    assert not torch.equal(
        random_words(seed, 4, torch.tensor([index]), 8), random_words(seed, 3, torch.tensor([index]), 8)
    )
    assert not torch.equal(
        random_words(seed ^ (1 << 63), 3, torch.tensor([index]), 8), random_words(seed, 3, torch.tensor([index]), 8)
    )


def test_uniform_has_the_moments_of_the_uniform_distribution():
    u = uniform(random_words(0, 0, torch.arange(1000), 100), -1.0, 3.0)
    assert u.min() >= -1
    assert u.max() < 3
    n = u.numel()
    assert abs(u.mean() - 1.0) < 4 * (4 / 12**0.5) / n**0.5
    assert abs(u.var() - 16 / 12) < 0.02


def test_normal_has_the_distribution_of_standard_normal_values():
    rows = 100_000
    values = normal(random_words(3, 0, torch.arange(rows), 8))
    x, n = values.flatten(), values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * (variance / n) ** 0.5
    for half in values.chunk(2, -1):  # the cosines and the sines
        assert half.mean().abs() < 5 / (n / 2) ** 0.5
    exact = torch.special.ndtr(x.sort().values)
    empirical = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(empirical[1:] - exact, exact - empirical[:-1]).max()  # Kolmogorov's
    assert distance < (math.log(2e6) / (2 * n)) ** 0.5  # exceeded once in 1e6, by Dvoretzky, Kiefer & Wolfowitz 1956
    for power in (1, 2):  # a pair shares its radius, which must not show
        correlations = torch.corrcoef((values**power).T) - torch.eye(8, dtype=torch.float64)
        assert correlations.abs().max() < 5 / rows**0.5


def test_normal_is_finite_for_every_word():
    ends = torch.tensor([0, 2**32 - 1])
    values = normal(torch.cartesian_prod(ends, ends))
    assert values.isfinite().all()
    assert values.abs().max() == pytest.approx((64 * math.log(2)) ** 0.5)  # of the smallest of 2**32 radii


def test_below_reaches_every_value_equally_often():
    counts = below(random_words(1, 0, torch.arange(700), 100), 7).flatten().bincount(minlength=7)
    expected = 10_000
    chi_square = ((counts - expected).double() ** 2 / expected).sum()
    assert len(counts) == 7
    assert chi_square < 22.5  # 99.9 % quantile, 6 degrees of freedom


@given(population=st.integers(1, 40), data=st.data())
@settings(max_examples=50, deadline=None)
def test_distinct_draws_without_repeats_inside_the_population(population, data):
    m = data.draw(st.integers(1, population))
    chosen = distinct(random_words(data.draw(st.integers(0, 9)), 0, torch.arange(20), m), population)
    assert all(len(set(row)) == m and min(row) >= 0 and max(row) < population for row in chosen.tolist())


def test_distinct_makes_every_ordered_selection_equally_likely():
    chosen = distinct(random_words(5, 0, torch.arange(24_000), 3), 4)
    counts = Counter(map(tuple, chosen.tolist()))
    assert set(counts) == set(itertools.permutations(range(4), 3))
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 49.7  # 99.9 % quantile, 23 degrees of freedom


def test_distinct_takes_a_population_for_each_row():
    population = torch.tensor([3, 50])
    chosen = distinct(random_words(0, 0, torch.arange(1000), 6).view(1000, 2, 3), population.expand(1000, 2))
    assert chosen[:, 0].max() == 2
    assert chosen[:, 1].max() == 49


def test_permutations_are_uniform():
    counts = Counter(map(tuple, permutations(random_words(2, 0, torch.arange(6000), 3)).tolist()))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 20.5  # 99.9 % quantile, 5 degrees of freedom
