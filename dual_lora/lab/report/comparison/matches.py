"""Which runs are compared with which, and their predictions."""

import functools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.record.provenance import get_machine, list_attempts
from dual_lora.lab.report.values import get_place
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of
from tasks import Task
from tasks.base import Row

Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Match:
    """Two sides whose runs are compared, on one task in one place (the settings that head rows and columns).

    Attributes:
        label, baseline: what each side is, as it is printed.
        ours, theirs: the runs of each side, a list for each column; a row and a baseline have one column each.
        contrast: whether the sides are columns of one row.
    """

    label: str
    baseline: str
    place: dict[str, object]
    ours: list[list[Outcome]]
    theirs: list[list[Outcome]]
    contrast: bool = False

    @property
    def first(self) -> Outcome:
        """One of the runs; all are of one model and task."""
        return self.ours[0][0]

    @property
    def task(self) -> Task:
        """The one task of all these runs."""
        return load_task_of(self.first)

    @property
    def runs(self) -> list[Outcome]:
        """The runs of both sides."""
        return [outcome for column in (*self.ours, *self.theirs) for outcome in column]

    @property
    def seeds(self) -> list[int]:
        """The seeds with which every column has a run, sorted."""
        return sorted(
            set.intersection(*({run.settings.seed for run in column} for column in (*self.ours, *self.theirs)))
        )

    @functools.cached_property
    def mixed_machines(self) -> frozenset[str]:
        """The machines of the runs that a seed pairs, of all seeds for which these are several."""
        by_seed: dict[int, set[str]] = {seed: set() for seed in self.seeds}
        for run in self.runs:
            if run.settings.seed in by_seed:
                attempts = list_attempts(run.record.read_environment())
                by_seed[run.settings.seed].update(filter(None, map(get_machine, attempts)))
        return frozenset().union(*(machines for machines in by_seed.values() if len(machines) > 1))

    def subtract_recorded(self, metric: str) -> tuple[float, ...]:
        """Return, for each seed, the mean of our recorded scores minus that of theirs; nothing where one is missing."""
        known = [
            [{outcome.settings.seed: outcome.result["metrics"].get(metric) for outcome in column} for column in side]
            for side in (self.ours, self.theirs)
        ]
        scores = [[[column[seed] for column in side] for side in known] for seed in self.seeds]
        if any(None in side for sides in scores for side in sides):
            return ()
        return tuple(compute_mean(one) - compute_mean(other) for one, other in scores)


def iterate_matches(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[Match]:
    """Yield the pairs of rows that are compared, on each task, as far as runs are finished.

    A baseline none of whose runs, finished or not, has a value of the columns' setting is compared with all columns.
    Rows that plan the same runs are compared once, under the planned label if one is. Rows that only happen to get the
    same rate stay two: what is compared does not depend on results.
    """
    runs, seen = group_by_place(experiment, [outcome for outcome in outcomes if outcome.result]), set()
    without = [label for label in experiment.baselines if not has_column_values(experiment, outcomes, label)]
    for label, baseline in list_compared(experiment, runs):
        known = runs.get(baseline, {})
        for where, ours in runs[label].items():
            theirs = known.get((*where[:-1], None) if baseline in without else where, [])
            same = tuple(frozenset(outcome.cell.planned_key for outcome in side) for side in (ours, theirs))
            if not theirs or same[0] == same[1] or same in seen:
                continue
            match = Match(label, baseline, get_place(experiment, ours[0]), [ours], [theirs])
            if match.seeds:
                seen.add(same)
                yield match


def list_compared(experiment: Experiment, labels: Collection[str]) -> list[tuple[str, str]]:
    """Return which rows are compared with which baselines: all that are neither baseline nor floor with every one, the
    planned rows first; and the other baselines with the first, so that a row's difference from it stands beside theirs.
    """
    first, *others = experiment.baselines or [None]
    apart = {*experiment.baselines, *experiment.floors}
    rows = sorted((label for label in labels if label not in apart), key=lambda one: one not in experiment.planned)
    pairs = [(label, baseline) for label in rows for baseline in experiment.baselines]
    return [*pairs, *((label, first) for label in others if label in labels)]


def has_column_values(experiment: Experiment, outcomes: list[Outcome], label: str) -> bool:
    """Return whether a row has a value of the columns' setting; also where columns are published scores or fields."""
    if experiment.columns not in experiment.list_heading_settings():
        return True
    settings = [outcome.settings for outcome in outcomes if outcome.label == label]
    return any(get_setting(one, experiment.columns) is not None for one in settings)


def group_by_place(experiment: Experiment, outcomes: list[Outcome]) -> dict[str, dict[Key, list[Outcome]]]:
    """Return runs by label, and by task and place."""
    runs: dict[str, dict[Key, list[Outcome]]] = {}
    for outcome in outcomes:
        where = (outcome.settings.task.name, *get_place(experiment, outcome).values())
        runs.setdefault(outcome.label, {}).setdefault(where, []).append(outcome)
    return runs


def check_same_inputs(match: Match) -> None:
    """Refuse to compare runs whose inputs differ though their settings name the same.

    Raises:
        UserError: with two of them.
    """
    for _, what, (one, other, *_) in group_by_inputs(match.runs):
        raise UserError(f"{one[0]} and {other[0]}: {what}")


def group_by_inputs(outcomes: list[Outcome]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Yield every group of runs that had different inputs though their settings name the same: their model or task,
    what differs, and their names by input. An input that was not recorded is no difference."""
    kinds = (
        ("model", "different model files", lambda outcome: None, describe_weights),
        ("task", "different training rows", get_row_protocol, get_training_hash),
        (
            "task",
            "different scored rows",
            lambda outcome: (outcome.settings.task, outcome.settings.eval),
            get_scored_hashes,
        ),
    )
    for part, what, get_protocol, describe in kinds:
        found: dict[tuple[str, str], dict[str, list[str]]] = {}
        for outcome in outcomes:
            if outcome.result and (inputs := describe(outcome)):
                group = found.setdefault((getattr(outcome.settings, part).name, repr(get_protocol(outcome))), {})
                group.setdefault(inputs, []).append(outcome.record.name)
        yield from ((name, what, list(group.values())) for (name, _), group in found.items() if len(group) > 1)


def describe_weights(outcome: Outcome) -> str | None:
    """Return the SHA-256 of the base model's files, as one text; None where they were not recorded."""
    files = outcome.record.read_environment().get("model_files")
    return files and json.dumps(files, sort_keys=True)


def get_training_hash(outcome: Outcome) -> str | None:
    """Return the SHA-256 of the rows that a run was trained on; None if it was not recorded."""
    return outcome.result["data"].get("train", {}).get("sha256")


def get_scored_hashes(outcome: Outcome) -> str:
    """Return the SHA-256 of every split that a run was scored on, as one text; empty if none was recorded."""
    splits = outcome.result["data"].items()
    return " ".join(f"{name} {facts['sha256']}" for name, facts in splits if name != "train" and "sha256" in facts)


def get_row_protocol(outcome: Outcome) -> object:
    """Return what of a run's settings chooses its training rows: the seed only where they are a sample."""
    limit = outcome.settings.train.max_examples
    return outcome.settings.task, outcome.settings.eval.reserved_rows, limit, limit and outcome.settings.seed


class Predictions:
    """The judged rows of runs, each file read and verified once in a report."""

    def __init__(self) -> None:
        self._known: dict[Path, list[Row] | UserError] = {}

    def read_runs(self, outcomes: list[Outcome]) -> dict[int, list[Row]]:
        """Return the rows of several runs by seed.

        Raises:
            UserError: as `read_predictions`.
        """
        return {outcome.settings.seed: self.read(outcome) for outcome in outcomes}

    def read(self, outcome: Outcome) -> list[Row]:
        """Return a run's rows.

        Raises:
            UserError: as `read_predictions`.
        """
        folder = outcome.record.folder
        if folder not in self._known:
            try:
                self._known[folder] = read_predictions(outcome)
            except UserError as error:
                self._known[folder] = error
        found = self._known[folder]
        if isinstance(found, UserError):
            raise found
        return found


def read_predictions(outcome: Outcome) -> list[Row]:
    """Return a run's judged rows.

    Raises:
        UserError: the file is missing or damaged, or not what the run left.
    """
    outcome.record.verify_files("predictions.jsonl")
    name = f"{outcome.record.name}/predictions.jsonl"
    try:
        with (outcome.record.folder / "predictions.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: missing or damaged") from error
    require(bool(rows) and all(isinstance(r, dict) and {"split", "id"} <= r.keys() for r in rows), f"{name}: damaged")
    return rows


def compute_mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return float(np.mean(values)) if values else float("nan")
