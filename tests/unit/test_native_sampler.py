"""Random numbers and sampling of single tokens."""

import pytest
import torch

from torchrft.rollout.native.sampler import keep_likely, sample, uniforms


def splitmix64(seed, position):
    """The generator in Python's own integers, from the paper's listing."""
    mask = 2**64 - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniforms_fixed_values():
    """The published first outputs for the seed 1234567, by their upper 53 bits."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64(1234567, i) for i in range(5)] == published
    got = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert got.dtype == torch.float64
    assert got.tolist() == [(x >> 11) / 2**53 for x in published]


def test_uniforms_of_any_seed():
    seeds = [0, 1, 2**62 - 1, 2**63 - 1, -1, -(2**63), 8203414616412130826]
    for position in (0, 1, 10_000):
        got = uniforms(torch.tensor(seeds), torch.full((len(seeds),), position))
        assert got.tolist() == [(splitmix64(seed, position) >> 11) / 2**53 for seed in seeds]


# Found by running the generator backwards.
LOWEST_SEED, HIGHEST_SEED = 7046029254386353131, 3558559446808474027


def chi_square(counts, probs):
    """Standard deviations by which Pearson's statistic exceeds its mean; a fixed seed decides."""
    counts, probs = (torch.as_tensor(x, dtype=torch.float64) for x in (counts, probs))
    expected = probs * counts.sum()
    assert expected[probs > 0].min() > 5
    assert counts[probs == 0].sum() == 0
    freedom = int((probs > 0).sum()) - 1
    statistic = ((counts - expected)[probs > 0] ** 2 / expected[probs > 0]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (torch.arange(20_000), torch.zeros(20_000, dtype=torch.long)),
        (torch.zeros(20_000, dtype=torch.long), torch.arange(20_000)),
    ],
    ids=["neighboring seeds", "one sequence"],
)
def test_uniforms_are_uniform_and_independent(seeds, positions):
    values = uniforms(seeds, positions)
    assert values.min() >= 0
    assert values.max() < 1
    flat = torch.full((100,), 0.01)
    assert abs(chi_square((values * 100).long().bincount(minlength=100), flat)) < 4
    # Pairs of neighbors fill the unit square evenly.
    pairs = (values[:-1] * 10).long() * 10 + (values[1:] * 10).long()
    assert abs(chi_square(pairs.bincount(minlength=100), flat)) < 4
    # The last bits are as good as the first.
    low = (values * 2**53).long() % 100
    assert abs(chi_square(low.bincount(minlength=100), flat)) < 4
    assert abs(torch.corrcoef(torch.stack([values, values.roll(1)]))[0, 1]) < 0.03
    assert len(set(values.tolist())) == 20_000


def test_uniforms_of_two_sequences_are_independent():
    positions = torch.arange(20_000)
    first, second = (uniforms(torch.full_like(positions, seed), positions) for seed in (5, 6))
    pairs = (first * 10).long() * 10 + (second * 10).long()
    assert abs(chi_square(pairs.bincount(minlength=100), torch.full((100,), 0.01))) < 4


PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3, 4]),
        (1.0, 5, [0, 1, 2, 3, 4]),
        (1.0, 99, [0, 1, 2, 3, 4]),
        (1.0, 1, [1]),
        (1.0, 3, [1, 3, 4]),
        (0.01, 0, [1]),
        (0.39, 0, [1]),
        (0.41, 0, [1, 3]),
        (0.69, 0, [1, 3]),
        (0.71, 0, [1, 3, 4]),
        (0.94, 0, [0, 1, 3, 4]),
        (0.96, 0, [0, 1, 2, 3, 4]),
        # top_p counts within what top_k left: 0.4 and 0.3 of 0.85.
        (0.81, 3, [1, 3]),
        (0.83, 3, [1, 3, 4]),
    ],
)
def test_keep_likely(top_p, top_k, kept):
    got = keep_likely(PROBS, top_p, top_k)
    assert got.nonzero()[:, 1].tolist() == kept
    assert torch.equal(got[0, kept], PROBS[0, kept])


def test_keep_likely_keeps_ties_and_works_row_by_row():
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    assert (keep_likely(probs, 0.5, 0) > 0).tolist() == [
        [True] * 4,
        [True, False, False, False],
        [False, False, False, True],
    ]
    assert (keep_likely(probs, 1.0, 2) > 0).tolist() == [[True] * 4] * 3


LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.2, -0.5, 0.9])


def draw(count=20_000, temperature=1.0, top_p=1.0, top_k=0, forbidden=None):
    """Counts of the tokens over `count` seeds, and the log-prob of each token that came."""
    logits = LOGITS.expand(count, -1)
    seeds, positions = torch.arange(count), torch.zeros(count, dtype=torch.long)
    if forbidden is not None:
        forbidden = torch.tensor(forbidden).expand(count, -1)
    tokens, logprobs = sample(logits, seeds, positions, temperature, top_p, top_k, forbidden)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    return tokens.bincount(minlength=6), dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 3.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 3}, [2, 3, 5]),
        ({"top_k": 2, "temperature": 2.0}, [2, 3]),
        ({"top_p": 0.7}, [2, 3, 5]),
        ({"top_p": 0.8, "temperature": 0.5}, [2, 3]),
        ({"forbidden": [False, False, True, False, False, True]}, [0, 1, 3, 4]),
    ],
)
def test_frequencies_are_the_probabilities(options, kept):
    counts, logprobs = draw(**options)
    all_probs = (LOGITS.double() / options.get("temperature", 1.0)).softmax(-1)
    probs = torch.zeros(6, dtype=torch.float64)
    probs[kept] = all_probs[kept] / all_probs[kept].sum()
    assert abs(chi_square(counts, probs)) < 4
    # Log-probs are those of the whole distribution, whatever was left out.
    assert sorted(logprobs) == kept
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(all_probs[token].log().item(), abs=1e-6)


def test_greedy():
    counts, logprobs = draw(100, temperature=0.0)
    assert counts.tolist() == [0, 0, 100, 0, 0, 0]
    assert logprobs[2] == pytest.approx(LOGITS.log_softmax(-1)[2].item(), abs=1e-6)
    counts, logprobs = draw(100, temperature=0.0, forbidden=[False, False, True] + [False] * 3)
    assert counts.tolist() == [0, 0, 0, 100, 0, 0]
    assert logprobs[3] == pytest.approx(LOGITS.log_softmax(-1)[3].item(), abs=1e-6)
    assert draw(100, top_k=1)[0].tolist() == [0, 0, 100, 0, 0, 0]


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(50_000, -1)
    seeds = torch.arange(50_000)
    tokens, _ = sample(logits, seeds, torch.zeros_like(seeds), 1.0, 1.0, 0)
    assert set(tokens.tolist()) == {1, 3}


def test_the_smallest_and_the_largest_random_number():
    """Nor at the ends, where 0 and 1 - 2^-53 point; these seeds give them."""
    seeds, positions = torch.tensor([LOWEST_SEED, HIGHEST_SEED]), torch.zeros(2, dtype=torch.long)
    assert uniforms(seeds, positions).tolist() == [0.0, 1 - 2**-53]
    for ends in (-torch.inf, 0.3):
        for _ in range(20):
            logits = torch.cat([torch.tensor([ends]), torch.randn(9), torch.tensor([ends])])
            tokens, _ = sample(logits.expand(2, -1), seeds, positions, 1.0, 1.0, 0)
            assert tokens.tolist() == ([0, 10] if ends == 0.3 else [1, 9])


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator)
    seeds, positions = torch.arange(100, 108), torch.arange(8)
    arguments = (0.9, 0.8, 20)
    tokens, logprobs = sample(logits, seeds, positions, *arguments)
    order = torch.tensor([3, 0, 7])
    again = sample(logits[order], seeds[order], positions[order], *arguments)
    assert again[0].tolist() == tokens[order].tolist()
    torch.testing.assert_close(again[1], logprobs[order])


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    seeds = torch.arange(4)
    tokens, logprobs = sample(logits, seeds, seeds, 0.7, 1.0, 0)
    wanted = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-5)


def test_a_forbidden_token_of_all_probability_leaves_the_others():
    """Beside it the others' probabilities are 0 in float32; among themselves they are not."""
    logits = torch.tensor([[0.0, 500.0, 1.0, 0.5]]).repeat(400, 1)
    forbidden = torch.tensor([[False, True, False, False]]).repeat(400, 1)
    places = torch.arange(400)
    tokens, logprobs = sample(logits, places, places, 1.0, 1.0, 0, forbidden)
    counts = tokens.bincount(minlength=4)
    assert counts[1] == 0
    expected = 400 * torch.tensor([0.0, 1.0, 0.5]).softmax(0)
    assert counts[[0, 2, 3]].tolist() == pytest.approx(expected.tolist(), abs=40)
    assert logprobs[tokens == 2].tolist() == pytest.approx([-499.0] * int(counts[2]))
