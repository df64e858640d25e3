"""Tables of your own in a folder: which file is which split, and their rows with the place of each.

    data_dir/train.csv validation.csv test.csv      or .tsv, .jsonl, .json (a list of objects), .parquet; all but the
                                                    last also as .gz
A split's file is called train or training; validation, valid, val or dev; test. More may follow ("train-clean.csv",
"train-00000-of-00002.parquet"). A folder with a single file of another name has one split, of which rows are set apart.

CSV, TSV and JSON are read by the standard library, strictly: datasets' own readers fill short rows, take "N/A" for
missing and a lone quotation mark for text, and name no line. Parquet is read by datasets.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import base
from tasks.base import Row, Split, Task, TaskError

if TYPE_CHECKING:
    import pyarrow

ALIASES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
TEXT_KINDS = (".csv", ".tsv", ".jsonl", ".json")
KINDS = (*TEXT_KINDS, *(f"{kind}.gz" for kind in TEXT_KINDS), ".parquet")
SIDE_ENDINGS = (".dvc", ".md5", ".sha1", ".sha256", ".sha512")  # of what tools keep about a table beside it
NOT_TABLES = (".py", ".ipynb", ".sh", ".md", ".rst", ".log", ".yaml", ".yml", ".toml")  # scripts, notes, settings
SHARD = re.compile(r"[-_.](\d+)[-_]of[-_](\d+)([-_.][0-9a-f]{8,})?$")  # older names of the hub end in a hash
LINE_BREAK = re.compile(r"\r\n|\r|\n")
WHERE = "give data_dir=DIR, a folder with train, validation and test files"
# How content begins that is not text: what it is, the ending it is read by, and the remedy where it has another one.
MAGIC = {
    b"\x1f\x8b": ("gzipped", ".gz", "add .gz to its name"),
    b"PAR1": ("Parquet", ".parquet", "name it .parquet"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "", "unpack it, or export it as CSV"),
}

NO_CLASS = -1
# What pyarrow and datasets raise for a file, or a column of it, that they cannot read.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, OverflowError, NotImplementedError)
LIST_START = 100  # characters in which the first object of a list begins
LEAVE_OUT = "task.options.scored=validation leaves the test file out"

Files = dict[str, tuple[Path, ...]]  # the files of each split; several where it is in shards


class Place:
    """Where a row is: a file, and a line or row of it."""

    def __init__(self, path: Path, number: int, unit: str) -> None:
        self.path, self.number, self.unit = path, number, unit

    def __str__(self) -> str:
        return f"{self.path}: {self.unit} {self.number}"


Placed = tuple[Place, Row]


# Files


def find_files(data_dir: str | None, name: str) -> Files:
    """Return the files of every split in a folder, or {"train": its only file}.

    Raises:
        TaskError: there is no such folder, no table in it, or a file that is not a split's or one too many.
    """
    if data_dir is None:
        raise TaskError(f"task={name}: reads files of your own; {WHERE}")
    root = Path(data_dir).expanduser()
    if root.is_file():
        raise TaskError(f"data_dir={data_dir}: is a file; give the folder it is in, with no other table next to it")
    if not root.is_dir():
        raise TaskError(f"data_dir={data_dir}: no such folder")
    try:
        paths = sorted(path for path in root.iterdir() if find_ending(path) and not path.name.startswith("."))
    except OSError as error:
        raise TaskError(
            f"data_dir={data_dir}: cannot be read ({error.strerror}); check that you may read it"
        ) from error
    if not paths:
        raise TaskError(f"data_dir={data_dir}: {describe_folder(root)}")
    check_unread(root, paths)
    for path in paths:
        check_content(path)
    if len(paths) == 1 and find_split(paths[0]) is None:
        check_shards(paths)
        return {"train": (paths[0],)}
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if (split := find_split(path)) is None:
            raise TaskError(f"{path}: not named after a split; rename it to train, validation or test, or move it away")
        found[split].append(path)
    if "train" not in found:
        raise TaskError(f"data_dir={data_dir}: no file called train, only {', '.join(p.name for p in paths)[:200]}")
    for files in found.values():
        check_shards(files)
    return {split: tuple(files) for split, files in found.items()}


def find_ending(path: Path) -> str | None:
    """Return the ending by which a file is read, without .gz; None if it is not a table."""
    kind = next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)
    return kind and kind.removesuffix(".gz")


def check_unread(root: Path, tables: list[Path]) -> None:
    """Refuse a file or folder that may hold rows and is not read although its name says a split: the run would do
    without it.

    Raises:
        TaskError: with the file or folder.
    """
    beside = {f"{table.name}{ending}" for table in tables for ending in SIDE_ENDINGS}
    for path in sorted(set(root.iterdir()) - set(tables)):
        says_split = any(map(find_split_of_word, split_words(path.name.lower())))
        other = path.name in beside or (path.suffix.lower() in NOT_TABLES and path.is_file())
        if says_split and not path.name.startswith(".") and not other:
            remedy = "put its table beside the others" if path.is_dir() else "save it"
            what = "a folder, which is not read" if path.is_dir() else "not read"
            raise TaskError(f"{path}: {what}; {remedy} as one of {', '.join(TEXT_KINDS)} or .parquet, or move it away")


def check_content(path: Path) -> None:
    """Refuse what is not a file, and a file whose content is of another kind than its ending says.

    Raises:
        TaskError: with what it is.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a file" if path.exists() else "a link to a file that is not there"
        raise TaskError(f"{path}: {what}; move it away, or put a file in its place")
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}); check that you may read it") from error
    ending = path.suffix.lower()
    for magic, (what, own, remedy) in MAGIC.items():
        if start.startswith(magic) and ending != own:
            raise TaskError(f"{path}: its content is {what}; {remedy}")
    if ending == ".parquet" and start and not start.startswith(b"PAR1"):
        raise TaskError(f"{path}: its content is not Parquet; name it by what it is, such as .csv, or save it again")
    if ending == ".gz" and start and not start.startswith(b"\x1f\x8b"):
        raise TaskError(f"{path}: its content is not gzipped; take .gz off its name")


def get_stem(path: Path) -> str:
    """Return a file's name in lower case, without the ending by which it is read as a table."""
    name = path.name.lower().removesuffix(".gz")
    return name.removesuffix(find_ending(path) or "")


def find_split(path: Path) -> str | None:
    """Return the split a file's name says, None if it says none."""
    return find_split_of_word(split_words(get_stem(path))[0])


def split_words(name: str) -> list[str]:
    """Return the words of a file's name."""
    return re.split(r"[-_. ]", name)


def find_split_of_word(word: str) -> str | None:
    """Return the split that a word names, None if it names none."""
    return next((split for split, words in ALIASES.items() if word in words), None)


def check_shards(files: list[Path]) -> None:
    """Refuse several files of one split that are not the shards of one, or of which some are missing.

    Raises:
        TaskError: with the files.
    """
    shards = [SHARD.search(get_stem(path)) for path in files]
    if len(files) == 1 and shards[0] is None:
        return
    if None in shards:
        raise TaskError(f"{files[0]} and {files[1].name}: both are the {find_split(files[0])} split; keep one of them")
    numbers, count = sorted(int(shard[1]) for shard in shards), int(shards[0][2])
    if twice := base.find_duplicate(map(str, numbers)):
        same = zip(files, shards, strict=True)
        several = " and ".join(path.name for path, shard in same if int(shard[1]) == int(twice))
        raise TaskError(f"{files[0].parent}: {several} are the same part; keep one of them")
    counted_from = numbers[0] if len(numbers) == count and numbers[-1] - numbers[0] == count - 1 else None
    if counted_from not in (0, 1) or len({int(shard[2]) for shard in shards}) > 1:
        raise TaskError(f"{files[0]}: {len(files)} of its {count} parts are there; fetch the others")


def describe_folder(root: Path) -> str:
    """Return what a folder without tables holds, for the message."""
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    below = next((path for path in folders if any(map(find_ending, path.iterdir()))), None)
    if below:
        return f"no table in it, but in {below.name}/: give data_dir={below}"
    none = f"no {', '.join(TEXT_KINDS)} or .parquet in it"
    if names:
        return f"{none}, only {', '.join(names)[:100]}; save your table as one of these"
    return f"{none}; put train, validation and test files into it"


# Rows


def read_rows(path: Path, quotes: bool) -> list[Placed]:
    """Return every row of a table with its place. quotes: fields of CSV and TSV may be in quotation marks; else
    these are text.

    Raises:
        TaskError: the file has no rows, or cannot be read as its ending says; with the line.
    """
    readers = {
        ".csv": lambda: read_lines(path, ",", quotes),
        ".tsv": lambda: read_lines(path, "\t", quotes),
        ".jsonl": lambda: read_objects(path),
        ".json": lambda: read_list(path),
        ".parquet": lambda: read_parquet(path),
    }
    found = list(readers[find_ending(path)]())
    if not found:
        raise TaskError(f"{path}: no rows; put some into it")
    return found


def get_stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file does.

    Raises:
        TaskError: it cannot be looked at.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}); check that you may read it") from error
    return facts.st_size, facts.st_mtime_ns


def read_lines(path: Path, delimiter: str, quotes: bool) -> Iterator[Placed]:
    """Yield the rows of a text table.

    Raises:
        TaskError: it is JSON, its header has another separator, or `base.read_table` refuses it.
    """
    header = base.read_text(path).lstrip("\r\n").partition("\n")[0]
    if header.lstrip().startswith(('{"', "[{")):
        ending = ".jsonl" if header.lstrip().startswith("{") else ".json"
        raise TaskError(f"{path}: its content is JSON; name it {ending}")
    names = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    other = next((sign for sign in names if sign != delimiter and sign in header), None)
    if other and delimiter not in header:
        remedy = f"save it with {names[delimiter]}{' or name it .tsv' if other == chr(9) else ''}"
        raise TaskError(f"{path}: its header is separated by {names[other]}, not by {names[delimiter]}; {remedy}")
    remedy = "write every row with all of its fields"
    if quotes:
        remedy += (
            ", in quotation marks where one holds a separator; where marks are text, take task.options.quotes=false"
        )
    found = list(base.read_table(path, delimiter, quotes, remedy=remedy))
    check_swallowed_rows(path, found, delimiter)
    for number, row in found:
        yield Place(path, number, "line"), row


def check_swallowed_rows(path: Path, rows: list[tuple[int, Row]], delimiter: str) -> None:
    """Refuse a field with line breaks that holds full rows: two quotation marks without partners, which are text,
    make one field of all rows between them. rows: with the numbers of their first lines.

    Raises:
        TaskError: with the lines.
    """
    broken = [(number, row) for number, row in rows if any(map(LINE_BREAK.search, row.values()))]
    if not broken:
        return
    plain = [row for _, row in rows if not any(map(LINE_BREAK.search, row.values()))]
    known = {name: [row[name] for row in plain] for name in rows[0][1]}
    for number, row in broken:
        for name in row:
            if holds_rows(row, name, delimiter, known):
                last = number + sum(len(LINE_BREAK.findall(value)) for value in row.values())
                raise TaskError(
                    f"{path}: lines {number} to {last} are one field {name!r} in quotation marks that holds whole rows"
                    "; where marks are text, double them or take task.options.quotes=false; where these are no rows, "
                    "save the table as .jsonl"
                )


def holds_rows(row: Row, name: str, delimiter: str, known: dict[str, list[str]]) -> bool:
    """Return whether a line within a field reads as a row of the table, or the field's first and last line do."""
    columns = list(known)
    place = columns.index(name)
    first, *middle = (line.split(delimiter) for line in LINE_BREAK.split(row[name]))
    if not middle or len(columns) < 2:
        return False
    values = list(row.values())
    *middle, last = middle
    ends = [*values[:place], *first], [*last, *values[place + 1 :]]

    def reads_as_row(fields: list[str]) -> bool:
        # a comma of a text has a blank after it, one between columns has none
        return len(fields) == len(columns) and all(
            column == name or not (position and value.startswith(" ")) and fits_column(value, known[column])
            for position, (column, value) in enumerate(zip(columns, fields, strict=True))
        )

    return any(map(reads_as_row, middle)) or all(map(reads_as_row, ends))


def fits_column(value: str, known: list[str]) -> bool:
    """Return whether a value is of the kind of a column's `known` ones: a number, one of a few words, or any text."""
    if known and all(map(base.NUMBER.fullmatch, known)):
        return bool(base.NUMBER.fullmatch(value))
    return value in known or len(set(known)) > len(known) / 2


def read_objects(path: Path) -> Iterator[Placed]:
    """Yield the rows of a .jsonl file.

    Raises:
        TaskError: a line is not a JSON object, or the file is one list.
    """
    text = base.read_text(path)
    if text.lstrip().startswith("[") and text.rstrip().endswith("]") and "{" in text[:LIST_START]:
        raise TaskError(f"{path}: its content is one list, not an object a line; name it .json")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = Place(path, number, "line")
            comma = "; end the line without a comma" if line.rstrip().endswith("},") else ""
            yield place, require_object(base.parse_json(line, str(place), f"write one object a line{comma}"), place)


def read_list(path: Path) -> Iterator[Placed]:
    """Yield the rows of a .json file, which holds one list of objects.

    Raises:
        TaskError: it holds something else.
    """
    remedy = "give a list of objects, or a .jsonl with one object a line"
    content = base.parse_json(base.read_text(path), str(path), remedy)
    if not isinstance(content, list):
        raise TaskError(f"{path}: not a list; {remedy}")
    for number, value in enumerate(content, start=1):
        place = Place(path, number, "row")
        yield place, require_object(value, place)


def require_object(value: Any, place: Place) -> Row:
    """Return a row as it was read.

    Raises:
        TaskError: it is not an object with columns.
    """
    if not isinstance(value, dict):
        raise TaskError(f"{place}: {base.quote(value)} is not an object with columns; write {{...}}")
    return value


def read_parquet(path: Path) -> Iterator[Placed]:
    """Yield rows; class indices are written as the names the file has for them, and -1, by which `datasets` marks a row
    without a class, as the gap that it is.

    Raises:
        TaskError: it cannot be read as Parquet, a column occurs twice, or one holds what cannot be read.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except UNREADABLE as error:
        raise TaskError(f"{path}: cannot be read as Parquet ({shorten(error)}); save it again") from error
    base.check_header(path, table.column_names, (), "save it again")
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = list_values(table.select([name]))
        except UNREADABLE as error:
            remedy = "remove the column, or save it as text"
            raise TaskError(f"{path}: column {name!r} cannot be read ({shorten(error)}); {remedy}") from error
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield Place(path, number, "row"), dict(zip(columns, values, strict=True))


def list_values(table: "pyarrow.Table") -> list[Any]:
    """Return the values of a table's only column as `read_parquet` yields them."""
    from datasets import ClassLabel, Dataset

    dataset = Dataset(table)
    ((name, kind),) = dataset.features.items()
    values = [row[name] for row in dataset.to_list()]
    if not isinstance(kind, ClassLabel) or not kind.names:
        return values
    words = {NO_CLASS: None} | dict(enumerate(kind.names))
    return [words.get(value, value) for value in values]


def shorten(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())[:200]


def check_columns(path: Path, rows: list[Placed], needed: tuple[str, ...], remedy: str) -> None:
    """Refuse rows that lack a column; an object a line may have others than the one above it.

    Raises:
        TaskError: with the first such row, or the file where all rows have the same columns.
    """
    one_header = find_ending(path) not in (".jsonl", ".json")
    for place, row in rows[:1] if one_header else rows:
        base.check_header(path if one_header else place, row, needed, remedy)


def check_split_column(path: Path, rows: list[Placed]) -> None:
    """Refuse rows to train on that a column calls validation or test.

    Raises:
        TaskError: with the first such row.
    """
    apart = {word for split, words in ALIASES.items() if split != "train" for word in words}
    for place, row in rows if find_split(path) in (None, "train") else ():
        for name, value in row.items():
            if name.strip().casefold() in SPLIT_COLUMNS and str(value).strip().casefold() in apart:
                what = f"{place}, column {base.quote(name)}: {base.quote(value)} is not for training"
                remedy = "give one file a split, such as train.csv and test.csv, or remove or rename the column"
                raise TaskError(f"{what}; {remedy}")


def get_text(place: Place, row: Row, column: str, empty: bool = False) -> str:
    """Return a text column of a row.

    Raises:
        TaskError: it is not text, or empty where it must not be.
    """
    value = row[column]
    if value is None or isinstance(value, str) and not value.strip() and not empty:
        remedy = "fill it in or remove the row" + (f"; {LEAVE_OUT}" if find_split(place.path) == "test" else "")
        raise TaskError(f"{place}, column {column!r}: empty; {remedy}")
    if not isinstance(value, str):
        number = isinstance(value, (bool, int, float))
        remedy = "write it in quotation marks" if number else "write one text, or name another column"
        raise TaskError(f"{place}, column {column!r}: {base.quote(value)} is not text; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TaskError(f"{place}, column {column!r}: holds half a character ({error.reason}); fix the row") from error
    return value


# Splits


class OwnFiles(Task):
    """A task on tables of one's own. Subclasses define `list_needed_columns`, `parse`, `get_example_key` and
    `describe_remedy`, and may define `get_stratum` and `check_rows_together`.

    `test` is scored where there is such a file (`scored`), else validation, else a `held_out` part of training, drawn
    with `split_seed`. Rows of equal text stay together, so that none is on both sides.
    """

    scoring_options = ("held_out", "split_seed")  # `scored` also says whether the test file is read

    def __init__(
        self,
        scored: str = "test",
        held_out: float = 0.1,
        split_seed: int = 0,
        quotes: bool = True,
        overlap: bool = False,
    ) -> None:
        if scored not in ("test", "validation"):
            raise TaskError(f"task.options.scored={scored}: must be test or validation")
        if not 0 < held_out < 1:
            raise TaskError(f"task.options.held_out={held_out}: must be between 0 and 1, the share of rows set apart")
        self.scored, self.held_out, self.split_seed = scored, held_out, split_seed
        self.quotes, self.overlap = quotes, overlap
        self._read: tuple[Hashable, dict[str, list[Placed]]] = (None, {})

    def list_needed_columns(self, known: Row) -> tuple[str, ...]:
        """Return the columns a file must have; `known` is its first row."""
        raise NotImplementedError

    def parse(self, placed: Placed) -> Row:
        """Return a row in the columns of this task's form, without its id.

        Raises:
            TaskError: a column is empty or holds something else.
        """
        raise NotImplementedError

    def get_example_key(self, row: Row) -> Hashable:
        """Return what makes two rows the same example."""
        raise NotImplementedError

    def get_stratum(self, row: Row) -> Hashable:
        """Return what rows set apart have the same shares of as the rest."""
        return None

    def describe_remedy(self) -> str:
        """Return what to do about a column that is missing."""
        raise NotImplementedError

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """The split that is scored; which one there is, the folder says."""
        if self.data_dir is None:
            return (self.scored,)
        return (*self.find_used_files(None), "validation")[1:2]

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        files = self.find_used_files(data_dir)
        return {split: " ".join(map(base.file_sha256, paths)) for split, paths in files.items()}

    def check_files(self) -> None:
        self.load_rows()

    def explain_unused_option(self, name: str) -> str | None:
        train, *scored = self.find_used_files(None).values()
        if name in ("held_out", "split_seed") and scored:
            return f"{scored[0][0].name} is scored, so no rows of training are set apart; drop it"
        if name == "scored" and "test" not in find_files(self.data_dir, self.name):
            which = scored[0][0].name if scored else f"rows set apart from {train[0].name}"
            return f"there is no test file, so {which} will be scored anyway; drop it"
        if name == "overlap" and not scored:
            return f"no other file is scored, but rows set apart from {train[0].name}; drop it"
        if name == "quotes" and all(find_ending(path) not in (".csv", ".tsv") for path in sum(scored, train)):
            return f"it is about .csv and .tsv files, and {train[0].name} is neither; drop it"
        return None

    def find_used_files(self, data_dir: str | None) -> Files:
        """Return training's files and those that are scored, if any are; the folder is the task's from now on."""
        self.data_dir = data_dir or self.data_dir
        files = find_files(self.data_dir, self.name)
        scored = "test" if self.scored == "test" and "test" in files else "validation"
        return {split: files[split] for split in ("train", scored) if split in files}

    def split(self, name: str, data_dir: str | None = None) -> Split:
        """Return the rows of split `name` from the user's files.

        Raises:
            TaskError: there is no such split, or `load_rows` refuses the files.
        """
        files, rows = self.find_used_files(data_dir), self.load_rows(data_dir)
        if name not in rows:
            raise TaskError(f"data_dir={self.data_dir}: no {name} split, only {', '.join(rows)}")
        origin = " ".join(path.name for path in files.get(name, files["train"]))
        if len(files) == 1:
            others = "all but the " if name == "train" else ""
            origin += f", {others}{100 * self.held_out:g} % set apart with seed {self.split_seed}"
        numbered = ({"id": f"{name}-{number}", **row} for number, (_, row) in enumerate(rows[name]))
        return Split(self.dataset(numbered, origin), origin)

    def load_rows(self, data_dir: str | None = None) -> dict[str, list[Placed]]:
        """Return the parsed rows of training and of what is scored, checked against each other; read once while the
        files stay as they are.

        Raises:
            TaskError: a file or row is not what it should be, or an example is in both.
        """
        files = self.find_used_files(data_dir)
        stamps = tuple((path, *get_stamp(path)) for paths in files.values() for path in paths)
        if self._read[0] != stamps:
            found = {split: [row for path in paths for row in self.parse_file(path)] for split, paths in files.items()}
            if len(found) == 1:
                self.check_rows_together(found)
                found = set_apart(
                    found["train"], self.held_out, self.split_seed, self.get_example_key, self.get_stratum
                )
            elif not self.overlap:
                self.check_overlap(found)
            self.check_rows_together(found)
            self._read = stamps, found
        return self._read[1]

    def check_rows_together(self, found: dict[str, list[Placed]]) -> None:
        """Refuse rows that do not go together.

        Raises:
            TaskError: with the row.
        """

    def parse_file(self, path: Path) -> list[Placed]:
        placed, remedy = read_rows(path, self.quotes), self.describe_remedy()
        if find_split(path) == "test":
            remedy += f"; {LEAVE_OUT}"
        check_columns(path, placed, self.list_needed_columns(placed[0][1]), remedy)
        check_split_column(path, placed)
        return [(place, self.parse((place, row))) for place, row in placed]

    def check_overlap(self, found: dict[str, list[Placed]]) -> None:
        """Refuse an example of training that is scored, too.

        Raises:
            TaskError: with both places.
        """
        known = {self.get_example_key(row): place for place, row in found["train"]}
        for split in list(found)[1:]:
            for place, row in found[split]:
                if same := known.get(self.get_example_key(row)):
                    where = f"{same.path.name} {same.unit} {same.number}"
                    remedy = "remove one of them, or allow it with task.options.overlap=true"
                    raise TaskError(f"{place}: the same example as {where}, which training sees; {remedy}")


def set_apart(
    placed: list[Placed],
    share: float,
    seed: int,
    get_key: Callable[[Row], Hashable],
    get_stratum: Callable[[Row], Hashable],
) -> dict[str, list[Placed]]:
    """Return rows divided at random: of every stratum the same share, equal examples on one side, in their order.

    Raises:
        TaskError: there are too few rows to divide.
    """
    groups: dict[Hashable, dict[Hashable, None]] = defaultdict(dict)
    strata: dict[Hashable, Hashable] = {}
    for _, row in placed:
        key = get_key(row)
        groups[strata.setdefault(key, get_stratum(row))][key] = None
    rng, apart = random.Random(seed), set()
    for keys in groups.values():
        count = min(max(round(len(keys) * share), 1), len(keys) - 1)
        apart |= set(rng.sample(list(keys), count))
    found = {
        "train": [p for p in placed if get_key(p[1]) not in apart],
        "validation": [p for p in placed if get_key(p[1]) in apart],
    }
    if not all(found.values()):
        raise TaskError(f"{placed[0][0].path}: {len(placed)} rows are too few to set some apart; add rows")
    return found
