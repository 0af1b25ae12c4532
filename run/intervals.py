"""How sure is a difference? A bootstrap interval for means, McNemar's test and Clopper and Pearson's interval for shares.

All three ask what else could have come out. The first draws other held-out rows from those that are there. The other two
know the distribution: a coin that is thrown n times. None of them knows how another seed of the training would come out.
"""
import math

import numpy as np

AT_ONCE = 2**22  # random numbers that are held at the same time: 34 MB


def paired_bootstrap(before, after, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean of after - before, and the two ends of its 95 % interval), by the percentile bootstrap.

    before, after: (n,), the same n examples. Each resample draws n of the n differences, with repetition, and takes their
    mean. The interval has the middle 95 % of these means (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapter 13). What makes an example hard for both cancels in its difference. Cost: resamples * n random numbers. With
    few examples it is too narrow: 20 of them cover the truth in some 93 % of the cases. Raises ValueError without examples.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    difference = after - before
    n = len(difference)
    if before.shape != after.shape or difference.ndim != 1 or n == 0:
        raise ValueError(f"expected two equally long lists with an example or more, found {before.shape} and {after.shape}")
    rng, means = np.random.default_rng(seed), []
    some = max(1, AT_ONCE // n)
    for done in range(0, resamples, some):
        means.append(difference[rng.integers(0, n, (min(some, resamples - done), n))].mean(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def mcnemar(only_before: int, only_after: int) -> float:
    """The p-value of McNemar's exact test, two-sided: how often chance alone makes the two numbers at least so unequal.

    only_before: the questions that only the first one answers rightly; only_after: only the second one. Questions that both
    or none answer rightly say nothing about which is better. If they are equally good, each of the n others falls to either
    side like a coin: 2 P(X <= the smaller number), X binomial with n and 1/2, and at most 1 (McNemar 1947).
    """
    n, fewer = only_before + only_after, min(only_before, only_after)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def at_least(k: int, n: int, p: float) -> float:
    """P(X >= k), X binomial with n throws of probability p, 0 < p < 1."""
    i = np.arange(k, n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in i.tolist()])
    return float(np.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p)).sum())


def lowest(k: int, n: int) -> float:
    """The share p under which k or more of n come with probability 0.025, by bisection: P(X >= k) grows with p."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_least(k, n, middle) < 0.025 else (low, middle)
    return low


def binomial_interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval for a share of which k of n were seen (Biometrika 26, 1934): the shares under
    which neither "k or more" nor "k or fewer" is rarer than 2.5 %. (0, 1) for n = 0, which says nothing.

    It covers the truth in 95 % of the cases or more, whatever the share is.
    """
    low = lowest(k, n) if k > 0 else 0.0
    high = 1 - lowest(n - k, n) if k < n else 1.0  # k or fewer successes are n - k or more failures
    return low, high
