"""Predictions of two sides, each of one method or several, on the same seeds and examples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

from tasks.base import Row

RowsBySeed = Mapping[int, Sequence[Row]]  # judged rows: those of one run for each seed


class UnscorableRows(ValueError):
    """Judged rows without what a score is made of, or of which it is not a finite number."""


@contextmanager
def translate_score_errors(problem: str) -> Iterator[None]:
    """Turn what a task's code raises over rows without what it reads into one line.

    Raises:
        UnscorableRows: with the problem and the error.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        why = f"{problem} ({error!r}), which another version of the task may have written"
        raise UnscorableRows(f"{why}; do the runs again") from error


def pair_rows(ours: Sequence[RowsBySeed], theirs: Sequence[RowsBySeed]) -> list[list[list[Row]]]:
    """Return the rows of pairs of runs, [side][pair][example], in one order of examples: seed by seed, for the seeds
    that all have, every one of ours with every one of theirs.

    Raises:
        ValueError: no seed in common, an example twice or not at all, or different examples or gold.
    """
    seeds = sorted(set.intersection(*(set(runs) for runs in (*ours, *theirs))))
    if not seeds:
        raise ValueError(f"no seed in common: {' against '.join(str(sorted(runs)) for runs in (*ours, *theirs))}")
    first = index_rows(ours[0][seeds[0]])
    sides = [[[order_rows(runs[seed], first) for runs in side] for seed in seeds] for side in (ours, theirs)]
    pairs = [pair for one, other in zip(*sides, strict=True) for pair in product(one, other)]
    return [list(side) for side in zip(*pairs, strict=True)]


def order_rows(rows: Sequence[Row], first: Mapping[tuple[str, str], Row]) -> list[Row]:
    """Return a run's rows in the order of `first`, the indexed rows of another run.

    Raises:
        ValueError: as `index_rows` and `check_same_data`.
    """
    run = index_rows(rows)
    check_same_data(first, run)
    return [run[key] for key in first]


def index_rows(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Return the rows by split and id.

    Raises:
        ValueError: there are none, or one occurs twice.
    """
    found = {(row["split"], row["id"]): row for row in rows}
    if len(found) < len(rows) or not found:
        raise ValueError(f"{len(rows)} predictions of {len(found)} examples; every example needs one")
    return found


def check_same_data(first: Mapping[tuple[str, str], Row], other: Mapping[tuple[str, str], Row]) -> None:
    """Refuse runs that were scored on different examples.

    Raises:
        ValueError: with an example, or a gold value, that only one of them has.
    """
    if lost := sorted(first.keys() ^ other.keys()):
        at = f"{len(lost)} are in one only, such as {' '.join(lost[0])}"
        raise ValueError(f"changed data: {len(first)} examples in one run, {len(other)} in another; {at}")
    for key, row in first.items():
        for column in ("gold", "references"):
            if row.get(column) != other[key].get(column):
                values = f"{row.get(column)!r} in one run, {other[key].get(column)!r} in another"
                raise ValueError(f"changed data: {column} of {' '.join(key)} is {values}")
