"""What a report says of differences: paired tests of every row against the baselines, and means over tasks.

Main scores are one family for Holm's correction; the further scores of a published table's columns, single sets or
other metrics, are another. Rows that are the same runs are compared once.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

import tasks
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.present.document import MISSING, Block, Table, Text
from dual_lora.lab.report.values import FIELDS, format_value, get_heading, get_place, get_unit, list_columns
from dual_lora.lab.statistics.compare import (
    Difference,
    compare_runs,
    count_resamples,
    format_difference,
    is_resampled,
    is_shown,
)
from dual_lora.lab.statistics.multiple import TasksTest, adjust_holm, compute_iqm, test_across_tasks
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome
from tasks import Task
from tasks.base import Row

Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Match:
    """The runs of a row and of a baseline on one task in one place (the settings that head rows and columns)."""

    label: str
    baseline: str
    place: dict[str, object]
    ours: list[Outcome]
    theirs: list[Outcome]

    @property
    def task(self) -> Task:
        settings = self.ours[0].settings.task
        return tasks.load(settings.name, settings.options)

    def subtract_recorded(self, metric: str) -> float | None:
        """Return the difference of the recorded scores, a mean over the seeds of both; None where one is missing."""
        scores = [
            {c.settings.seed: c.result["metrics"].get(metric) for c in cells} for cells in (self.ours, self.theirs)
        ]
        both = [(scores[0][seed], scores[1][seed]) for seed in sorted(scores[0].keys() & scores[1].keys())]
        return None if None in sum(both, ()) else float(np.mean([one - other for one, other in both]))


@dataclass(frozen=True)
class Pair:
    """What came out of a match by one score; `p` is corrected for the family."""

    match: Match
    metric: str
    difference: Difference
    p: float | None = None


def compare_cells(experiment: Experiment, done: list[Outcome]) -> tuple[list[Pair], list[Pair]]:
    """Return every comparison by the tasks' main scores, and those by further scores."""
    wanted = {match: list_further_scores(experiment, done, match) for match in iterate_matches(experiment, done)}
    sizes = len(wanted), sum(map(len, wanted.values()))
    pairs = [pair for match, further in wanted.items() for pair in test_match(match, further, sizes)]
    main = [pair.metric == pair.match.task.metric for pair in pairs]
    return tuple(
        correct_family([p for p, first in zip(pairs, main, strict=True) if first == kind]) for kind in (True, False)
    )


def iterate_matches(experiment: Experiment, done: list[Outcome]) -> Iterator[Match]:
    """Yield every row that is no baseline with every baseline, on each task, as far as runs are finished. A baseline
    that has no value of the columns' setting stands against all columns."""
    runs: dict[str, dict[Key, list[Outcome]]] = {}
    for cell in done:
        if cell.result:
            where = (cell.settings.task.name, *get_place(experiment, cell).values())
            runs.setdefault(cell.cell.label, {}).setdefault(where, []).append(cell)
    seen = set()
    for label, groups in runs.items():
        for baseline in experiment.baselines if label not in experiment.baselines else ():
            for where, ours in groups.items():
                known = runs.get(baseline, {})
                theirs = known.get(where) or known.get((*where[:-1], None), [])
                same = [frozenset(cell.record.name for cell in cells) for cells in (ours, theirs)]
                if {c.settings.seed for c in ours} & {c.settings.seed for c in theirs} and same[0] != same[1]:
                    if tuple(same) not in seen:
                        yield Match(label, baseline, get_place(experiment, ours[0]), ours, theirs)
                    seen.add(tuple(same))


def list_further_scores(experiment: Experiment, done: list[Outcome], match: Match) -> list[str]:
    """Return the scores beside the main one that stand in columns of the table."""
    here = [c.field for c in list_columns(experiment, done) if c.field and c.task in (None, match.task.name)]
    return [field for field in here if field not in FIELDS and field != match.task.metric]


def test_match(match: Match, further: list[str], sizes: tuple[int, int]) -> Iterator[Pair]:
    """Yield a match by its task's main score and by further ones. sizes: how many comparisons there are of each."""
    metrics = {match.task.metric: sizes[0], **dict.fromkeys(further, sizes[1])}
    try:
        check_same_inputs(match)
        runs = [{cell.settings.seed: read_predictions(cell) for cell in cells} for cells in (match.ours, match.theirs)]
    except UserError as error:
        yield from (Pair(match, metric, mark_unknown(error)) for metric in metrics)
        return
    for metric, comparisons in metrics.items():
        yield Pair(match, metric, compare_pair(match, runs, metric, comparisons))


def check_same_inputs(match: Match) -> None:
    """Refuse to compare runs of the same model and data, as their settings say, that were done with other files.

    Raises:
        UserError: with the files.
    """
    for one in match.ours:
        for other in match.theirs:
            if one.settings.model == other.settings.model:
                known = {describe_weights(cell) for cell in (one, other)} - {None}
                require(len(known) < 2, f"{one.record.name} and {other.record.name}: other base weights")
            if one.settings.seed == other.settings.seed and get_row_protocol(one) == get_row_protocol(other):
                known = {get_training_hash(cell) for cell in (one, other)} - {None}
                require(len(known) < 2, f"{one.record.name} and {other.record.name}: other training rows")


def describe_weights(cell: Outcome) -> str | None:
    """Return the SHA-256 of the base model's files, as one text; None where they were not written down."""
    files = cell.record.read_environment().get("model_files")
    return files and json.dumps(files, sort_keys=True)


def get_training_hash(cell: Outcome) -> str | None:
    return cell.result["data"].get("train", {}).get("sha256")


def get_row_protocol(cell: Outcome) -> object:
    """Return what of a run's settings chooses its training rows, beside the seed."""
    return cell.settings.task, cell.settings.eval.holdout, cell.settings.train.max_examples


def compare_pair(match: Match, runs: list[dict[int, list[Row]]], metric: str, comparisons: int) -> Difference:
    """Return the difference in a score, tested where it can be."""
    rows, seeds = next(iter(runs[0].values())), len(runs[0].keys() & runs[1].keys())
    try:
        if metric == match.task.metric or is_resampled(match.task, metric, rows[0]):
            return compare_runs(*runs, match.task, metric, comparisons=comparisons)
    except ValueError as error:
        return mark_unknown(error)
    mean = match.subtract_recorded(metric)
    if mean is None:
        return mark_unknown(f"{metric} not measured")
    return Difference(mean, None, None, None, f"no test: {metric} is not resampled", len(rows), seeds)


def mark_unknown(reason: object) -> Difference:
    """Return what is known of a difference that cannot be told."""
    return Difference(float("nan"), None, None, None, str(reason), 0, 0)


def correct_family(pairs: list[Pair]) -> list[Pair]:
    """Return the comparisons of one family with Holm's correction."""
    adjusted = adjust_holm([pair.difference.p for pair in pairs])
    return [replace(pair, p=p) for pair, p in zip(pairs, adjusted, strict=True)]


def read_predictions(cell: Outcome) -> list[Row]:
    """Return a run's judged rows.

    Raises:
        UserError: the file is missing or damaged, or not what the run left.
    """
    cell.record.verify_files("predictions.jsonl")
    name = f"{cell.record.name}/predictions.jsonl"
    try:
        rows = [json.loads(line) for line in (cell.record.folder / "predictions.jsonl").open(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: missing or damaged") from error
    require(bool(rows) and all(isinstance(r, dict) and {"split", "id"} <= r.keys() for r in rows), f"{name}: damaged")
    return rows


def tabulate_pairs(pairs: list[Pair]) -> pd.DataFrame:
    """Return comparisons as a table of numbers, in the unit that is printed."""
    lines = []
    for pair in pairs:
        match, found = pair.match, pair.difference
        scale = get_unit(match.task.name, pair.metric)
        mean, low, high = (None if v is None else v * scale for v in (found.mean, found.low, found.high))
        where = {"task": match.task.name, "score": pair.metric, **match.place}
        names = {"method": match.label, "baseline": match.baseline, "difference": mean, "low": low, "high": high}
        tests = {"p": found.p, "holm": pair.p, "test": found.test, "examples": found.examples, "seeds": found.seeds}
        lines.append(where | names | tests | {"shown": is_shown(found, pair.p)})
    return pd.DataFrame(lines)


def list_sets(cell: Outcome) -> list[str]:
    """Return the names of a task's sets if it has several that are scored alone; they count as tasks."""
    settings = cell.settings.task
    names = [s for s in tasks.load(settings.name, settings.options).eval_splits if s in cell.result["metrics"]]
    return names if len(names) > 1 else []


def list_set_differences(pair: Pair) -> dict[str, float]:
    """Return a comparison's difference by task, or those of its task's sets, as printed; none that is not known."""
    match, name = pair.match, pair.match.task.name
    by_set = {metric: match.subtract_recorded(metric) for metric in list_sets(match.ours[0])}
    scaled = {metric: v * get_unit(name, metric) for metric, v in by_set.items() if v is not None}
    whole = {} if np.isnan(pair.difference.mean) else {name: pair.difference.mean * get_unit(name, pair.metric)}
    return scaled if by_set else whole


def list_task_scores(cell: Outcome) -> dict[str, float | None]:
    """Return a run's main score, or those of its task's sets, as printed; None while it is not finished."""
    name = cell.settings.task.name
    if not cell.result:
        return {name: None}
    metrics = {metric: metric for metric in list_sets(cell)} or {name: cell.result["metric"]}
    return {called: cell.result["metrics"][metric] * get_unit(name, metric) for called, metric in metrics.items()}


def iterate_difference_blocks(
    experiment: Experiment, done: list[Outcome], main: list[Pair], further: list[Pair]
) -> Iterator[Block]:
    """Yield the comparisons as tables, as far as finished runs allow."""
    if main:
        yield Text("Differences", heading=True)
        yield Text(
            "Paired on the stored predictions of the same examples and seeds. The interval resamples examples and, "
            "where there are several, seeds. Shown means: several seeds, an interval that leaves out 0, and a p below "
            f"0.05 after Holm's correction over all {describe_family(main)} Rows that are the same runs are compared "
            "once."
        )
        yield Table(format_pairs(main), "Differences by the main score.")
    if further:
        yield Text("By set and by other scores", heading=True)
        yield Text(f"As above, corrected over these {describe_family(further)}")
        yield Table(format_pairs(further), "Differences by set and by other scores.")
    yield from iterate_task_tests(main)
    yield from iterate_means(experiment, done)


def iterate_sentences(main: list[Pair], further: list[Pair]) -> Iterator[Block]:
    """Yield every comparison as one sentence."""
    if main:
        yield Text("Every difference in a sentence", heading=True)
        yield Text(items=tuple(map(format_sentence, [*main, *further])))


def format_pairs(pairs: list[Pair]) -> pd.DataFrame:
    """Return comparisons as they are printed."""
    frame = tabulate_pairs(pairs)
    found = frame[["task", "score"]].copy()
    for key in dict.fromkeys(key for pair in pairs for key in pair.match.place):
        found[get_heading(key)] = frame[key].map(lambda value: format_value(None if pd.isna(value) else value))
    found["comparison"] = frame["method"] + " - " + frame["baseline"]
    styles = ["+.1f" if get_unit(pair.match.task.name, pair.metric) == 100 else "+.3f" for pair in pairs]
    found["difference"], low, high = (
        list(map(format_number, frame[key], styles)) for key in ("difference", "low", "high")
    )
    found["95 % interval"] = [MISSING if MISSING in ends else " to ".join(ends) for ends in zip(low, high, strict=True)]
    for head, column in (("p", "p"), ("Holm", "holm")):
        found[head] = [format_number(p, ".3f") for p in frame[column]]
    found["seeds"] = frame["seeds"]
    found["shown"] = frame["shown"].map({True: "shown", False: "not shown"})
    return found


def format_number(value: float | None, style: str) -> str:
    return MISSING if pd.isna(value) else format(value, style)


def describe_family(pairs: list[Pair]) -> str:
    """Return how many comparisons there are and how small their p can be."""
    tested = sum(pair.difference.p is not None for pair in pairs)
    least = 1 / (1 + count_resamples(len(pairs)))
    return f"{tested} comparisons; a p from resampling is at least {least:.2g}, {min(1, tested * least):.2g} corrected."


def format_sentence(pair: Pair) -> str:
    """Return a comparison as one sentence."""
    match, difference = pair.match, pair.difference
    where = [f"{match.task.name} ({pair.metric})"]
    where = ", ".join([*where, *(f"{get_heading(key)} {format_value(value)}" for key, value in match.place.items())])
    if np.isnan(difference.mean):
        return f"{where}: {match.label} - {match.baseline}: cannot be compared ({difference.test})"
    scale = get_unit(match.task.name, pair.metric)
    return f"{where}: {format_difference(match.label, match.baseline, difference, scale, pair.p)}"


def iterate_task_tests(pairs: list[Pair]) -> Iterator[Block]:
    """Yield Wilcoxon's test over tasks, or over the sets of one, for every row and baseline that have several in the
    same place."""
    groups: dict[Key, dict[str, float]] = {}
    for pair in pairs:
        key = (pair.match.label, pair.match.baseline, tuple(pair.match.place.items()))
        groups.setdefault(key, {}).update(list_set_differences(pair))
    several = {key: found for key, found in groups.items() if len(found) > 1}
    if several:
        tests = [test_across_tasks(found) for found in several.values()]
        adjusted = adjust_holm([test.p for test in tests])
        yield Text("Over tasks", heading=True)
        yield Text(f"Wilcoxon's test of the differences above, Holm's correction over these {len(tests)}.")
        yield Text(items=tuple(map(format_task_test, several, several.values(), tests, adjusted)))


def format_task_test(key: Key, found: dict[str, float], result: TasksTest, adjusted: float) -> str:
    """Return a test over tasks as a sentence."""
    label, baseline, where = key
    at = "".join(f", {get_heading(key)} {format_value(value)}" for key, value in where)
    mean = float(np.mean(list(found.values())))
    equal = f" ({len(found) - result.tasks} equal)" if result.tasks < len(found) else ""
    return (
        f"{label} - {baseline}{at}: {mean:+.1f} on average, better on {result.wins} of {len(found)} tasks{equal}; "
        f"p = {result.p:.3f}, {adjusted:.3f} corrected{f' ({result.note})' if result.note else ''}"
    )


def iterate_means(experiment: Experiment, done: list[Outcome]) -> Iterator[Block]:
    """Yield the interquartile means over tasks, or the sets of one, and seeds, for rows that have several, all of them
    finished."""
    lines, counts = [], set()
    groups: dict[Key, dict[str, dict[int, float | None]]] = {}
    for cell in done:
        scores = groups.setdefault((cell.cell.label, *get_place(experiment, cell).items()), {})
        for name, value in list_task_scores(cell).items():
            scores.setdefault(name, {})[cell.settings.seed] = value
    for (label, *where), scores in groups.items():
        table = [list(by_seed.values()) for by_seed in scores.values()]
        if len(table) > 1 and all(score is not None for row in table for score in row):
            value, low, high = compute_iqm(np.array(table))
            interval = "one seed: none" if low is None else f"{low:.1f} to {high:.1f}"
            heads = {get_heading(key): format_value(value) for key, value in where}
            lines.append({"method": label, **heads, "IQM": f"{value:.1f}", "95 % interval": interval})
            counts.add(len(table))
    if lines:
        yield Table(
            pd.DataFrame(lines),
            f"Interquartile mean of the main score over {' or '.join(map(str, sorted(counts)))} tasks and all seeds, % "
            "(arXiv 2108.13264); the interval resamples seeds within each task.",
        )
