"""The statistics of compare.py: against published values, scipy where it is installed, and by their own claims."""
import numpy as np
import pytest

from run import intervals


def test_the_bootstrap_covers_the_truth():
    """A true mean difference lies in 93 to 97 % of the intervals. The examples' own hardness is 10 times as large as it."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(1000):
        hardness = rng.normal(3, 1, 80)
        before = hardness + rng.normal(0, 0.1, 80)
        after = hardness - 0.05 + rng.gamma(2, 0.05, 80) - 0.1  # skewed, as losses are
        mean, low, high = intervals.paired_bootstrap(before, after, 500, seed=trial)
        assert low < mean < high < low + 0.2  # unpaired, it would be 0.6 wide
        covered += low <= -0.05 <= high
    assert 930 <= covered <= 970


def test_equal_losses_differ_by_exactly_nothing():
    x = np.random.default_rng(1).normal(3, 1, 50)
    assert intervals.paired_bootstrap(x, x) == (0.0, 0.0, 0.0)


def test_the_bootstrap_is_the_plain_loop(monkeypatch):
    """The same in pieces as at once, and as resampling one by one; the same again with the same seed, not with another."""
    before, after = np.random.default_rng(2).normal(0, 1, (2, 30))
    whole = intervals.paired_bootstrap(before, after, 200, seed=3)
    rng = np.random.default_rng(3)
    means = [np.mean([(after - before)[i] for i in rng.integers(0, 30, 30)]) for _ in range(200)]
    assert whole == pytest.approx((np.mean(after - before), *np.percentile(means, (2.5, 97.5))), abs=1e-12)
    monkeypatch.setattr(intervals, "AT_ONCE", 30 * 7)
    assert intervals.paired_bootstrap(before, after, 200, seed=3) == whole
    assert intervals.paired_bootstrap(before, after, 200, seed=4) != whole
    with pytest.raises(ValueError, match="equally long"):
        intervals.paired_bootstrap(before, after[:1])


def test_mcnemar_has_the_known_values():
    assert intervals.mcnemar(0, 0) == intervals.mcnemar(1, 1) == intervals.mcnemar(5, 5) == 1
    assert intervals.mcnemar(0, 5) == 0.0625 and intervals.mcnemar(1, 9) == intervals.mcnemar(9, 1) == 22 / 1024
    stats = pytest.importorskip("scipy.stats")
    for only_before, only_after in ((3, 11), (59, 86), (400, 700)):
        wanted = stats.binomtest(only_before, only_before + only_after).pvalue
        assert intervals.mcnemar(only_before, only_after) == pytest.approx(wanted, rel=1e-9)


def test_clopper_and_pearson_have_the_known_values():
    # 10 of 10: 0.025 ** (1 / 10). 4 of 20: Clopper and Pearson's table, as every textbook rounds it.
    assert intervals.binomial_interval(10, 10) == pytest.approx((0.69150, 1), abs=1e-5)
    assert intervals.binomial_interval(0, 10) == pytest.approx((0, 0.30850), abs=1e-5)
    assert intervals.binomial_interval(4, 20) == pytest.approx((0.05733, 0.43661), abs=1e-5)
    assert intervals.binomial_interval(0, 0) == (0, 1)
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((1, 3), (7, 9), (480, 1000), (1, 5000)):
        wanted = stats.binomtest(k, n).proportion_ci(0.95, "exact")
        assert intervals.binomial_interval(k, n) == pytest.approx(tuple(wanted), abs=1e-9)
