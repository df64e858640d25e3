"""Predictions of two methods on the same seeds and examples."""

from collections.abc import Mapping, Sequence

from tasks.base import Row

Runs = Mapping[int, Sequence[Row]]  # the judged rows of each seed


def pair_rows(ours: Runs, theirs: Runs) -> list[list[list[Row]]]:
    """Return the rows of both methods, [method][seed][example], for the seeds of both, in one order of examples.

    Raises:
        ValueError: no seed in common, an example twice or not at all, or different examples or gold.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} against {sorted(theirs)}")
    runs = [[index_rows(method[seed]) for seed in seeds] for method in (ours, theirs)]
    first = runs[0][0]
    for run in runs[0] + runs[1]:
        check_same_data(first, run)
    return [[[run[key] for key in first] for run in method] for method in runs]


def index_rows(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Return the rows by split and id.

    Raises:
        ValueError: there are none, or one occurs twice.
    """
    found = {(row["split"], row["id"]): row for row in rows}
    if len(found) < len(rows) or not found:
        raise ValueError(f"{len(rows)} predictions of {len(found)} examples; every example needs one")
    return found


def check_same_data(first: dict[tuple[str, str], Row], other: dict[tuple[str, str], Row]) -> None:
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
