"""What is known of each cell of an experiment, from only the records."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, isnan, nan
from operator import itemgetter

import tasks
from dual_lora.lab.config import paths
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, get_first_line
from dual_lora.lab.record.identity import compute_identity, serialize_identity_settings
from dual_lora.lab.record.provenance import has_changed_plugins, is_committed
from dual_lora.lab.record.record import Record
from dual_lora.lab.study.experiment import Cell
from tasks import Task

DECIMALS = 12  # up to which scores of trials are equal


@dataclass(frozen=True)
class Outcome:
    """One cell of a table and what is known of it: the run's record and result, or why there is none.

    Attributes:
        rate: the learning rate, None while it is not chosen.
        duplicates: groups of finished records with the same settings, for the run or one of its trials; in each group
            the first is the one used.
        trials: the rates it was chosen from, each with its trial's main score: -inf where training diverged, NaN while
            it is not known.
    """

    cell: Cell
    record: Record | None
    result: dict | None
    reason: str | None
    rate: float | None = None
    duplicates: tuple[tuple[Record, ...], ...] = ()
    trials: tuple[tuple[float, float], ...] = ()

    @property
    def label(self) -> str:
        """The label of the cell's row."""
        return self.cell.label

    @property
    def settings(self) -> Settings:
        """The settings of the cell's run."""
        return self.cell.settings

    @property
    def run_key(self) -> str:
        """What outcomes of one run share, finished or not: its settings and, while no rate is chosen, its trials."""
        trials = () if self.rate is not None else self.cell.tuning
        return "\n".join(map(serialize_identity_settings, (self.settings, *trials)))

    @property
    def scored_rates(self) -> frozenset[float]:
        """The rates of which all trials are finished."""
        return frozenset(rate for rate, score in self.trials if not isnan(score))

    @property
    def tied(self) -> tuple[float, ...]:
        """The other rates whose trials scored the same as those of the chosen one, which is the lowest of them."""
        chosen = dict(self.trials).get(self.rate)
        return tuple(rate for rate, score in self.trials if score == chosen and rate != self.rate)

    @property
    def diverged(self) -> tuple[float, ...]:
        """The rates with which training diverged; their trials count as the worst."""
        return tuple(rate for rate, score in self.trials if score == -inf)


def load_task_of(cell: Cell | Outcome) -> Task:
    """Return the task of a cell's run."""
    return load_task_by_name(cell.settings)


def load_task_by_name(settings: Settings) -> Task:
    """Return the task of a run. Without data_dir: a report is made where the user's files may be gone."""
    return tasks.load(settings.task.name, settings.task.options)


def find_records(study: str) -> dict[str, list[Record]]:
    """Return the records of a study by their settings, the one to be shown first. Damaged ones are left out;
    `find_damaged_records` names them."""
    found: dict[str, list[tuple[tuple, Record]]] = {}
    for record in iterate_records(study):
        with suppress(UserError):
            settings = load_verified_settings(record)
            found.setdefault(serialize_identity_settings(settings), []).append((rank_record(record, settings), record))
    ranked = {key: sorted(some, key=itemgetter(0), reverse=True) for key, some in found.items()}
    return {key: [record for _, record in some] for key, some in ranked.items()}


def iterate_records(study: str) -> Iterator[Record]:
    """Yield every folder of a study that a run has begun or finished, what is left of one, and those that may not be
    read."""
    for folder in sorted((paths.RUNS / study).glob("*")):
        is_closed = folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)
        if is_closed or Record(folder).is_begun:
            yield Record(folder)


def load_verified_settings(record: Record) -> Settings:
    """Return the settings of a record whose result, configuration and environment are as the run left them.

    Raises:
        UserError: one is damaged or missing.
    """
    record.verify_files("config.yaml", "environment.json")
    record.check_kept()
    return load_recorded_settings(record.folder)


def find_damaged_records(study: str) -> list[str]:
    """Return why records of a study cannot be read, one line each. Those made with code that this command does not name
    are left out: they are none of its runs."""
    found = []
    for record in iterate_records(study):
        try:
            load_verified_settings(record)
        except UserError as error:
            if not needs_other_code(record):
                found.append(f"{record.name}: {error}")
    return found


def needs_other_code(record: Record) -> bool:
    """Return whether an undamaged record was made with plugins that are not loaded."""
    try:
        record.verify_files("config.yaml", "environment.json")
        return not record.read_environment().get("plugins", {}).keys() <= tasks.plugins.keys()
    except UserError:
        return False


def rank_record(record: Record, settings: Settings) -> tuple[bool, bool, bool, str, str]:
    """Return the sort key of records of the same settings; the highest is shown: finished, of the task's present
    version and plugins, of committed code, the newest."""
    result, made_with = record.read_result(), record.read_environment()
    finished = result is not None
    current = finished and is_current(result, settings) and not has_changed_plugins(made_with)
    return finished, current, is_committed(made_with), made_with.get("started", ""), record.name


def is_current(result: dict, settings: Settings) -> bool:
    """Return whether a run was done with the present version of its task."""
    return result.get("task_version") == load_task_by_name(settings).version


def resolve_start(cell: Cell, records: dict[str, list[Record]]) -> Cell | None:
    """Return the cell with the run it starts from in its settings and those of its trials: the best of `sources` by its
    main score, the first of equals; None while one of them, or its score, is missing. records: by settings."""
    if not cell.sources:
        return cell
    chosen = [choose_learning_rate(source, records) for source in cell.sources]
    found = [one and find_record(one.settings, records) for one in chosen]
    results = [record and record.read_result() for record in found]
    if not all(results):
        return None
    scores = [get_main_score(cell.sources[0].settings, result) for result in results]
    if any(map(isnan, scores)):
        return None
    pick = min if load_task_of(cell.sources[0]).is_lower_better() else max
    folder = str(found[scores.index(pick(scores))].folder)
    tuning = tuple(replace(trial, init_from=folder) for trial in cell.tuning)
    return replace(cell, settings=replace(cell.settings, init_from=folder), tuning=tuning)


def choose_learning_rate(cell: Cell, records: dict[str, list[Record]]) -> Cell | None:
    """Return the cell with the best learning rate of its trials, the lower of equals; None while a trial is missing or
    if all diverged. The trials stay in `tuning`. records: by settings."""
    if not cell.tuning:
        return cell
    sign = 1 if load_task_of(cell).is_lower_better() else -1
    # (loss to minimize, rate): of equal losses `min` takes the lower rate; a rate that diverged never wins
    losses = [(inf if score == -inf else sign * score, rate) for rate, score in average_trials(cell, records)]
    if any(isnan(loss) for loss, _ in losses) or min(losses)[0] == inf:
        return None
    return replace(cell, settings=replace(cell.settings, train=replace(cell.settings.train, lr=min(losses)[1])))


def average_trials(cell: Cell, records: dict[str, list[Record]]) -> list[tuple[float, float]]:
    """Return every rate of a cell's grid with its main score, a mean over seeds: -inf if training diverged with one of
    them, NaN while one is missing. records: by settings."""
    scores: dict[float, list[float]] = {}
    for trial in cell.tuning:
        scores.setdefault(trial.train.lr, []).append(get_trial_score(trial, records))
    # rounded: sums of floats are not exact, and a difference of 1e-17 would choose a rate
    return [(rate, round(sum(some) / len(some), DECIMALS)) for rate, some in scores.items()]


def get_trial_score(trial: Settings, records: dict[str, list[Record]]) -> float:
    """Return a trial's main score, -inf where training diverged, NaN while it is not known. records: by settings."""
    record = find_record(trial, records)
    if result := record and record.read_result():
        return get_main_score(trial, result)
    return -inf if read_failure_or_empty(record).get("diverged") else nan


def get_main_score(settings: Settings, result: dict) -> float:
    """Return the main score of a result by its task as it is now; NaN where it was not measured: a plugin that has
    changed since may have had another one."""
    return result["metrics"].get(load_task_by_name(settings).metric, nan)


def find_record(settings: Settings, records: dict[str, list[Record]]) -> Record | None:
    """Return the record that counts for these settings; None if there is none. records: by settings."""
    return next(iter(list_records(settings, records)), None)


def list_records(settings: Settings, records: dict[str, list[Record]]) -> list[Record]:
    """Return the records of these settings, the one that counts first: of several, that of the data, weights and code
    which the settings name, if these are at hand. records: by settings."""
    found = records.get(serialize_identity_settings(settings), [])
    if len(found) > 1:
        with suppress(UserError):
            name = compute_identity(settings)
            return sorted(found, key=lambda record: record.name != name)
    return found


def find_duplicates(all_settings: list[Settings], records: dict[str, list[Record]]) -> tuple[tuple[Record, ...], ...]:
    """Return groups of finished records with the same settings, one of `all_settings`; in each group the first is the
    one used. records: by settings."""
    several = [found for settings in all_settings if len(found := list_records(settings, records)) > 1]
    finished = [tuple(record for record in found if record.read_result()) for found in several]
    return tuple(group for group in finished if len(group) > 1)


def find_outcomes(cells: list[Cell], study: str) -> list[Outcome]:
    """Return what the records say of every cell."""
    records = find_records(study)
    return [find_outcome(cell, records) for cell in cells]


def find_outcome(cell: Cell, records: dict[str, list[Record]]) -> Outcome:
    """Return what the records of a study say of one cell. records: by settings."""
    started = resolve_start(cell, records)
    if started is None:
        source = load_task_of(cell.sources[0])
        return Outcome(
            cell, None, None, f"its start is not there: a run of {source.name} is missing, or its {source.metric}"
        )
    cell, trials = started, tuple(average_trials(started, records))
    chosen = choose_learning_rate(cell, records)
    if chosen is None:
        return Outcome(cell, None, None, explain_missing_rate(cell, records), trials=trials)
    record = find_record(chosen.settings, records)
    result = record.read_result() if record else None
    reason = None if result else explain_failure(record) or ("started, not finished" if record else "not run")
    duplicates = find_duplicates([chosen.settings, *chosen.tuning], records)
    return Outcome(chosen, record, result, reason, chosen.settings.train.lr, duplicates, trials)


def explain_missing_rate(cell: Cell, records: dict[str, list[Record]]) -> str:
    """Return why a cell has no learning rate: the first failure of its missing trials, or of all if all diverged.
    records: by settings."""
    missing = [trial for trial in cell.tuning if isnan(get_trial_score(trial, records))] or cell.tuning
    found = [why for trial in missing if (why := explain_missing_score(trial, find_record(trial, records)))]
    return f"learning rate not chosen: {found[0]}" if found else "learning rate not chosen yet"


def explain_missing_score(settings: Settings, record: Record | None) -> str | None:
    """Return why a run that was begun has no main score; None if it may still get one."""
    if record and (result := record.read_result()) and isnan(get_main_score(settings, result)):
        metric = load_task_by_name(settings).metric
        return f"{record.name}: {metric} not measured"
    return explain_failure(record)


def explain_failure(record: Record | None) -> str | None:
    """Return why a run failed, without the remedy in its message; None if it did not fail."""
    message = read_failure_or_empty(record).get("message")
    return message and f"failed: {get_first_line(message).partition(';')[0]}"


def read_failure_or_empty(record: Record | None) -> dict:
    """Return the failure that an unfinished run recorded; empty if there is none."""
    try:
        return record.read_failure() or {} if record and not record.read_result() else {}
    except UserError as error:
        return {"message": str(error)}
