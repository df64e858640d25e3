"""The file of a study's rows: one JSON line per finished cell, with a digest."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch


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


def copy_other_rows(source: Path, target: Path) -> None:
    """Append the rows of cells that are not in a file, such as those of another size of the study.

    Raises:
        StudyError: as `read_rows`.
    """
    known = {serialize_cell(row["cell"]) for row in read_rows(target)}
    for row in read_rows(source):
        if serialize_cell(row["cell"]) not in known:
            append_row(target, row)


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


def hash_row(row: Mapping) -> str:
    """Return the SHA-256 of a row without its digest, as it is read from a file, whatever the order of its keys."""
    rest = json.loads(json.dumps({name: value for name, value in row.items() if name != "digest"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@functools.cache
def hash_package() -> str:
    """Return a SHA-256 over the code of this package that this process started with. The harness is left out, because
    no cell uses it."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith("lab/"):
            digest.update(f"{name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def serialize_cell(cell: dict) -> str:
    """Return a text that is equal for equal cells."""
    return json.dumps(cell, sort_keys=True)


def select_rows(rows: Iterable[dict], cells: Sequence) -> list[dict]:
    """Return the rows of these cells, in the cells' order, one for each that has run."""
    by_key = {serialize_cell(row["cell"]): row for row in rows}
    return [by_key[key] for cell in cells if (key := serialize_cell(asdict(cell))) in by_key]


def group_rows(rows: Iterable[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Return the rows by their cells' values of these fields, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row["cell"][field] for field in fields), []).append(row)
    return groups
