"""What came out of comparing rows with baselines: the planned family, and all else, which is exploratory.

The planned family are the main scores of the rows an experiment plans, its contrasts, and their means over tasks. Its
p-values are corrected together. What belongs to it follows from the experiment and the command, never from a result: a
comparison that cannot be tested, or not yet, counts as p = 1. Further scores of a published table's columns, single
sets and other metrics are exploratory.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.comparison.contrasts import iterate_contrasts
from dual_lora.lab.report.comparison.floors import get_model_task
from dual_lora.lab.report.comparison.matches import (
    Key,
    Match,
    Predictions,
    check_same_inputs,
    compute_mean,
    iterate_matches,
)
from dual_lora.lab.report.values import FIELDS, UNLEARNED, ModelTask, get_unit, list_columns
from dual_lora.lab.statistics.compare import Difference, compare_means, is_resampled
from dual_lora.lab.statistics.multiple import adjust_holm
from dual_lora.lab.statistics.pairing import RowsBySeed
from dual_lora.lab.statistics.seeds import MIN_SEEDS, SeedTest, compute_detectable_difference, compute_seed_test
from dual_lora.lab.statistics.verdict import combine_p, find_equivalence_p, reach_verdict
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome

OVER_SEEDS = "t-test over seeds"
MODEL_SETTING = "model.name"
DIFFERENCE_DECIMALS = {100: 1, 1: 3}  # of a printed difference, by `get_unit`


@dataclass(frozen=True)
class Comparison:
    """A row minus a baseline by one score, on one task or in the mean over several.

    Attributes:
        task, score: as they are printed.
        place: the settings that head rows and columns, and their values.
        difference: in the score's unit, which `unit` turns into points.
        margin: what difference counts as none, in points.
        p, p_equivalent: of a difference and of equivalence; corrected in the planned family.
        family: how many comparisons they are corrected for.
        untested: why it has no p: its task was not learned or is not known to be, or, of a planned one, how much of its
            seeds or tasks there is (looking repeatedly and stopping at a pleasing result produces false positives).
        contrast: whether it sets several runs of one row against each other.
        model: the name of its model.
        decimals: with how many a difference is printed.
        machines: those that runs of equal seeds are from, where there are several.
        spread: standard deviation of the seeds' differences in points. That of fewer than MIN_SEEDS seeds is hardly
            known, so it is pooled over the comparisons of its `pool` with as few.
    """

    label: str
    baseline: str
    task: str
    score: str
    place: dict[str, object]
    difference: Difference
    unit: int
    margin: float | None = None
    lower_is_better: bool = False
    planned: bool = False
    p: float | None = None
    p_equivalent: float | None = None
    family: int = 1
    untested: str = ""
    spread: float | None = None
    contrast: bool = False
    model: str = ""
    decimals: int = DIFFERENCE_DECIMALS[100]
    machines: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The two rows."""
        return f"{self.label} - {self.baseline}"

    @functools.cached_property
    def seed_test(self) -> SeedTest | None:
        """The t-test over seeds, in points; None where no seed's difference is known."""
        by_seed = [value * self.unit for value in self.difference.by_seed]
        return compute_seed_test(by_seed) if by_seed else None

    @property
    def pool(self) -> Key:
        """What comparisons with a common spread share: the model, where it heads rows, the task and the score. A
        contrast averages over runs, which lowers its spread."""
        return self.place.get(MODEL_SETTING), self.task, self.score + (", contrast" if self.contrast else "")

    @property
    def detectable(self) -> float | None:
        """The smallest difference that this design finds in four of five studies, in points: by the t-test over seeds
        at the strictest step of the correction, and with an interval over examples and seeds, taken to be as wide as
        it is here, that excludes zero. None with too few seeds for a verdict."""
        if self.difference.seeds < MIN_SEEDS:
            return None
        low, high = self.difference.low, self.difference.high
        over_examples = None not in (low, high) and self.difference.test != OVER_SEEDS
        least = (high - low) / 2 * self.unit if over_examples else 0.0
        return compute_detectable_difference(self.spread, self.difference.seeds, self.family, least)

    @property
    def verdict(self) -> str:
        """One of the words of `statistics.verdict`."""
        return reach_verdict(self.difference, self.p, self.p_equivalent, self.lower_is_better)


@dataclass(frozen=True)
class Comparisons:
    """The planned family as far as it has runs, and the exploratory comparisons by main scores and by further ones.

    family: how many comparisons are planned, tested or not.
    """

    planned: list[Comparison]
    exploratory: list[Comparison]
    further: list[Comparison]
    family: int

    @property
    def all(self) -> list[Comparison]:
        """Every comparison, the planned ones first."""
        return [*self.planned, *self.exploratory, *self.further]


def compare_outcomes(
    experiment: Experiment,
    outcomes: list[Outcome],
    predictions: Predictions,
    unranked: Mapping[ModelTask, str] | None = None,
) -> Comparisons:
    """Return every comparison.

    unranked: of `find_unranked`: models and tasks that are not tested. Means leave out those that were not learned, and
        lack those of which that is not known.
    """
    matches, plan = list_matches(experiment, outcomes), list_planned(experiment, outcomes)
    family, unranked = len(plan), unranked or {}
    tested = {match: list(compare_match(experiment, outcomes, match, predictions, family)) for match in matches}
    for match, some in tested.items():
        if reason := unranked.get(get_model_task(match.first)):
            tested[match] = [leave_untested(comparison, f"task {reason}") for comparison in some]
    found = [mark_unfinished(some[0], plan.get(get_key(match), []), 1) for match, some in tested.items()]
    ranked = [match for match in matches if get_model_task(match.first) not in unranked]
    for key, group in list_mean_groups(ranked).items():
        if key in plan or not is_planned(experiment, group[0]):
            wanted = [m for m in plan.get(key, []) if unranked.get(get_model_task(m.first)) != UNLEARNED]
            mean = average_over_tasks(experiment, {match: tested[match][0] for match in group})
            found.append(mark_unfinished(mean, wanted, len(group)))
    further = [comparison for some in tested.values() for comparison in some[1:]]
    spread = estimate_spreads([*found, *further])
    main, further = spread[: len(found)], spread[len(found) :]
    planned = correct_family([c for c in main if c.planned], family)
    return Comparisons(planned, [c for c in main if not c.planned], further, family)


def list_matches(experiment: Experiment, outcomes: list[Outcome]) -> list[Match]:
    """Return what is compared by main scores, without means over tasks, as far as runs are finished."""
    return [*iterate_matches(experiment, outcomes), *iterate_contrasts(experiment, outcomes)]


def list_planned(experiment: Experiment, outcomes: list[Outcome]) -> dict[Key, list[Match]]:
    """Return the comparisons that the experiment plans on these outcomes, whether or not their runs are finished and
    whatever they found: the matches each is made of, by `get_key` or, for means, `get_row_key`."""
    matches = list_matches(experiment, list(map(pretend_finished, outcomes)))
    planned = [match for match in matches if is_planned(experiment, match)]
    return {get_key(match): [match] for match in planned} | list_mean_groups(planned)


def get_row_key(match: Match) -> Key:
    """Return what the means over tasks have in common that a match belongs to: row, baseline and place."""
    return match.label, match.baseline, tuple(match.place.items())


def get_key(match: Match) -> Key:
    """Return what tells a match from the others."""
    return *get_row_key(match), match.task.name


def mark_unfinished(comparison: Comparison, plan: list[Match], tasks: int) -> Comparison:
    """Return a planned comparison without its p-values if it is of fewer tasks or seeds than planned; any other one as
    it is. plan: what it should be made of; empty: it is not planned. tasks: of how many it is."""
    if not plan or not comparison.difference.by_seed:
        return comparison
    seeds = set.intersection(*(set(match.seeds) for match in plan))
    here = {"tasks": (tasks, len(plan)), "seeds": (len(comparison.difference.by_seed), len(seeds))}
    missing = [f"{count} of {wanted} {what}" for what, (count, wanted) in here.items() if count < wanted]
    return leave_untested(comparison, ", ".join(missing)) if missing else comparison


def leave_untested(comparison: Comparison, why: str) -> Comparison:
    """Return a comparison without its p-values."""
    return replace(comparison, untested=why, p=None, p_equivalent=None)


def pretend_finished(outcome: Outcome) -> Outcome:
    """Return an outcome as if its run had finished, whatever came out of it."""
    return replace(outcome, result={"metrics": {}})


def is_planned(experiment: Experiment, match: Match) -> bool:
    """Return whether the main score of a match belongs to the planned family."""
    return match.contrast or match.label in experiment.planned


def estimate_spreads(found: list[Comparison]) -> list[Comparison]:
    """Return comparisons with their spread: methods differ in how often a run fails, so each has its own if it can."""
    deviations = [c.seed_test.deviation if c.seed_test else None for c in found]
    variances: dict[Key, list[float]] = {}
    for c, deviation in zip(found, deviations, strict=True):
        if deviation is not None and c.difference.seeds < MIN_SEEDS:
            variances.setdefault(c.pool, []).append(deviation**2)
    pooled = {key: float(np.sqrt(np.mean(some))) for key, some in variances.items()}
    return [
        replace(c, spread=pooled.get(c.pool) if c.difference.seeds < MIN_SEEDS else deviation)
        for c, deviation in zip(found, deviations, strict=True)
    ]


def compare_match(
    experiment: Experiment, outcomes: list[Outcome], match: Match, predictions: Predictions, family: int
) -> Iterator[Comparison]:
    """Yield a match by its task's main score, and a row by further ones. family: how many comparisons are planned."""
    planned, task = is_planned(experiment, match), match.task
    metrics = [task.metric, *(() if match.contrast else list_further_scores(experiment, outcomes, match))]
    sides, error = None, None
    try:
        check_same_inputs(match)
        sides = [[predictions.read_runs(column) for column in side] for side in (match.ours, match.theirs)]
    except UserError as found:
        error = found
    for metric in metrics:
        main = metric == task.metric
        count = family if planned and main else 1
        difference = compare_scores(match, sides, metric, count) if sides else describe_unknown(error)
        unit = get_unit(task, metric)
        yield add_tests(
            Comparison(
                label=match.label,
                baseline=match.baseline,
                task=task.name,
                score=metric,
                place=match.place,
                difference=difference,
                unit=unit,
                margin=experiment.margin.get("task") if unit == 100 else None,
                lower_is_better=task.is_lower_better(metric),
                planned=planned and main,
                contrast=match.contrast,
                model=match.first.settings.model.name,
                decimals=DIFFERENCE_DECIMALS[unit],
                machines=match.mixed_machines,
            )
        )


def describe_over_seeds(by_seed: tuple[float, ...], examples: int) -> Difference:
    """Return a difference that is tested only over seeds. by_seed: at least one."""
    test = compute_seed_test(by_seed)
    return Difference(test.mean, test.low, test.high, test.p, OVER_SEEDS, examples, len(by_seed), by_seed)


def add_tests(comparison: Comparison) -> Comparison:
    """Return a comparison with its p-values, before any correction."""
    margin = comparison.margin and comparison.margin / comparison.unit
    p_equivalent = find_equivalence_p(comparison.difference, margin)
    return replace(comparison, p=combine_p(comparison.difference), p_equivalent=p_equivalent)


def list_further_scores(experiment: Experiment, outcomes: list[Outcome], match: Match) -> list[str]:
    """Return the scores other than the main one that are columns of the table, or were measured on further sets."""
    here = [c.field for c in list_columns(experiment, outcomes) if c.field and c.task in (None, match.task.name)]
    measured = [key for key in match.task.further_metrics if any(key in run.result["metrics"] for run in match.runs)]
    known = dict.fromkeys([*here, *measured])
    return [field for field in known if field not in FIELDS and field != match.task.metric]


def compare_scores(match: Match, sides: list[list[RowsBySeed]], metric: str, family: int) -> Difference:
    """Return the difference in a score, tested where it can be."""
    rows = next(iter(sides[0][0].values()))
    try:
        if metric == match.task.metric or is_resampled(match.task, metric, rows[0]):
            return compare_means(*sides, match.task, metric, comparisons=family)
    except ValueError as error:
        return describe_unknown(error)
    by_seed = match.subtract_recorded(metric)
    if not by_seed:
        return describe_unknown(f"{metric} not measured")
    reason = f"no test on predictions: {metric} is not resampled"
    return Difference(compute_mean(by_seed), None, None, None, reason, len(rows), len(by_seed), by_seed)


def describe_unknown(reason: object) -> Difference:
    """Return what is known of a difference that cannot be computed."""
    return Difference(float("nan"), None, None, None, str(reason), 0, 0)


def list_mean_groups(matches: list[Match]) -> dict[Key, list[Match]]:
    """Return the matches whose mean is compared, by `get_row_key`: those of one row, baseline and place on several
    tasks. Where lower is better on only some of these, a higher mean would be neither better nor worse, and none is
    compared."""
    groups: dict[Key, list[Match]] = {}
    for match in matches:
        groups.setdefault(get_row_key(match), []).append(match)
    agreed = {key: some for key, some in groups.items() if len({match.task.is_lower_better() for match in some}) == 1}
    return {key: some for key, some in agreed.items() if len(some) > 1}


def average_over_tasks(experiment: Experiment, parts: dict[Match, Comparison]) -> Comparison:
    """Return the comparison of the means over tasks, in points: a seed's mean over its tasks is one observation. Lower
    is better on all of them or on none."""
    one, first = next(iter(parts.items()))
    by_seed = [
        {seed: value * part.unit for seed, value in zip(match.seeds, part.difference.by_seed, strict=False)}
        for match, part in parts.items()
    ]
    seeds = sorted(set.intersection(*(set(some) for some in by_seed)))
    values = tuple(compute_mean(tuple(some[seed] for some in by_seed)) for seed in seeds)
    difference = describe_unknown("no seed has a difference on every task")
    if values:
        difference = describe_over_seeds(values, sum(part.difference.examples for part in parts.values()))
    margin = experiment.margin.get("mean") if all(part.unit == 100 for part in parts.values()) else None
    name, scores = f"mean of {len(parts)} tasks", {part.score for part in parts.values()}
    score = scores.pop() if len(scores) == 1 else "main scores"
    return add_tests(
        Comparison(
            label=one.label,
            baseline=one.baseline,
            task=name,
            score=score,
            place=one.place,
            difference=difference,
            unit=1,
            margin=margin,
            lower_is_better=first.lower_is_better,
            planned=is_planned(experiment, one),
            contrast=one.contrast,
            model=one.first.settings.model.name,
            decimals=max(part.decimals for part in parts.values()),
            machines=frozenset().union(*(part.machines for part in parts.values())),
        )
    )


def correct_family(found: list[Comparison], family: int) -> list[Comparison]:
    """Return the comparisons of one family with Holm's correction. Those with too few seeds for a verdict have no p, so
    that they do not change others' by chance. family: how many it has, finished or not."""
    tested = [c if c.difference.seeds >= MIN_SEEDS else leave_untested(c, c.untested) for c in found]
    both = (adjust_holm(ps, family) for ps in ([c.p for c in tested], [c.p_equivalent for c in tested]))
    return [replace(c, p=p, p_equivalent=same, family=family) for c, p, same in zip(found, *both, strict=True)]
