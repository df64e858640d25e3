"""Published numbers as data: one YAML a table, every value with its source and how it is known.

    list_tables()                                         the names of all tables
    load_table("dora_table1_commonsense")                 one table
    find_rows(["avg"], model="llama3-8b", method="dora")  rows of any table, to compare with a result of ours

A file gives what identifies a row (`keys`), its values (`columns`, each with its metric), and `rows` as lists in that
order; a mapping at a row's end may hold `status` (of the row, or by column), `source`, `note`, `start` and
`average_note` (where the printed average is not that of the printed cells). Models and methods have this project's
names where it has one; a Dual LoRA rank is the full budget r1 + r2. A value keeps the text that was printed; "–" means
no value. `average` says which columns an average is over, `ours` what the harness calls a column (TASK:METRIC),
`started` which columns may start from another task's run: `protocol.start`, or a row's `start`, says from what.
DEVIATIONS.md in this folder says what the paper leaves open and what is done here.

It needs PyYAML only: with DUAL_LORA_LAZY=1 importing it loads neither torch nor PEFT.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

FOLDER = Path(__file__).parent
STATUSES = ("published", "digitized", "third_party_listing", "review_quote", "rerun", "inferred", "own")
MISSING = "–"
PROTOCOL = ("measures", "checkpoint", "seeds")
REQUIRED = ("id", "title", "source", "version", "status", "protocol", "keys", "columns", "rows")
OPTIONAL = ("average", "ours", "note", "started")
ROW_EXTRAS = ("status", "source", "note", "average_note", "start")
NUMBER = re.compile(r"([+-]?\d*\.?\d+(?:e[+-]?\d+)?)(?:±(\d*\.?\d+))?")

Key = str | int | float | None


@dataclass(frozen=True)
class Value:
    """A printed value. `number` and `spread` (the printed ±) are None where the text has none, e.g. in "4036-4063"."""

    text: str
    status: str
    number: float | None
    spread: float | None

    @property
    def decimals(self) -> int:
        """Digits printed after the point."""
        return len(self.text.partition("±")[0].partition(".")[2])


@dataclass(frozen=True)
class Row:
    """One row: what identifies it and its values by column, without those that are missing.

    `average_note` is there where the printed average is not that of the printed cells: (printed, recomputed).
    """

    table: str
    keys: Mapping[str, Key]
    values: Mapping[str, Value]
    source: tuple[str, ...]
    note: str
    average_note: tuple[Decimal, Decimal] | None
    start: str | None = None

    def has_keys(self, keys: Mapping[str, Key]) -> bool:
        """Return whether the row has these keys with these values."""
        return all(name in self.keys and is_same_key(self.keys[name], value) for name, value in keys.items())


def is_same_key(printed: Key, ours: Key) -> bool:
    """Return whether a printed key is one of ours: names may differ in case and punctuation (VeRA is vera)."""
    one, other = (re.sub(r"[-_ ]", "", key.lower()) if isinstance(key, str) else key for key in (printed, ours))
    return one == other


@dataclass(frozen=True)
class Table:
    """One published table or figure.

    `columns` maps a column to its metric and unit, `average` a column of averages to the columns averaged, `ours` a
    column to TASK:METRIC of the harness.
    """

    id: str
    title: str
    source: tuple[str, ...]
    version: str
    status: str
    protocol: Mapping[str, str]
    keys: tuple[str, ...]
    columns: Mapping[str, str]
    average: Mapping[str, tuple[str, ...]]
    ours: Mapping[str, str]
    note: str
    started: tuple[str, ...]
    rows: tuple[Row, ...]

    def select_rows(self, columns: Iterable[str] = (), **keys: Key) -> list[Row]:
        """Return the rows with these keys that have a value in each of `columns`."""
        return [row for row in self.rows if row.has_keys(keys) and set(columns) <= set(row.values)]


def list_tables() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_table(name: str) -> Table:
    """Return a table by its name.

    Raises:
        ValueError: there is no such table, or its file is wrong; names file and field.
    """
    if name not in list_tables():
        raise ValueError(f"{name}: no such table; known: {', '.join(list_tables())}")
    return read_table(FOLDER / f"{name}.yaml")


def find_rows(columns: Iterable[str] = (), **keys: Key) -> list[Row]:
    """Return the rows of all tables with these keys and a value in each of `columns`."""
    columns = list(columns)
    return [row for name in list_tables() for row in load_table(name).select_rows(columns, **keys)]


def check_fields(path: Path, raw: Any) -> None:
    """Refuse a file in which a field of a table is missing or unknown, or that names columns it does not have.

    Raises:
        ValueError: with file and field.
    """
    require(isinstance(raw, dict), path, "file", "must be a mapping")
    for name in REQUIRED:
        require(raw.get(name), path, name, "is missing")
    for name in raw:
        require(name in REQUIRED + OPTIONAL, path, name, "is not a field of a table")
    require(raw["id"] == path.stem, path, "id", f"is {raw['id']}, but names are files")
    require(isinstance(raw["source"], list), path, "source", "must be a list")
    for name in PROTOCOL:
        require(raw["protocol"].get(name), path, f"protocol.{name}", "is missing")
    check_status(path, "status", raw["status"])
    for field, names in {
        **{f: raw.get(f, {}) for f in ("ours", "started")},
        **{f"average.{k}": [k, *v] for k, v in raw.get("average", {}).items()},
    }.items():
        for name in names:
            require(name in raw["columns"], path, field, f"names {name}, which is not a column")


def read_table(path: Path) -> Table:
    """Return the table of a file.

    Raises:
        ValueError: a field is missing or wrong; names file and field.
    """
    # BaseLoader keeps every scalar as the text that was written, so that 8.50 stays 8.50
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: file: {error}") from error
    check_fields(path, raw)
    rows = tuple(read_row(path, raw, number, list(row)) for number, row in enumerate(raw["rows"]))
    for number, row in enumerate(rows):
        require(row.keys not in [r.keys for r in rows[:number]], path, f"rows[{number}]", f"repeats {dict(row.keys)}")
    return Table(
        **{name: raw[name] for name in ("id", "title", "version", "status")},
        **{name: MappingProxyType(raw.get(name, {})) for name in ("protocol", "columns", "ours")},
        source=tuple(raw["source"]),
        keys=tuple(raw["keys"]),
        average=MappingProxyType({name: tuple(parts) for name, parts in raw.get("average", {}).items()}),
        note=raw.get("note", ""),
        started=tuple(raw.get("started", ())),
        rows=rows,
    )


def read_row(path: Path, table: dict[str, Any], number: int, cells: list[Any]) -> Row:
    """Return one row of a file: its keys, its values and what the mapping at its end says.

    Raises:
        ValueError: it has too few or too many cells, or a key or status that is not known.
    """
    field, keys, columns = f"rows[{number}]", table["keys"], table["columns"]
    extras = cells.pop() if cells and isinstance(cells[-1], dict) else {}
    names = [*keys, *columns]
    for name in extras:
        require(name in ROW_EXTRAS, path, field, f"{name} is none of {', '.join(ROW_EXTRAS)}")
    require(len(cells) >= len(names), path, field, f"has no {', '.join(names[len(cells) :])}")
    require(len(cells) == len(names), path, field, f"has {len(cells)} cells for {len(names)} keys and columns")
    given = extras.get("status", table["status"])
    statuses = given if isinstance(given, dict) else dict.fromkeys(columns, given)
    for name, status in statuses.items():
        require(name in columns, path, f"{field}.status", f"names {name}, which is not a column")
        check_status(path, f"{field}.status", status)
    values = {
        name: parse_value(text, statuses.get(name, table["status"]))
        for name, text in zip(columns, cells[len(keys) :], strict=True)
        if text != MISSING
    }
    noted = extras.get("average_note")
    require(noted is None or set(noted) == {"printed", "recomputed"}, path, field, "average_note: printed, recomputed")
    return Row(
        table=table["id"],
        keys=MappingProxyType(dict(zip(keys, map(parse_key, cells), strict=False))),
        values=MappingProxyType(values),
        source=tuple(extras.get("source", table["source"])),
        note=extras.get("note", ""),
        average_note=(Decimal(noted["printed"]), Decimal(noted["recomputed"])) if noted else None,
        start=extras.get("start", table["protocol"].get("start")),
    )


def parse_value(text: str, status: str) -> Value:
    """Return a cell as a value."""
    found = NUMBER.fullmatch(text)
    number, spread = found.groups() if found else (None, None)
    return Value(text, status, float(number) if number else None, float(spread) if spread else None)


def parse_key(text: str) -> Key:
    """Return a cell that identifies a row: a number where it is one, None where there is none."""
    if text == MISSING:
        return None
    if re.fullmatch(r"\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d*\.\d+", text) else text


def check_status(path: Path, field: str, status: str) -> None:
    """Refuse a status of values that is not known.

    Raises:
        ValueError: with the known ones.
    """
    require(status in STATUSES, path, field, f"{status} is none of {', '.join(STATUSES)}")


def require(condition: object, path: Path, field: str, message: str) -> None:
    """Refuse what does not meet a condition.

    Raises:
        ValueError: with the file, the field and this message, if the condition is false.
    """
    if not condition:
        raise ValueError(f"{path.name}: {field}: {message}")
