"""The only place that executes runs, for train.py, sweeps and launchers; it also reports what became of each run."""

import sys
import traceback
from pathlib import Path

from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import (
    EXIT_ELSEWHERE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
    RunHeldElsewhere,
    Stopped,
    UserError,
    choose_exit_code,
    get_first_line,
    translate_machine_errors,
)
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import format_finished
from dual_lora.lab.system.distributed import has_several_processes, wait_for_first_process_error
from dual_lora.lab.system.libraries import import_heavy_libraries

# By the name of the error, as failure.json holds it.
EXIT_CODES = {
    UserError.__name__: EXIT_USER,
    RunHeldElsewhere.__name__: EXIT_ELSEWHERE,
    Stopped.__name__: EXIT_STOPPED,
}
# Why runs of this process did not finish, by folder. Needed because on a full disk failure.json cannot be written.
failures: dict[Path, dict[str, str]] = {}
KILLED = {"error": "Killed", "message": "ended without a result; the same command tries again"}


def describe_error(error: BaseException) -> dict[str, str]:
    """Return an error's type and message, as failure.json holds them."""
    return {"error": type(error).__name__, "message": str(error)}


def execute_run(run: Run) -> dict[str, str] | None:
    """Train and evaluate one run. Whatever goes wrong is returned and kept for `report_failures`, so that other runs
    still happen.

    Raises:
        Stopped: a stop was asked for, which ends all runs.
        SystemExit: the run failed in one of several processes; the others may be waiting for it.
    """
    try:
        if not show_finished(run):
            with translate_machine_errors(), import_heavy_libraries():
                from dual_lora.lab.train.run import train_run
            train_run(run)
        return None
    except (Exception, SystemExit) as caught:
        error = caught
    wait_for_first_process_error()
    if isinstance(error, RunHeldElsewhere):
        print(describe_failure(run, describe_error(error)), file=sys.stderr)
    elif not isinstance(error, UserError):
        print(redact_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    failures[run.record.folder] = describe_error(error)
    if has_several_processes():
        sys.exit(report_failures([run]))
    return describe_error(error)


def show_finished(run: Run) -> bool:
    """If a run is already finished, verify its files and print its result; return whether it was. This avoids importing
    torch and transformers, which takes seconds.

    Raises:
        UserError: a file is missing or damaged.
    """
    if run.settings.force or has_several_processes():  # of several processes, train_run has the first one look
        return False
    run.record.finish_cleanup()
    result = run.record.read_result()
    if result:
        run.record.verify_files()
        print(format_finished(result, run))
    return result is not None


def report_failures(runs: list[Run]) -> int:
    """Print every run that did not finish, with the reason, and return the exit code."""
    failed = [(run, failure) for run in runs if (failure := pop_failure(run))]
    for run, failure in failed:
        line = describe_failure(run, failure)
        if failure["error"] != RunHeldElsewhere.__name__ or len(runs) > 1:  # of a single one it was printed before
            print(redact_secrets(line), file=sys.stderr)
    if len(runs) > 1:
        print(f"{len(runs) - len(failed)} of {len(runs)} runs finished", file=sys.stderr)
    return choose_exit_code(EXIT_CODES.get(failure["error"], EXIT_FAILED) for _, failure in failed)


def describe_failure(run: Run, failure: dict[str, str]) -> str:
    """Return the line for a run that did not finish."""
    error, message, path = failure["error"], get_first_line(failure["message"]), run.record.format_path()
    if error == RunHeldElsewhere.__name__:
        return f"skipped: {path}: {message}"
    if error == Stopped.__name__:
        return f"stopped: {path}: by {message}; the same command resumes it"
    return f"failed: {path}: {message if error == UserError.__name__ else f'{error}: {message}'}"


def pop_failure(run: Run) -> dict[str, str] | None:
    """Return why an attempted run has no result; None if it has one. Forgets the failure, so call it once per run."""
    failure = failures.pop(run.record.folder, None) or run.record.select_attempt_record(run.settings).read_failure()
    held = failure is not None and failure["error"] == RunHeldElsewhere.__name__
    # A forced run that another process holds was not done again, although there is an old result.
    if (failure is None or (held and not run.settings.force)) and run.record.read_result():
        return None
    return failure or KILLED
