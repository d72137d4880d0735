"""Seeded sampling: the right distribution, and nothing but seed and position decides."""

import torch

from megatron_dsrl.platform.sglang_cpu.inverse_sampling import pick, uniform_numbers

SEEDS = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))


def test_the_numbers_are_those_of_splitmix64() -> None:
    def splitmix64(state: int, steps: int) -> int:
        mask = 2**64 - 1
        z = (state + steps * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seeds, positions = [0, 1, 2**63 - 1], [0, 7, 40_000]
    expected = [(splitmix64(splitmix64(s, 0), p + 1) >> 16) / 2**48 for s, p in zip(seeds, positions)]
    assert uniform_numbers(torch.tensor(seeds), torch.tensor(positions)).tolist() == expected


def test_samples_follow_the_distribution() -> None:
    weights = torch.tensor([0.0, 4.0, 0.0, 1.0, 3.0, 2.0, 0.0])  # not normalised, zeros at both ends
    positions = torch.arange(4096)
    uniform = torch.cat([uniform_numbers(seed.expand(4096), positions) for seed in SEEDS])  # all seeds, all positions
    counts = torch.bincount(pick(weights.expand(len(uniform), -1), uniform), minlength=7)
    expected = weights / weights.sum() * len(uniform)
    assert (counts[weights == 0] == 0).all()
    statistic = ((counts - expected)[weights > 0] ** 2 / expected[weights > 0]).sum()
    assert statistic < 16.3  # chi-squared, 3 degrees of freedom: 1 in 1000


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Correlations of 65,536 pairs of uniform numbers: a standard deviation is 0.004."""
    grid = torch.stack([uniform_numbers(SEEDS[:1].expand(256) + s, torch.arange(256)) for s in range(257)])
    for one, other in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_the_largest_number_picks_the_last_entry_with_weight() -> None:
    weights = torch.rand(200, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    weights[:, -3:] = 0
    assert (pick(weights, torch.full((200,), 1 - 2.0**-48, dtype=torch.float64)) == 46).all()
