"""Do verdicts and intervals keep their promise? Simulated studies of two methods, judged by the shipped code.

The simulation. Example i is answered wrongly with probability h_i, drawn from a beta distribution with a mean of 9 %. A
run's seed moves its accuracy by a normal number g of standard deviation `spread`: the run answers i wrongly with
probability h_i (1 + g / 9 %). With `own` each method has difficulties of its own, so that two methods that are equal on
all examples differ on the ones at hand: what a test over only seeds cannot see. With `gap` the first method answers
that share more of the examples rightly.

What is promised of two methods:
    different        equal ones are called better or worse in at most 6 % of studies
    coverage         95 % t-intervals hold the true difference on the examples at hand in 93 to 97 %
    equivalent       equal ones are called equivalent within 1 point as often as computed, within 3 points of percent
    too far apart    methods that differ by the margin are called equivalent in at most 6 %

    Q  studies   M  methods (2)   S  seeds   N  examples
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t, ttest_1samp

from dual_lora.lab.statistics.compare import Difference
from dual_lora.lab.statistics.resampling import (
    bootstrap_difference,
    compute_permutation_p,
    group_equal_examples,
)
from dual_lora.lab.statistics.seeds import (
    LEVEL,
    MIN_SEEDS,
    compute_equivalence_power,
)
from dual_lora.lab.statistics.verdict import (
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    combine_p,
    find_equivalence_p,
    reach_verdict,
)
from tasks.measures import mean

ERROR_RATE = 0.09
SHAPE = 0.6  # of the beta distribution: most examples are easy, few are hard
MARGIN = 0.01
RESAMPLES = 400
OWN_DIFFICULTY_DIVISOR = 4  # of the studies with difficulties of their own: most need tests on predictions
BLOCK = 100  # studies drawn at once, which bounds memory
MAX_DIFFERENT, MAX_TOO_FAR, COVERAGE, TOLERANCE = 0.06, 0.06, (0.93, 0.97), 0.03
SEEDS, SPREADS, EXAMPLES = (2, 3, 5, 8), (0.0, 0.005, 0.01, 0.02, 0.04), (277, 872)


@dataclass(frozen=True)
class Scenario:
    """One kind of study: seeds a method, the seeds' standard deviation and the gap as shares, and test examples."""

    seeds: int
    spread: float
    examples: int
    own: bool = False
    gap: float = 0.0


def list_scenarios() -> list[Scenario]:
    """Return the scenarios: equal methods with common and with own difficulties, and methods a margin apart."""
    grid = [(s, spread, n) for n in EXAMPLES for s in SEEDS for spread in SPREADS]
    decided = [cell for cell in grid if cell[0] >= MIN_SEEDS]
    equal = [Scenario(*cell) for cell in grid]
    return [
        *equal,
        *(Scenario(*cell, own=True) for cell in decided),
        *(Scenario(*cell, gap=MARGIN) for cell in decided),
    ]


def simulate_studies(scenario: Scenario, studies: int, rng: np.random.Generator) -> dict[str, object]:
    """Return the shares of verdicts and covering intervals under a scenario, one row of the table."""
    verdicts, covered, variances = [], [], []
    for count in [min(BLOCK, studies - start) for start in range(0, studies, BLOCK)]:
        right_QMSN, truth_Q = draw_studies(scenario, count, rng)
        difference_QS = right_QMSN[:, 0].mean(axis=2, dtype=float) - right_QMSN[:, 1].mean(axis=2, dtype=float)
        variances.append(difference_QS.var(axis=1, ddof=1))
        covered += covers_truth(difference_QS, truth_Q).tolist()
        verdicts += judge_studies(scenario, right_QMSN, difference_QS, rng)
    deviation = float(np.sqrt(np.concatenate(variances).mean()))
    computed = scenario.seeds >= MIN_SEEDS and not scenario.own and not scenario.gap
    return {
        "examples": scenario.examples,
        "seeds": scenario.seeds,
        "seed SD": 100 * scenario.spread,
        "methods": "a margin apart" if scenario.gap else "equal, own difficulties" if scenario.own else "equal",
        "studies": studies,
        "covered": float(np.mean(covered)),
        "different": None if scenario.gap else float(np.mean([verdict in (BETTER, WORSE) for verdict in verdicts])),
        "equivalent": float(np.mean([verdict == EQUIVALENT for verdict in verdicts])),
        "computed": compute_equivalence_power(deviation, scenario.seeds, MARGIN) if computed else None,
    }


def judge_studies(
    scenario: Scenario, right_QMSN: np.ndarray, difference_QS: np.ndarray, rng: np.random.Generator
) -> list[str]:
    """Return the verdicts on studies. The tests over seeds are computed for all at once; `judge_study`, which also
    tests the predictions, is needed only where the seeds differ."""
    if scenario.seeds < MIN_SEEDS:
        return [UNDECIDED] * len(difference_QS)
    p_Q = ttest_1samp(difference_QS, 0, axis=1).pvalue
    sides = ((-MARGIN, "greater"), (MARGIN, "less"))
    p_equivalent_Q = np.max([ttest_1samp(difference_QS, m, axis=1, alternative=a).pvalue for m, a in sides], axis=0)
    verdicts = [EQUIVALENT if p < LEVEL else UNDECIDED for p in p_equivalent_Q]
    for number in np.flatnonzero(p_Q < LEVEL) if not scenario.gap else ():
        verdicts[number] = judge_study(right_QMSN[number], difference_QS[number], rng)
    return verdicts


def draw_studies(scenario: Scenario, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return which answers are right, of shape (Q, M, S, N), and the true difference on the drawn examples, (Q,)."""
    shape = (count, 2 if scenario.own else 1, 1, scenario.examples)
    hard = rng.beta(SHAPE, SHAPE * (1 - ERROR_RATE) / ERROR_RATE, size=shape).astype(np.float32)
    moved = scenario.spread * rng.standard_normal((count, 2, scenario.seeds, 1), dtype=np.float32)
    moved[:, 0] -= scenario.gap
    wrong = np.clip(hard * (1 + moved / ERROR_RATE), 0, 1)
    right = rng.random((count, 2, scenario.seeds, scenario.examples), dtype=np.float32) >= wrong
    means = hard.mean(axis=(2, 3)) * (1 - np.array([scenario.gap, 0.0]) / ERROR_RATE)
    return right, (means[:, 1] - means[:, 0]).astype(float)


def covers_truth(difference_QS: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    """Return whether each study's t-interval holds its true difference."""
    seeds = difference_QS.shape[1]
    half = t.ppf(1 - LEVEL / 2, seeds - 1) * difference_QS.std(axis=1, ddof=1) / np.sqrt(seeds)
    return np.abs(difference_QS.mean(axis=1) - truth_Q) <= half + 1e-12


def judge_study(right_MSN: np.ndarray, by_seed: np.ndarray, rng: np.random.Generator) -> str:
    """Return the verdict on one study as a report would."""
    average, values = float(by_seed.mean()), tuple(by_seed.tolist())
    strata = [group_equal_examples(right_MSN[..., None].astype(float))]
    p, low, high = compute_permutation_p(strata, mean, average, RESAMPLES, rng), average, average
    if p < LEVEL:  # else the interval decides nothing
        low, high = np.percentile(bootstrap_difference(strata, mean, RESAMPLES, rng), (2.5, 97.5))
    found = Difference(average, low, high, p, "", right_MSN.shape[2], len(values), values)
    return reach_verdict(found, combine_p(found), find_equivalence_p(found, MARGIN))


def calibrate_verdicts(studies: int, seed: int = 0, scenarios: list[Scenario] | None = None) -> pd.DataFrame:
    """Return a row for every scenario. studies: of each; with `own`, a quarter of them."""
    rng = np.random.default_rng(seed)
    counts = [
        (scenario, studies // OWN_DIFFICULTY_DIVISOR if scenario.own else studies)
        for scenario in scenarios or list_scenarios()
    ]
    return pd.DataFrame([simulate_studies(scenario, count, rng) for scenario, count in counts])


def find_misses(found: pd.DataFrame) -> list[str]:
    """Return every promise that the table breaks, one line each."""
    return [
        f"{row['examples']} examples, {row['seeds']} seeds, seed SD {row['seed SD']:g}, {row['methods']}: {said}"
        for row in found.to_dict("records")
        for said in iterate_misses(row)
    ]


def iterate_misses(row: dict) -> Iterator[str]:
    """Yield what one row of the table misses."""
    if not COVERAGE[0] <= row["covered"] <= COVERAGE[1]:
        yield f"intervals cover {row['covered']:.1%}"
    if row["methods"] == "a margin apart":
        if row["equivalent"] > MAX_TOO_FAR:
            yield f"called equivalent in {row['equivalent']:.1%}"
    elif row["different"] > MAX_DIFFERENT:
        yield f"called different in {row['different']:.1%}"
    if not pd.isna(row["computed"]) and abs(row["equivalent"] - row["computed"]) > TOLERANCE:
        yield f"called equivalent in {row['equivalent']:.1%}, computed {row['computed']:.1%}"


def summarize_worst_cases(found: pd.DataFrame) -> str:
    """Return the worst cases of a table in one line."""
    equal = found[found["methods"] != "a margin apart"]
    apart = found[found["methods"] == "a margin apart"]
    off = (found["equivalent"] - found["computed"]).abs().max()
    return (
        f"worst cases: equal methods called different {equal['different'].max():.1%} (at most {MAX_DIFFERENT:.0%}); "
        f"intervals cover {found['covered'].min():.1%} to {found['covered'].max():.1%} "
        f"({COVERAGE[0]:.0%} to {COVERAGE[1]:.0%}); equivalence is {100 * off:.1f} points off its computed power "
        f"(at most {100 * TOLERANCE:g}); methods a margin apart called equivalent {apart['equivalent'].max():.1%} "
        f"(at most {MAX_TOO_FAR:.0%})"
    )
