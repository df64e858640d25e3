"""A study of many small cells: one JSON line per finished cell, so that a stopped study resumes where it stopped.

A study is a module with `plan_cells(size, ...)`, `run_cell(cell)` and `write_report(rows, folder)`. A cell is a frozen
dataclass of plain values; the same cell gives the same result, bit for bit, on the same machine and number of threads.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .dots import Panel, draw_dots

CONFIDENCE = 0.95  # of the intervals
# The best rate counts as at the edge of its grid only if it beats its neighbour by more than this.
EDGE = 0.005
REPORT_LIBRARIES = ("matplotlib", "scipy")  # the extra `analysis`


class StudyError(ValueError):
    """A mistake that the user can fix; its text is one line."""


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file, [] if there is no file. A last line that a crash cut short is left out.

    Raises:
        StudyError: any other line does not hold a cell with its result, has no digest, or was changed.
    """
    rows = []
    for number, line in enumerate(_read_complete_lines(path).splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"cell": dict(row["cell"]), "result": dict(row["result"]), **row})
            if row.get("digest") != hash_row(row):
                raise StudyError("changed since it was written" if "digest" in row else "its digest is missing")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            what = error if isinstance(error, StudyError) else "damaged"
            raise StudyError(f"{path}, line {number}: {what}; remove the line, its cell runs again") from error
    return rows


def _read_complete_lines(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # of a pipe there may be no end
        raise StudyError(f"{path}: not a file; give another one")
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def hash_row(row: Mapping) -> str:
    """Return the SHA-256 of a row without its digest, as it is read from a file, whatever the order of its keys."""
    rest = json.loads(json.dumps({name: value for name, value in row.items() if name != "digest"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@functools.cache
def hash_package() -> str:
    """Return a SHA-256 over the code of this package that this process started with. The harness is left out, because
    no cell uses it."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith("lab/"):
            digest.update(f"{name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def append_row(path: Path, row: dict) -> None:
    """Append a row as one line and wait until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_missing(cells: Sequence, run_cell: Callable, path: Path) -> Iterator[dict]:
    """Run the cells that have no row in the file, in order, and yield each row once it is written.

    run_cell: cell -> its result as plain values. A row holds the cell, the result, the hash of the code, torch's
    version, the number of threads and the seconds it took.

    Raises:
        StudyError: another process writes to the file.
    """
    with hold_file(path):
        os.truncate(path, len(_read_complete_lines(path)))  # else the next row would continue the line of a crash
        finished, code = {serialize_cell(row["cell"]) for row in read_rows(path)}, hash_package()
        for cell in cells:
            if serialize_cell(asdict(cell)) in finished:
                continue
            start = time.perf_counter()
            row = {"cell": asdict(cell), "result": run_cell(cell)}
            row |= {"code": code, "torch": torch.__version__, "threads": torch.get_num_threads()}
            row |= {"seconds": round(time.perf_counter() - start, 3)}
            row |= {"digest": hash_row(row)}
            append_row(path, row)
            yield row


def discard_other_code(path: Path) -> None:
    """Empty a file of rows if not all of them are of this code, as of a forced run that was stopped.

    Raises:
        StudyError: another process writes to the file, or as `read_rows`.
    """
    with hold_file(path):
        if any(row.get("code") != hash_package() for row in read_rows(path)):
            os.truncate(path, 0)


@contextlib.contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Lock a file against other processes; it is created if missing.

    Raises:
        StudyError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"{path}: another process writes to it; wait until it ends") from None
        yield


def serialize_cell(cell: dict) -> str:
    """Return a text that is equal for equal cells."""
    return json.dumps(cell, sort_keys=True)


def select_rows(rows: Iterable[dict], cells: Sequence) -> list[dict]:
    """Return the rows of these cells, in the cells' order, one for each that has run."""
    by_key = {serialize_cell(row["cell"]): row for row in rows}
    return [by_key[key] for cell in cells if (key := serialize_cell(asdict(cell))) in by_key]


def copy_other_rows(source: Path, target: Path) -> None:
    """Append the rows of cells that are not in a file, such as those of another size of the study.

    Raises:
        StudyError: as `read_rows`.
    """
    known = {serialize_cell(row["cell"]) for row in read_rows(target)}
    for row in read_rows(source):
        if serialize_cell(row["cell"]) not in known:
            append_row(target, row)


def group_rows(rows: Iterable[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Return the rows by their cells' values of these fields, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row["cell"][field] for field in fields), []).append(row)
    return groups


def choose_rate(rows: Iterable[dict], criterion: str) -> tuple[float, bool]:
    """Return the learning rate with the least mean of result[criterion] over seeds, and whether it is at an edge.

    At an edge: it is the first or last of the rates and beats its neighbour by more than EDGE, so that a better rate
    may lie outside. A rate at which a seed diverged to NaN is not chosen.

    Raises:
        StudyError: a rate has fewer seeds than another.
    """
    groups = group_rows(sorted(rows, key=lambda row: row["cell"]["rate"]), "rate")
    if len({len(group) for group in groups.values()}) > 1:
        raise StudyError("some rates have fewer seeds than others: run the missing cells first")
    means = {rate: sum(row["result"][criterion] for row in group) / len(group) for (rate,), group in groups.items()}
    means = {rate: math.inf if math.isnan(mean) else mean for rate, mean in means.items()}
    rates, best = list(means), min(means, key=means.get)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return best, False
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return best, means[neighbour] - means[best] > EDGE


def select_rate(rows: Iterable[dict], rate: float) -> list[dict]:
    """Return the rows with a learning rate, by seed."""
    return sorted((row for row in rows if row["cell"]["rate"] == rate), key=lambda row: row["cell"]["seed"])


def estimate_mean(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, low and high: the mean of values, one a seed, and its t-interval, in their unit. With one value,
    low and high are None."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    error = float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def estimate_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Return `estimate_mean` of our values minus theirs, both in the same order of seeds."""
    return estimate_mean([one - other for one, other in zip(ours, theirs, strict=True)])


def format_average(found: dict, digits: int = 3) -> str:
    """Return what `estimate_mean` found as text: the mean ± half the width of the interval."""
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {found['high'] - found['mean']:.{digits}f}"


def format_rate(line: Mapping) -> str:
    """Return the rate of a report's line as text. Keys of the line: rate, at_edge, as from `choose_rate`."""
    return f"{line['rate']:g}{' (edge)' if line['at_edge'] else ''}"


def describe_rows(rows: Sequence[dict], study: str) -> str:
    """Return the line of a report that says what its numbers come from."""
    seeds = len({row["cell"]["seed"] for row in rows})
    versions = " and ".join(sorted({f"torch {row['torch']}, {row['threads']} thread" for row in rows}))
    code = ", ".join(sorted({row["code"][:10] if "code" in row else "not recorded" for row in rows}))
    return (
        f"`python -m dual_lora.analysis.{study}`: {len(rows)} runs, {seeds} seed{'s' * (seeds > 1)}, {versions}, "
        f"code {code}. "
        "Every comparison is exploratory: each interval is of 95 %, not corrected for their number.\n\n"
    )


def format_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns after the first are aligned right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def write_dot_report(
    folder: Path, text: str, values: Mapping[str, Mapping[str, Mapping]], labels: Sequence[str], unit: str, across: int
) -> list[Path]:
    """Write table.md and figure.png, each completely or not at all, and return their paths.

    text: of table.md. values: of each panel, by the labels of its lines, as in `Panel`. across: panels side by side.
    """
    table, figure = "table.md", "figure.png"
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as made:
        (Path(made) / table).write_text(text, "utf-8")
        draw_dots([Panel(title, lines) for title, lines in values.items()], labels, unit, Path(made) / figure, across)
        return [(Path(made) / name).replace(folder / name) for name in (table, figure)]


def create_parser(study: str, sizes: Iterable[str], about: str) -> ArgumentParser:
    """Return a parser of the options that every study has: --out, --size and --report."""
    parser = ArgumentParser(prog=f"python -m dual_lora.analysis.{study}", description=about)
    parser.add_argument("--out", type=Path, required=True, help="file of rows, one JSON line a cell")
    parser.add_argument("--size", choices=list(sizes), default="full")
    parser.add_argument("--report", type=Path, help="folder of the report (default: report/ next to the rows)")
    return parser


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


def make_writable_folder(folder: Path) -> None:
    """Make a folder if it is not there, and try to write to it.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_report_folder(folder: Path) -> None:
    """Make the folder of a report if it is not there.

    Raises:
        StudyError: it cannot be made, or not be written.
    """
    try:
        make_writable_folder(folder)
    except OSError as error:
        raise StudyError(f"{folder}: no folder to write the report to ({error.strerror}); give another one") from error


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
