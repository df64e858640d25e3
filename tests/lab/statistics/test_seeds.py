"""Tests over seeds against scipy, verdicts by their rules, and the simulation that holds both to their promise."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from dual_lora.lab.present.document import Table
from dual_lora.lab.report.comparison.blocks import iterate_power_blocks
from dual_lora.lab.report.comparison.comparisons import Comparison, Comparisons, estimate_spreads
from dual_lora.lab.statistics import calibration
from dual_lora.lab.statistics.calibration import Scenario, calibrate_verdicts, find_misses, summarize_worst_cases
from dual_lora.lab.statistics.compare import Difference
from dual_lora.lab.statistics.seeds import (
    MIN_SEEDS,
    SeedTest,
    compute_detectable_difference,
    compute_equivalence_p,
    compute_equivalence_power,
    compute_seed_test,
)
from dual_lora.lab.statistics.verdict import combine_p, find_equivalence_p, reach_verdict

OURS, THEIRS = np.array([0.81, 0.83, 0.82, 0.80, 0.84]), np.array([0.80, 0.80, 0.81, 0.80, 0.81])


def test_the_test_over_seeds_is_scipys_paired_t():
    found = compute_seed_test(OURS - THEIRS)
    expected = ttest_rel(OURS, THEIRS)
    assert found.p == pytest.approx(expected.pvalue) and found.seeds == 5
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.deviation == pytest.approx(np.std(OURS - THEIRS, ddof=1))


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    by_seed = OURS - THEIRS
    sides = [ttest_1samp(by_seed, -0.03, alternative="greater"), ttest_1samp(by_seed, 0.03, alternative="less")]
    assert compute_equivalence_p(by_seed, 0.03) == pytest.approx(max(side.pvalue for side in sides))
    with pytest.raises(ValueError, match="margin 0: a positive number is needed"):
        compute_equivalence_p(by_seed, 0)


def test_seeds_that_all_agree_and_one_seed():
    equal = compute_seed_test([0.1 + 0.2 - 0.3] * 5)  # 5.6e-17, which is no difference
    assert (equal.mean, equal.p, equal.low, equal.high) == (0, 1, 0, 0)
    assert compute_seed_test([0.2] * 5).p == 0 and compute_equivalence_p([0.0] * 5, 0.01) == 0
    alone = compute_seed_test([0.2])
    assert (alone.mean, alone.p, alone.low, compute_equivalence_p([0.2], 1.0)) == (0.2, None, None, None)
    for nothing in ([], [np.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="one finite number a seed is needed"):
            compute_seed_test(nothing)


@pytest.mark.parametrize("same", [0.01, -0.07, 1234.1])
def test_equal_differences_of_enough_seeds_decide_alike_whatever_their_number(same):
    """The mean of ten times 0.01 is not 0.01 in floats, and what it is off by is no deviation of theirs."""
    for seeds in range(MIN_SEEDS, 21):
        for values in ([same] * seeds, [same * (1 + (-1) ** seed * 1e-15) for seed in range(seeds)]):
            found = compute_seed_test(values)
            assert (found.deviation, found.p) == (0, 0) and found.low == found.high == pytest.approx(same, rel=1e-12)
            assert compute_equivalence_p(values, abs(same)) == 1  # a margin apart is not within the margin
            assert compute_equivalence_p(values, abs(same) * 1.001) == 0
            assert compute_equivalence_p(values, abs(same) * 0.999) == 1
    for few in range(2, MIN_SEEDS):  # 2 of 400 examples, twice, say nothing of the spread
        assert compute_seed_test([same] * few) == SeedTest(pytest.approx(same), few, 0.0)
        assert compute_equivalence_p([same] * few, 2 * abs(same)) is None


@pytest.mark.parametrize(("seeds", "comparisons", "least"), [(2, 1, 0), (5, 1, 0), (8, 1, 0), (8, 20, 0), (8, 4, 1.1)])
def test_the_detectable_difference_has_the_power_it_says(seeds, comparisons, least):
    """In simulated studies. (statsmodels' TTestPower says 0.8 for two seeds where the power is 0.46.)"""
    true, rng = compute_detectable_difference(1.0, seeds, comparisons, least), np.random.default_rng(0)
    studies = rng.normal(true, 1, size=(20000, seeds))
    found = ttest_1samp(studies, 0, axis=1).pvalue < 0.05 / comparisons
    assert np.mean(found & (abs(studies.mean(axis=1)) > least)) == pytest.approx(0.8, abs=0.01)
    twice = compute_detectable_difference(2.0, seeds, comparisons, 2 * least)
    assert twice == pytest.approx(2 * true, rel=1e-4)


def test_the_detectable_difference_of_equal_seeds_and_of_one():
    assert compute_detectable_difference(None, 5) is None and compute_detectable_difference(1.0, 1) is None
    assert compute_detectable_difference(0.0, 5) == 0 and compute_detectable_difference(0.0, 5, 3, 0.7) == 0.7


def test_the_power_of_equivalence_is_that_of_simulated_studies():
    rng = np.random.default_rng(0)
    studies = rng.normal(0, 0.5, size=(3000, 8))
    found = np.mean([compute_equivalence_p(study, 0.5) < 0.05 for study in studies])
    assert compute_equivalence_power(0.5, 8, 0.5) == pytest.approx(found, abs=0.03)


# Verdicts


def compared(by_seed, p=0.001, low=None, high=None) -> Difference:
    mean = float(np.mean(by_seed))
    bounds = (mean - 0.005 if low is None else low, mean + 0.005 if high is None else high)
    return Difference(mean, *bounds, p, "paired permutation", 872, len(by_seed), tuple(by_seed))


def judge(difference, margin=0.01, lower_is_better=False) -> str:
    return reach_verdict(
        difference, combine_p(difference), find_equivalence_p(difference, margin), lower_is_better=lower_is_better
    )


def test_better_needs_five_seeds_both_tests_and_the_interval():
    clear = [0.02, 0.021, 0.022, 0.02, 0.019]
    assert judge(compared(clear)) == "better" and judge(compared([-d for d in clear])) == "worse"
    assert judge(compared(clear), lower_is_better=True) == "worse"
    assert judge(compared(clear[:4])) == "undecided"  # four seeds
    assert judge(compared(clear, p=0.2)) == "undecided"  # other examples could have said otherwise
    assert judge(compared(clear, low=-0.001)) == "undecided"
    assert judge(compared([0.09, -0.03, 0.08, -0.02, 0.01])) == "undecided"  # other seeds could have
    assert judge(compared(clear, p=None)) == "undecided"  # not resampled
    assert judge(compared(clear, low=np.nan, high=np.nan)) == "undecided"  # no interval


def test_p_is_the_larger_of_both_tests():
    by_seed = [0.02, 0.01, 0.03, 0.0, 0.02]
    over_seeds = compute_seed_test(by_seed).p
    assert combine_p(compared(by_seed, p=0.001)) == over_seeds and combine_p(compared(by_seed, p=0.9)) == 0.9
    assert combine_p(compared([0.1])) is None and combine_p(Difference(0.1, None, None, 0.01, "", 9, 0)) is None


def test_equal_methods_are_equivalent_where_the_seeds_agree_and_a_margin_is_given():
    near = [0.001, -0.001, 0.002, 0.0, -0.001]
    assert judge(compared(near, p=0.8)) == "equivalent" and judge(compared(near, p=0.8), margin=None) == "undecided"
    assert judge(compared(near, p=0.8), margin=0.0005) == "undecided"
    assert judge(compared(near[:4], p=0.8)) == "undecided"
    small = [0.004, 0.0041, 0.0042, 0.004, 0.0041]  # within the margin, but found
    assert judge(compared(small, low=0.001, high=0.008)) == "better"


# Calibration


SMALL = [Scenario(2, 0.01, 277), Scenario(5, 0.02, 277), Scenario(8, 0.0, 872)]
SMALL += [Scenario(5, 0.0, 277, own=True), Scenario(5, 0.0, 872, gap=0.01)]


def test_a_small_simulation_keeps_its_promises():
    """`make calibration` runs all scenarios with ten times as many studies and tighter bounds."""
    found = calibrate_verdicts(400, scenarios=SMALL)
    bounds = zip(found["covered"], found["studies"], strict=True)
    assert all(abs(share - 0.95) < 4 * (0.95 * 0.05 / studies) ** 0.5 for share, studies in bounds)
    assert (found["different"][:4] <= 0.085).all() and found["different"][0] == 0
    assert found["equivalent"][4] <= 0.09 and found["different"].isna().tolist() == [False] * 4 + [True]
    assert abs(found["equivalent"][2] - found["computed"][2]) < 0.08 and found["computed"][2] > 0.2


def test_a_test_that_forgets_the_examples_is_caught(monkeypatch):
    """Methods that each find other examples hard: over seeds alone they differ, on all examples not."""
    scenario = Scenario(8, 0.0, 277, own=True)
    assert calibrate_verdicts(200, scenarios=[scenario])["different"][0] <= 0.075
    monkeypatch.setattr(calibration, "compute_permutation_p", lambda *_: 0.0)
    monkeypatch.setattr(calibration, "bootstrap_difference", lambda strata, *_: np.array([1.0, 1.0]))
    found = calibrate_verdicts(200, scenarios=[scenario])
    assert found["different"][0] > 0.09 and any("called different in" in miss for miss in find_misses(found))


def test_a_test_that_forgets_the_seeds_is_caught(monkeypatch):
    monkeypatch.setattr(calibration, "ttest_1samp", lambda values, *_, **__: SimpleNamespace(pvalue=0 * values[:, 0]))
    monkeypatch.setattr(calibration, "combine_p", lambda difference: difference.p)
    found = calibrate_verdicts(200, scenarios=[Scenario(5, 0.04, 872)])
    assert found["different"][0] > 0.1 and find_misses(found)


def test_what_breaks_a_promise_is_named():
    row = {"examples": 872, "seeds": 5, "seed SD": 1.0, "methods": "equal", "covered": 0.95, "different": 0.05}
    row |= {"equivalent": 0.40, "computed": 0.41}
    broken = {"covered": 0.90, "different": 0.07, "equivalent": 0.50}
    said = [find_misses(pd.DataFrame([row | {name: value}])) for name, value in broken.items()]
    assert [len(misses) for misses in said] == [1, 1, 1] and not find_misses(pd.DataFrame([row]))
    assert said[0] == ["872 examples, 5 seeds, seed SD 1, equal: intervals cover 90.0%"]
    apart = row | {"methods": "a margin apart", "different": 0.8, "equivalent": 0.07, "computed": None}
    assert "called equivalent in 7.0%" in find_misses(pd.DataFrame([apart]))[0]
    summary = summarize_worst_cases(pd.DataFrame([row, apart]))
    assert summary.startswith("worst cases: equal methods called different 5.0%")


def test_one_method_whose_runs_fail_does_not_widen_the_spread_of_another():
    def compare(baseline: str, points: list[float]) -> Comparison:
        return Comparison("ours", baseline, "glue/stsb", "pearson", {}, compared([p / 100 for p in points]), 100)

    steady, failing = [0.5, -0.5, 0.5, -0.5, 0.0], [0.5, -0.5, 0.5, -0.5, 70.0]
    found = estimate_spreads([compare("steady", steady), compare("failing", failing)])
    assert [c.spread for c in found] == pytest.approx([0.5, np.std(failing, ddof=1)])
    assert found[0].detectable < 1.5 < 50 < found[1].detectable
    (table,) = (block for block in iterate_power_blocks(Comparisons(found, [], [], 2)) if isinstance(block, Table))
    assert list(table.cells["comparison"]) == ["ours - steady", "ours - failing"]

    few = estimate_spreads([compare("one", [0.0, 2.0]), compare("other", [0.0, 0.0]), *found])  # one task's, pooled
    assert [c.spread for c in few[:2]] == pytest.approx([1.0, 1.0]) and few[2:] == found
