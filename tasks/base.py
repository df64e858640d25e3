"""What a task is: rows to train on, rows to be measured on, and the rule that turns outputs into scores.

A row is a dictionary. Its columns depend on the task's `form`:

    classification   id, text, text_pair ("" for single sentences), label (index into `labels`)
    regression       id, text, text_pair, label (float)
    generation       id, prompt, target (the text to learn), references (every accepted text); a task may add messages,
                     what a chat template is to see instead of the prompt

Tasks know nothing of models, methods or torch: they see rows and outputs (a class index, a number, or a text).
"""

import codecs
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # datasets and what scores take a second or more to import, so that is done where they are used
    from datasets import Dataset, Features

    from tasks.measures import Score

Row = dict[str, Any]
Output = int | float | str

# The columns of each form's rows and their types; a list of texts is ["string"].
SENTENCE = {"id": "string", "text": "string", "text_pair": "string"}
COLUMNS: dict[str, dict[str, Any]] = {
    "classification": {**SENTENCE, "label": "int64"},
    "regression": {**SENTENCE, "label": "float64"},
    "generation": {"id": "string", "prompt": "string", "target": "string", "references": ["string"]},
}

FETCH = "fetch the file again"
GITHUB_FILES = "https://raw.githubusercontent.com"
COMMIT = re.compile(r"[0-9a-f]{40}")  # a revision may also be a name, such as refs/convert/parquet
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
LONGEST_QUOTE = 60  # characters of a value that a message shows
# What code raises when it reads data of an unexpected shape.
SHAPE = (AttributeError, LookupError, TypeError, ValueError, csv.Error)


class TaskError(ValueError):
    """Data that is missing, damaged or not what its name says; the message names the file and the remedy."""


@contextmanager
def translate_shape_errors(what: str, source: object) -> Iterator[None]:
    """Report in one line that `source` holds something other than `what`.

    Raises:
        TaskError: whatever reading data of another shape raises.
    """
    try:
        yield
    except TaskError:
        raise
    except SHAPE as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)  # of a KeyError str() is only the key
        raise TaskError(f"{source}: {reason[:200]} where {what} was expected; {FETCH}") from error


@dataclass(frozen=True)
class Split:
    """Rows of one split and where they came from (`origin` names a file or a hub revision, for the run's record).
    `in_training` is how many of them, set apart from training's, are known to be among the rest, too."""

    rows: "Dataset"
    origin: str
    in_training: int = 0

    def describe(self) -> dict[str, Any]:
        """Return origin, number of rows and a hash of their content, the same from any source in the same order, and
        `in_training` if there are any."""
        digest = hashlib.sha256()
        for row in self.rows.to_list():
            digest.update(repr(sorted(row.items())).encode())
        found = {"origin": self.origin, "rows": len(self.rows), "sha256": digest.hexdigest()}
        return found | ({"in_training": self.in_training} if self.in_training else {})


class Task:
    """One task. Subclasses set the attributes and give `split` and `score`; `judge` may add per-example columns, and
    `declare_scores` gives the scores intervals and tests.

    Attributes:
        name: as the user types it, e.g. "glue/sst2".
        version: raised whenever data, prompt or scoring change a number; part of every run's identity.
        form: what a model must produce, see the module's table.
        data_dir: the user's folder, for a task whose labels or splits follow from what is in it.
        labels: class names in index order; empty unless `form` is "classification".
        eval_splits: the splits whose predictions are scored, in order.
        metric: key of the score a table shows first.
        further_metrics: keys of the scores on further sets that a report shows beside `metric`, outside of means.
        unscaled: keys of scores that are not fractions and are therefore shown as they are, not in percent.
        lower_is_better: keys of scores for which lower is better.
        held_out_option: the word of a command line that scores training rows set by set, of a task whose training rows
            mix the sets of `eval_splits`. Such a task refuses eval.holdout, eval.development_rows and an experiment's
            tune.holdout, which would score the mixture as the first.
        scoring_options: names of options that choose the rows to be scored and change nothing else. They are refused
            beside eval.holdout, which chooses other rows.
    """

    name: str
    version: int
    form: Literal["classification", "regression", "generation"]
    data_dir: str | None = None
    labels: tuple[str, ...] = ()
    eval_splits: tuple[str, ...] = ("validation",)
    metric: str
    further_metrics: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    held_out_option: str = ""
    scoring_options: tuple[str, ...] = ()

    def is_lower_better(self, metric: str | None = None) -> bool:
        """Return whether less of a score is better: of the main one, if none is named."""
        return (metric or self.metric) in self.lower_is_better

    @property
    def row_types(self) -> dict[str, Any]:
        """The columns of a row and their types."""
        return COLUMNS[self.form]

    def split(self, name: str, data_dir: str | None = None) -> Split:
        """Return the rows of split `name`, from the hub or from the official files below `data_dir`.

        Raises:
            TaskError: a file is missing or damaged.
        """
        raise NotImplementedError

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        """Return what identifies the data before any of it is parsed: file hashes, or a hub id with its revision."""
        raise NotImplementedError

    def count_official_rows(self, default: int) -> tuple[int, str]:
        """Return how many training rows the official data have with this task's options, of which its defaults give
        `default`, and why a run may have fewer; "" where it has exactly these."""
        return default, ""

    def check_files(self) -> None:
        """Refuse files in `data_dir` whose form is the user's own, before anything is loaded.

        Raises:
            TaskError: with file, line and column.
        """

    def explain_unused_option(self, name: str) -> str | None:
        """Return why an option has no effect on the files in `data_dir`; None where it has one."""
        return None

    def choices(self, row: Row) -> list[str]:
        """Return the continuations of the prompt to rank by likelihood; empty if this task does not rank any."""
        return []

    def judge_choice(self, row: Row, likelihoods: list[float], tokens: list[int]) -> Row:
        """Return the columns that the predictions file keeps about `choices`.

        likelihoods: log-likelihood of each choice, in nats, summed over its tokens. tokens: how many each has.
        """
        raise NotImplementedError

    def judge(self, row: Row, output: Output) -> Row:
        """Return the columns that the predictions file keeps for one example in addition to its id and raw output."""
        gold = row["target"] if self.form == "generation" else row["label"]
        return {"answer": output, "gold": gold}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return metrics (fractions, not percent) from the judged rows of every evaluation split."""
        raise NotImplementedError

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        """Return, for each score, how to recompute it on resampled rows (see tasks/measures.py). `example` is any
        judged row; only its column names are used. A score that is missing here gets no interval and no test."""
        return {}

    def dataset(self, rows: Iterable[Row], source: object) -> "Dataset":
        """Return `rows` as a Dataset with exactly the columns and types of this task's form.

        Raises:
            TaskError: there are none, one holds something else, or two have one id, by which runs are paired; `source`
                says where they are from.
        """
        from datasets import Dataset

        with translate_shape_errors(f"a row of {self.name}", source):
            rows = list(rows)
            columns = [name for name, kind in self.row_types.items() if kind == "string"]
            for number, row in enumerate(rows, start=1):
                texts = [row[name] for name in columns] + row.get("references", [])
                if odd := [text for text in texts if not isinstance(text, str)]:
                    raise TypeError(f"row {number} has {odd[0]!r}")  # Dataset would take a null
            if not rows:
                raise TaskError(f"{source}: no rows; {FETCH}")
            if twice := find_duplicate(row["id"] for row in rows):
                raise TaskError(f"{source}: two rows have the id {twice!r}; give each an id of its own")
            return Dataset.from_list(rows, features=build_features(self.row_types))


def build_features(columns: dict[str, Any]) -> "Features":
    """Return columns as datasets declares them. A type is a name, a list of one type, or a dictionary of columns."""
    from datasets import Features, List, Value

    def build(kind: Any) -> Any:
        if isinstance(kind, dict):
            return {name: build(part) for name, part in kind.items()}
        return List(build(kind[0])) if isinstance(kind, list) else Value(kind)

    return Features(build(columns))


def load_dataset(name: str, subset: str | None = None, *, revision: str, split: str) -> "Dataset":
    """Return a split of a data set of the hub, at a revision. A folder of that name here is not looked at. Offline, a
    commit is refused for which datasets would take the last one it fetched.

    Raises:
        TaskError: only another commit is in the cache.
    """
    import datasets

    builder = datasets.load_dataset_builder(f"hf://datasets/{name}", subset, revision=revision)
    if COMMIT.fullmatch(revision) and builder.hash != revision:
        found = f"the hub is out of reach, and the cache holds {str(builder.hash)[:8]}"
        raise TaskError(f"{name}@{revision[:8]}: {found}, another revision; connect to the hub, or give data_dir=DIR")
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def find_data_file(data_dir: str, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """Return the first existing `data_dir/folder/name`, each name plain or gzipped, or as a glob pattern.

    Raises:
        TaskError: none exists, or several match a pattern; the message lists what was looked for.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise TaskError(f"data_dir={data_dir}: no such folder")
    for folder in folders:
        for name in names:
            for candidate in (name, name + ".gz"):
                found = sorted((root / folder).glob(candidate))
                if len(found) > 1:
                    several = " and ".join(path.name for path in found)
                    raise TaskError(f"data_dir={data_dir}: {several} could each be {names[0]}; keep one of them")
                if found:
                    check_gzipped_copy(found[0])
                    return found[0]
    looked = " or ".join(f"{folder}/{names[0]}" for folder in folders)
    raise TaskError(f"data_dir={data_dir}: no {looked} (plain or .gz) below it")


def check_gzipped_copy(path: Path) -> None:
    """Refuse a file next to a .gz of the same name that holds other data.

    Raises:
        TaskError: with both.
    """
    gzipped = path.with_name(f"{path.name}.gz")
    if gzipped.is_file() and file_sha256(gzipped) != file_sha256(path):
        raise TaskError(f"{path} and {gzipped.name}: hold different data; keep one of them")


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open an official file, unpacked if it is a .gz.

    Raises:
        TaskError: it cannot be opened or unpacked.
    """
    if path.is_fifo() or path.is_char_device():  # reading it may never end
        raise TaskError(f"{path}: a pipe or a device, not a file; {FETCH}")
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        remedy = "check that you may read it" if isinstance(error, PermissionError) else FETCH
        raise TaskError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from error


def read_table(
    path: Path,
    delimiter: str,
    quoted: bool,
    needed: tuple[str, ...] = (),
    columns: tuple[str, ...] | None = None,
    skip_short: bool = False,
    remedy: str = FETCH,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of its first line and the columns of every row of a text table; empty lines are left out.

    quoted: fields may be in quotation marks (CSV), else these are text (the official TSV files). `needed` columns
    must be there; `columns` names those of a file without a header; `skip_short` drops rows with missing fields.
    `remedy` is what to do about a bad row.

    Raises:
        TaskError: the text is unreadable, a column is missing or duplicated, a row has more or fewer fields than the
            header, or quotation marks do not match. Such a row would lose text, or swallow the next one.
    """
    lines = iterate_records(path, read_text(path), delimiter, quoted, remedy)
    header = columns or tuple(next(lines, (0, ()))[1])
    check_header(path, header, needed, remedy)
    for number, fields in lines:
        if len(fields) == len(header):
            yield number, dict(zip(header, fields, strict=True))
        elif not (skip_short and len(fields) < len(header)):
            raise TaskError(f"{path}: line {number} has {len(fields)} fields, not {len(header)}; {remedy}")


def check_header(path: object, header: Iterable[str], needed: Iterable[str], remedy: str) -> None:
    """Refuse a table without a column or has one twice (one of the two would be dropped).

    Raises:
        TaskError: with the columns it has.
    """
    header = [name for name in header if name]
    if twice := find_duplicate(header):
        raise TaskError(f"{path}: the column {twice!r} occurs twice in its header; keep one of them")
    if missing := [name for name in needed if name not in header]:
        if not header:
            raise TaskError(f"{path}: no rows; {remedy}")
        near = find_similar_column(missing[0], header)
        listed = ", ".join(name if name.isprintable() else quote(name) for name in header)
        known = f"but {quote(near)}" if near else f"only {listed[:200]}"
        *names, last = map(quote, missing[:1] if near else missing)
        no = f"columns {', '.join(names)} and" if names else "column"
        raise TaskError(f"{path}: no {no} {last}, {known}; {remedy}")


def find_similar_column(name: str, header: Iterable[str]) -> str | None:
    """Return the column that differs from `name` in capitals or outer blanks only, None if there is none."""
    return next((other for other in header if other != name and other.strip().casefold() == name.casefold()), None)


def parse_number(word: str) -> float:
    """Return a plain decimal number. Python's float() reads more: 1_0, digits of other scripts, nan and infinity.

    Raises:
        ValueError: it is not such a number.
    """
    if not NUMBER.fullmatch(word.strip()) or math.isinf(float(word)):
        raise ValueError(f"{quote(word)} is not a finite number")
    return float(word)


def quote(value: object) -> str:
    """Return a value as a message shows it: on one line, text in quotation marks, a long one cut."""
    shown = repr(value[:LONGEST_QUOTE] if isinstance(value, str) else value)
    is_short = len(value) <= LONGEST_QUOTE if isinstance(value, str) else len(shown) <= LONGEST_QUOTE
    return shown if is_short else f"{shown[: LONGEST_QUOTE + 2]}..."


def iterate_records(
    path: Path, text: str, delimiter: str, quoted: bool, remedy: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of its first line and the fields of every record that is not empty.

    Raises:
        TaskError: the quotation marks of a record do not match.
    """
    record: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            record.append(line)
            yield line

    csv.field_size_limit(2**31 - 1)  # the default of 128 Ki characters refuses long documents
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader, start = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True), 1
    try:
        for fields in reader:
            # csv treats a quotation mark inside an unquoted field as text, even if the matching mark was lost
            if quoted and sum(line.count('"') for line in record) % 2:
                raise csv.Error("a quotation mark has no partner")
            if fields:
                yield start, fields
            start = reader.line_num + 1
            record.clear()
    except csv.Error as error:
        raise TaskError(f"{path}: line {start} cannot be read as a row ({error}); {remedy}") from error


def find_duplicate(names: Iterable[str]) -> str | None:
    """Return a name that occurs twice; None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's unpacked content, so that a file and its .gz are the same data.

    Raises:
        TaskError: it cannot be read.
    """
    with open_file(path):
        return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_file(repository: str, commit: str, path: str) -> Path:
    """Return a local copy of one file of a public GitHub repository, downloaded once into datasets' cache. What is in
    the cache is taken without a request: a commit's file never changes.

    Raises:
        TaskError: it cannot be reached.
    """
    from datasets import DownloadConfig, DownloadManager

    url = f"{GITHUB_FILES}/{repository}/{commit}/{path}"
    try:
        return Path(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url))
    except OSError as error:
        reason = "no response, or no such file" if isinstance(error, FileNotFoundError) else error
        raise TaskError(f"{url}: cannot be fetched ({reason}); give data_dir=DIR") from error


def read_text(path: Path) -> str:
    """Return the text of a file with its line breaks as they are, without a byte-order mark.

    Raises:
        TaskError: it is not UTF-8.
    """
    with open_file(path) as stream:
        data = stream.read()
    remedy = "save it as UTF-8 text"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise TaskError(f"{path}: cannot be read (it is UTF-16); {remedy}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}: cannot be read (line {line} is not UTF-8: {error.reason}); {remedy}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise TaskError(f"{path}: cannot be read (line {line} holds a zero byte, so it is not text); {remedy}")
    return text


def read_json(path: Path) -> Any:
    """Return what an official JSON file holds.

    Raises:
        TaskError: it is not readable JSON, or an object has a key twice.
    """
    return parse_json(read_text(path), str(path), FETCH)


def parse_json(text: str, source: str, remedy: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        TaskError: it is not JSON, holds a number that is not finite, or an object has a key twice.
    """
    try:
        numbers = {"parse_constant": parse_finite, "parse_float": parse_finite}
        return json.loads(text, object_pairs_hook=build_unique_keys, **numbers)
    except json.JSONDecodeError as error:  # of a single line, the source names the line
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        reason = error.msg.removesuffix(" at")  # as in "Unterminated string starting at"
        raise TaskError(f"{source}: not JSON ({reason} at {line}character {error.colno}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{source}: not JSON ({error}); {remedy}") from error


def build_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; json by itself would keep the last of two equal keys and drop the first.

    Raises:
        ValueError: a key occurs twice.
    """
    if twice := find_duplicate(key for key, _ in pairs):
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return dict(pairs)


def parse_finite(text: str) -> float:
    """Return a number of a JSON text; Python's json would also take NaN, Infinity, and 1e999 as infinity.

    Raises:
        ValueError: it is not finite.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def text_sha256(text: str) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256, by which a prediction names its prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
