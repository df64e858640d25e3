"""What is known of each cell of an experiment, from the records alone."""

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
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.record.provenance import is_committed
from dual_lora.lab.record.record import Record
from dual_lora.lab.study.experiment import Cell


@dataclass(frozen=True)
class Outcome:
    """One cell of a table and what is known of it: the run's record and result, or why there is none.

    rate: the learning rate, None while it is not chosen; others: finished records of the same settings that are not
    shown; diverged: rates that could not be trained with, whose trials count as the worst.
    """

    cell: Cell
    record: Record | None
    result: dict | None
    reason: str | None
    rate: float | None = None
    others: tuple[Record, ...] = ()
    diverged: tuple[float, ...] = ()

    @property
    def settings(self) -> Settings:
        return self.cell.settings


def find_records(study: str) -> dict[str, list[Record]]:
    """Return the records of a study by what was asked for, the one to be shown first, from the records alone. Damaged
    ones are left out; `find_damaged_records` names them."""
    found: dict[str, list[tuple[tuple, Record]]] = {}
    for record in iterate_records(study):
        with suppress(UserError):
            settings = load_verified_settings(record)
            found.setdefault(serialize_identity_settings(settings), []).append((rank_record(record, settings), record))
    ranked = {key: sorted(some, key=itemgetter(0), reverse=True) for key, some in found.items()}
    return {key: [record for _, record in some] for key, some in ranked.items()}


def iterate_records(study: str) -> Iterator[Record]:
    """Yield every folder of a study that a run has begun or finished."""
    folders = {
        path.parent for name in ("config.yaml", "result.json") for path in (paths.RUNS / study).glob(f"*/{name}")
    }
    yield from map(Record, sorted(folders))


def load_verified_settings(record: Record) -> Settings:
    """Return the settings of a record whose result, configuration and environment are as the run left them.

    Raises:
        UserError: one is damaged or missing.
    """
    record.verify_files("config.yaml", "environment.json")
    return load_recorded_settings(record.folder)


def find_damaged_records(study: str) -> list[str]:
    """Return why records of a study cannot be read, one line each."""
    found = []
    for record in iterate_records(study):
        try:
            load_verified_settings(record)
        except UserError as error:
            found.append(f"{record.name}: {error}")
    return found


def rank_record(record: Record, settings: Settings) -> tuple[bool, bool, bool, str, str]:
    """Return what sorts records of the same settings: a finished one before others, one of the task as it is now, one
    of committed code, the newest."""
    result, made_with = record.read_result(), record.read_environment()
    finished = result is not None
    now = finished and is_current(result, settings)
    return finished, now, is_committed(made_with), made_with.get("started", ""), record.name


def is_current(result: dict, settings: Settings) -> bool:
    """Whether a run was done with the task's present version."""
    return result.get("task_version") == tasks.load(settings.task.name, settings.task.options).version


def choose_learning_rate(cell: Cell, study: dict[str, list[Record]]) -> Cell | None:
    """Return the cell with the learning rate that did best among its trials, the lower one of equals; None while a
    trial is missing, or all of them diverged. The rates it chose from stay in `tuning`."""
    if not cell.tuning:
        return cell
    scores = [(-get_trial_score(trial, study), trial.train.lr) for trial in cell.tuning]
    if any(isnan(lost) for lost, _ in scores) or min(scores)[0] == inf:
        return None
    return replace(cell, settings=replace(cell.settings, train=replace(cell.settings.train, lr=min(scores)[1])))


def get_trial_score(trial: Settings, study: dict[str, list[Record]]) -> float:
    """Return a trial's main score, -inf where training diverged, NaN while it is not known."""
    record = find_record(trial, study)
    if result := record and record.read_result():
        return result["metrics"][result["metric"]]
    return -inf if read_mishap(record).get("diverged") else nan


def find_record(settings: Settings, study: dict[str, list[Record]]) -> Record | None:
    """Return the record that stands for a run."""
    return study.get(serialize_identity_settings(settings), [None])[0]


def find_outcomes(cells: list[Cell], study: str) -> list[Outcome]:
    """Return what is known of every cell, from the records alone."""
    found = find_records(study)
    return [find_outcome(cell, found) for cell in cells]


def find_outcome(cell: Cell, study: dict[str, list[Record]]) -> Outcome:
    """Return what is known of a cell."""
    chosen, diverged = (
        choose_learning_rate(cell, study),
        tuple(t.train.lr for t in cell.tuning if get_trial_score(t, study) == -inf),
    )
    if chosen is None:
        return Outcome(cell, None, None, explain_missing_rate(cell, study), diverged=diverged)
    record, *others = study.get(serialize_identity_settings(chosen.settings), [None])
    result = record.read_result() if record else None
    reason = None if result else describe_failure(record) or ("begun, not finished" if record else "not run")
    rate, others = chosen.settings.train.lr, tuple(other for other in others if other.read_result())
    return Outcome(chosen, record, result, reason, rate, others, diverged)


def explain_missing_rate(cell: Cell, study: dict[str, list[Record]]) -> str:
    """Return why a cell has no learning rate: what became of the trials that are missing, or of all, which diverged."""
    missing = [trial for trial in cell.tuning if isnan(get_trial_score(trial, study))] or cell.tuning
    failed = [why for trial in missing if (why := describe_failure(find_record(trial, study)))]
    return f"learning rate not chosen: {failed[0]}" if failed else "learning rate not chosen yet"


def describe_failure(record: Record | None) -> str | None:
    """Return why a run failed, up to where its message turns to what to do; None if it did not."""
    message = read_mishap(record).get("message")
    return message and f"failed: {get_first_line(message).partition(';')[0]}"


def read_mishap(record: Record | None) -> dict:
    """Return what a run without a result says of its failure."""
    try:
        return record.read_failure() or {} if record and not record.read_result() else {}
    except UserError as error:
        return {"message": str(error)}
