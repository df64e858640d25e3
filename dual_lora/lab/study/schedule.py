"""Runs in order: those of a command line; of an experiment, those that choose learning rates before the table's own."""

import sys
import time

from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import EXIT_OK, UserError, choose_exit_code
from dual_lora.lab.record.run import Run, prepare_runs
from dual_lora.lab.study.execute import (
    describe_error,
    describe_failure,
    execute_run,
    failures,
    report_failures,
)
from dual_lora.lab.study.experiment import Cell
from dual_lora.lab.study.launch.command import launch_runs, uses_launcher
from dual_lora.lab.study.outcome import choose_learning_rate, find_records, resolve_start
from dual_lora.lab.study.time_left import TimeLeft
from dual_lora.lab.system.distributed import join_processes, share_from_first


def run_missing(runs: list[Run], launcher: list[str], left: TimeLeft, what: str = "runs", later: list[Run] = ()) -> int:
    """Execute every run that is not finished and return the exit code.

    launcher: the words of the command line that choose one; without them runs are executed here, one after the other.
    left: estimates the remaining time; finished runs count with their training time. later: runs that follow these.
    """
    missing, finished = share_from_first(lambda: sort_runs(runs))
    missing, finished = ([runs[number] for number in numbers] for numbers in (missing, finished))
    print(f"{len(runs)} {what}, {len(finished)} finished, {len(missing)} to do")
    if uses_launcher(launcher):
        launch_runs(missing, launcher)
        return report_failures(runs)
    for run in finished if missing else ():
        left.add_run(run.settings, run.record.read_result()["train_seconds"])
    run_in_process(missing, left, later)
    return report_failures(runs)


def sort_runs(runs: list[Run]) -> tuple[list[int], list[int]]:
    """Return the positions of the runs that are still to be done and of those that are finished. Why one is not as it
    was left is kept for `report_failures`; it is in neither, and does not stop the others."""
    missing, finished = [], []
    for number, run in enumerate(runs):
        run.record.finish_cleanup()
        try:
            pending = run.is_pending
            if not pending:
                run.record.verify_kept_files()
            (missing if pending else finished).append(number)
        except UserError as error:
            failures[run.record.folder] = describe_error(error)
    return missing, finished


def is_left(run: Run) -> bool:
    """Return whether a run is still to be done; `sort_runs` reports a damaged result later."""
    try:
        return run.is_pending
    except UserError:
        return False


def run_in_process(runs: list[Run], left: TimeLeft, later: list[Run] = ()) -> None:
    """Execute runs in this process, one after the other; `later` are those whose time is still to come after them."""
    for number, run in enumerate(runs):
        remaining = left.describe_time([other.settings for other in (*runs[number:], *later)])
        print(f"\n[{number + 1}/{len(runs)}] {run.label}, {remaining}", flush=True)
        started, done_before = time.monotonic(), not run.is_pending
        failure = execute_run(run)
        if failure and failure["error"] == UserError.__name__:  # other errors have been printed with their traceback
            print(redact_secrets(describe_failure(run, failure)), file=sys.stderr)
        if failure is None and not done_before:  # a failed or finished one does not say how long others take
            left.add_run(run.settings, time.monotonic() - started)


def run_cells(cells: list[Cell], study: str, launcher: list[str]) -> int:
    """Execute what is missing of an experiment and return the exit code: first the runs that others start from, then
    those that start from one."""
    first = [cell for cell in cells if not cell.sources]
    sources = {repr(source.settings): source for cell in cells for source in cell.sources}
    code = run_tuned_cells([*first, *sources.values()], study, launcher)
    later = [cell for cell in cells if cell.sources]
    if not later:
        return code
    records = share_from_first(lambda: find_records(study))
    started = [cell for cell in (resolve_start(cell, records) for cell in later) if cell]
    return choose_exit_code([run_tuned_cells(started, study, launcher), code])


def run_tuned_cells(cells: list[Cell], study: str, launcher: list[str]) -> int:
    """Execute what is missing of these cells and return the exit code: first the runs that choose learning rates, then
    the table's own. Failed trials are ignored if every rate could be chosen all the same."""
    trials, left = prepare_runs([trial for cell in cells for trial in cell.tuning]), TimeLeft()
    join_processes()
    code = EXIT_OK
    if trials:
        later = [run for run in prepare_runs([cell.settings for cell in cells]) if is_left(run)]
        code = run_missing(trials, launcher, left, "runs to choose learning rates", later)
    records = share_from_first(lambda: find_records(study)) if trials else {}
    ready = [chosen.settings for cell in cells if (chosen := choose_learning_rate(cell, records))]
    own = run_missing(prepare_runs(ready), launcher, left)
    return own if len(ready) == len(cells) else choose_exit_code([own, code])
