"""Errors a user can fix, the stop somebody asked for, and the one table that turns a machine's error into one line."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback, exit code 2. `details` go to the record."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


def suggest_name(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the known word closest to one that is not known, or ""."""
    known = list(known)
    close = [] if word in known else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def get_first_line(error: BaseException | str) -> str:
    """Return what an error says in one line: the first, with the next where that ends in a colon, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, LookupError) or not lines:
        return repr(error)  # of a KeyError str() is the key alone
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


RESUMES, RESTARTS = "goes on from here", "starts this run anew: what is sharded and trained in full has no checkpoints"


class Stopped(BaseException):
    """Somebody asked for an end, by the signal `asked`; `then` is what the same command does next. Not an `Exception`,
    so that nothing on the way takes it for a failure."""

    def __init__(self, asked: str, then: str = RESUMES) -> None:
        super().__init__(asked)
        self.then = then


class Elsewhere(Exception):
    """Another process does this run."""


# How torch, CUDA and safetensors word the end of memory where they have no type for it.
OUT_OF_MEMORY_WORDS = ("out of memory", "allocate memory", "ALLOC_FAILED")
REMEDIES = {
    (errno.EACCES, errno.EPERM, errno.EROFS): "see that you may read and write there",
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR): "see that what is there is what was meant",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has come to its end, the accelerator's or the machine's."""
    if isinstance(error, UserError):
        return False
    named = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    lacking = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return named or lacking or any(word in str(error) for word in OUT_OF_MEMORY_WORDS)


def describe_machine_error(error: BaseException) -> str | None:
    """Return a fault of the machine's with its mend, or None for another error."""
    if is_out_of_memory(error):
        said = get_first_line(error) if str(error) else type(error).__name__
        return f"out of memory ({said}); close other programs or take a machine with more"
    if not isinstance(error, OSError):
        return None
    mend = next(
        (mend for numbers, mend in REMEDIES.items() if error.errno in numbers), "look at the disk or the network"
    )
    reason = error.strerror or get_first_line(error)
    return f"{error.filename}: {reason}; {mend}" if error.filename else f"{reason}; {mend}"


@contextmanager
def translate_machine_errors() -> Iterator[None]:
    """Turn a fault of the machine's into the user's one line."""
    try:
        yield
    except Exception as error:
        if said := describe_machine_error(error):
            raise UserError(said) from error
        raise


# What transformers' errors mean here, by a word in them.
READ_FAILURES = {
    "trust_remote_code": "it wants code of its own to be run, which is never done",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json asks for",
}


@contextmanager
def translate_read_errors(what: str, mend: str) -> Iterator[None]:
    """Turn whatever the libraries raise over files that somebody else wrote into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = next((reason for word, reason in READ_FAILURES.items() if word in str(error)), get_first_line(error))
        raise UserError(f"{what} ({reason[:300]}); {mend}") from error


@contextlib.contextmanager
def translate_memory_errors(mend: str) -> Iterator[None]:
    """Turn the end of memory into the user's one line; `mend` says what takes less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = get_first_line(error) if str(error) else type(error).__name__
        raise UserError(f"out of memory ({said}); {mend}") from error
