"""What a task is: rows to train on, rows to be measured on, and the rule that turns outputs into scores.

A row is a dictionary. Its columns depend on the task's `form`:

    classification   id, text, text_pair ("" for single sentences), label (index into `labels`)
    regression       id, text, text_pair, label (float)
    generation       id, prompt, target (the text to learn), references (every accepted text)

Tasks know nothing of models, methods or torch: they see rows and outputs (a class index, a number, or a text).
"""

import csv
import functools
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

from datasets import Dataset, DownloadManager, Features, List, Value

Row = dict[str, Any]
Output = int | float | str

CLASSIFICATION = Features(
    {"id": Value("string"), "text": Value("string"), "text_pair": Value("string"), "label": Value("int64")}
)
REGRESSION = Features({**CLASSIFICATION, "label": Value("float64")})
GENERATION = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "target": Value("string"),
        "references": List(Value("string")),
    }
)


# What reading data of another shape than expected raises.
SHAPE = (AttributeError, LookupError, TypeError, ValueError, csv.Error)


class TaskError(ValueError):
    """Data that is missing, damaged or not what its name says; the message names the file and the mend."""


@contextmanager
def expected(what: str, source: object) -> Iterator[None]:
    """Tell in one line that `source` holds something else than `what`.

    Raises:
        TaskError: whatever reading data of another shape raises.
    """
    try:
        yield
    except TaskError:
        raise
    except SHAPE as error:
        reason = str(error) if isinstance(error, UnicodeError) else repr(error)  # repr() holds the whole text
        raise TaskError(f"{source}: {reason[:200]} where {what} was expected; fetch the file again") from error


@dataclass(frozen=True)
class Split:
    """Rows of one split and where they came from (`origin` names a file or a hub revision, for the run's record)."""

    rows: Dataset
    origin: str

    def facts(self) -> dict[str, Any]:
        """Return origin, number of rows and a hash of their content, equal for equal examples whatever their source."""
        digest = hashlib.sha256()
        for row in self.rows.to_list():
            digest.update(repr(sorted(row.items())).encode())
        return {"origin": self.origin, "rows": len(self.rows), "sha256": digest.hexdigest()}


class Task:
    """One task. Subclasses set the attributes and give `split` and `score`; `judge` may add per-example columns.

    Attributes:
        name: as the user types it, e.g. "glue/sst2".
        version: raised whenever data, prompt or scoring change a number; part of every run's identity.
        form: what a model must produce, see the module's table.
        labels: class names in index order; empty unless `form` is "classification".
        eval_splits: the splits whose predictions are scored, in order.
        metric: key of the score a table shows first.
        plain: keys of scores that are no fractions and are shown as they are, not in percent.
    """

    name: str
    version: int
    form: Literal["classification", "regression", "generation"]
    labels: tuple[str, ...] = ()
    eval_splits: tuple[str, ...] = ("validation",)
    metric: str
    plain: tuple[str, ...] = ()

    features: ClassVar[dict[str, Features]] = {
        "classification": CLASSIFICATION,
        "regression": REGRESSION,
        "generation": GENERATION,
    }

    def split(self, name: str, data_dir: str | None = None) -> Split:
        """Return the rows of split `name`, from the hub or from the official files below `data_dir`.

        Raises:
            TaskError: a file is missing or damaged.
        """
        raise NotImplementedError

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        """Return what identifies the data before any of it is parsed: file hashes, or a hub id with its revision."""
        raise NotImplementedError

    def choices(self, row: Row) -> list[str]:
        """Return the texts a likelihood decides between, as continuations of the prompt; none where it has no say."""
        return []

    def judge_choice(self, row: Row, likelihoods: list[float]) -> Row:
        """Return what the predictions file keeps of the log-likelihoods of `choices`."""
        raise NotImplementedError

    def judge(self, row: Row, output: Output) -> Row:
        """Return what the predictions file keeps of one example beside its id and raw output."""
        gold = row["target"] if self.form == "generation" else row["label"]
        return {"answer": output, "gold": gold}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return metrics (fractions, not percent) from the judged rows of every evaluation split."""
        raise NotImplementedError

    def dataset(self, rows: Iterable[Row], source: object) -> Dataset:
        """Return `rows` as a Dataset with exactly the columns and types of this task's form.

        Raises:
            TaskError: there are none, or one holds something else; `source` says where they are from.
        """
        with expected(f"a row of {self.name}", source):
            rows = list(rows)
            for number, row in enumerate(rows, start=1):
                texts = [v for key, v in row.items() if key not in ("label", "references")] + row.get("references", [])
                if odd := [text for text in texts if not isinstance(text, str)]:
                    raise TypeError(f"row {number} has {odd[0]!r}")  # Dataset would take a null
            if not rows:
                raise TaskError(f"{source}: no rows; fetch the file again")
            return Dataset.from_list(rows, features=self.features[self.form])


def find(data_dir: str, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """Return the first existing `data_dir/folder/name`, each name plain or gzipped, or as a glob pattern.

    Raises:
        TaskError: none exists; the message lists what was looked for.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise TaskError(f"data_dir={data_dir}: no such folder")
    for folder in folders:
        for name in names:
            for candidate in (name, name + ".gz"):
                found = sorted((root / folder).glob(candidate))
                if found:
                    return found[0]
    looked = " or ".join(f"{folder}/{names[0]}" for folder in folders)
    raise TaskError(f"data_dir={data_dir}: no {looked} (plain or .gz) below it")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open an official file, unpacked if it is a .gz.

    Raises:
        TaskError: it cannot be opened, or what is done with it meets no readable text.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            yield stream
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise TaskError(f"{path}: cannot be read ({error}); fetch the file again") from error


def read_tsv(path: Path, columns: tuple[str, ...] | None = None, skip_short: bool = False) -> Iterator[dict[str, str]]:
    """Yield the rows of an official TSV: no quoting, optional byte-order mark, `columns` where the file has no header.

    `skip_short` drops rows with missing fields instead of refusing them.

    Raises:
        TaskError: the file is no readable text, or a row has another number of fields than the header.
    """
    with opened(path) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = columns or tuple(next(reader, ()))
        for number, fields in enumerate(reader, start=1 if columns else 2):
            if skip_short and len(fields) < len(header):
                continue
            if len(fields) != len(header):
                raise TaskError(f"{path}: line {number} has {len(fields)} fields, not {len(header)}; fetch it again")
            yield dict(zip(header, fields, strict=True))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's unpacked content, so that a file and its .gz are the same data.

    Raises:
        TaskError: it cannot be read.
    """
    with opened(path):
        return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(repository: str, commit: str, path: str) -> Path:
    """Return a local copy of one file of a public GitHub repository, downloaded once into datasets' cache.

    Raises:
        TaskError: it cannot be reached.
    """
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    try:
        return Path(DownloadManager().download(url))
    except OSError as error:
        reason = "nobody answers there, or it is gone" if isinstance(error, FileNotFoundError) else error
        raise TaskError(f"{url}: cannot be fetched ({reason}); give data_dir=DIR") from error


def read_text(path: Path) -> str:
    """Return the text of an official file with its line breaks as they are.

    Raises:
        TaskError: it is no readable text.
    """
    with opened(path) as stream:
        return stream.read().decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """Return what an official JSON file holds.

    Raises:
        TaskError: it is no readable JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not JSON ({error}); fetch the file again") from error


def text_sha256(text: str) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256, by which a prediction names its prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
