"""What all studies share as commands: their options, running what is missing, and writing the report."""

import importlib.util
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .rows import StudyError, read_rows, run_missing, select_rows

REPORT_LIBRARIES = ("matplotlib", "scipy")  # the extra `analysis`


def create_parser(study: str, sizes: Iterable[str], about: str) -> ArgumentParser:
    """Return a parser of the options that every study has: --out, --size and --report."""
    parser = ArgumentParser(prog=f"python -m dual_lora.analysis.{study}", description=about)
    parser.add_argument("--out", type=Path, required=True, help="file of rows, one JSON line a cell")
    parser.add_argument("--size", choices=list(sizes), default="full")
    parser.add_argument("--report", type=Path, help="folder of the report (default: report/ next to the rows)")
    return parser


def run_command(chosen: Namespace, plan: Callable[[], Sequence], run_cell: Callable, write_report: Callable) -> None:
    """Run a study as its command line says. chosen: what a parser of `create_parser` returned.

    Raises:
        SystemExit: with one line and exit status 1, in place of a StudyError or an error of the disk.
    """
    try:
        _check_report_libraries()
        run_study(plan(), run_cell, write_report, chosen.out, chosen.report)
    except (StudyError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _check_report_libraries() -> None:
    """Refuse to start a study, which may take hours, whose report cannot be written."""
    missing = [name for name in REPORT_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise StudyError(
            f"the report needs {' and '.join(missing)}; in a clone of the repository: pip install '.[analysis]'"
        )


def run_study(
    cells: Sequence, run_cell: Callable, write_report: Callable, path: Path, report: Path | None = None
) -> None:
    """Run what is missing in one thread, with a line of progress for every twentieth cell, then write the report.

    report: its folder; None is report/ next to the rows.
    """
    torch.set_num_threads(1)
    folder = report or path.parent / "report"
    make_report_folder(folder)
    missing = len(cells) - len(select_rows(read_rows(path), cells))
    print(f"{path}: {missing} of {len(cells)} cells to run", flush=True)
    start = time.perf_counter()
    # If nothing is missing, the file is only read, so another process may be writing to it.
    for done, _ in enumerate(run_missing(cells, run_cell, path) if missing else (), 1):
        if done % 20 == 0 or done == missing:
            seconds = time.perf_counter() - start
            print(f"{done}/{missing}, {seconds:.0f} s, {seconds / done * (missing - done):.0f} s to go", flush=True)
    for written in write_report(select_rows(read_rows(path), cells), folder):
        print(written)


def rewrite_report(cells: Sequence, write_report: Callable, path: Path, report: Path) -> list[Path]:
    """Write the report of a study from only its rows and return its files.

    Raises:
        StudyError: cells have not run.
    """
    rows = select_rows(read_rows(path), cells)
    if len(rows) < len(cells):
        raise StudyError(f"{path}: {len(cells) - len(rows)} of {len(cells)} cells have not run; run them first")
    make_report_folder(report)
    return write_report(rows, report)


def make_report_folder(folder: Path) -> None:
    """Make the folder of a report if it is not there.

    Raises:
        StudyError: it cannot be made, or not be written.
    """
    try:
        make_writable_folder(folder)
    except OSError as error:
        raise StudyError(f"{folder}: no folder to write the report to ({error.strerror}); give another one") from error


def make_writable_folder(folder: Path) -> None:
    """Make a folder if it is not there, and try to write to it.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
