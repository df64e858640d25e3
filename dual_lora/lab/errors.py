"""Exit codes, errors a user can fix, a requested stop, and the one table that turns a machine error into one line."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from traceback import extract_tb, walk_tb
from typing import Any

# Done; a run failed; something the user can fix; stopped on request; another process is working on it.
EXIT_OK, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_ELSEWHERE = 0, 1, 2, 3, 4


class UserError(Exception):
    """Something the user can fix: shown as one line without a traceback, exit code 2. `details` go to the record."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


def choose_exit_code(codes: Iterable[int]) -> int:
    """Return the exit code of several pieces of work: the smallest one other than 0."""
    return min((code for code in codes if code), default=EXIT_OK)


def suggest_name(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the known name closest to an unknown one, or "" if none is close."""
    known = list(known)
    close = [] if word in known else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def require(condition: bool, message: str) -> None:
    """Refuse what does not meet a condition.

    Raises:
        UserError: with this message, if the condition is false.
    """
    if not condition:
        raise UserError(message)


def get_first_line(error: BaseException | str) -> str:
    """Return the first line of an error's message, with the next one if it ends in a colon; without any, its repr."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, LookupError) or not lines:
        return repr(error)  # str() of a KeyError is only the key
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def describe_with_place(error: BaseException) -> str:
    """Return an error in code from outside of this repository as one line: type, message, file and line."""
    last = extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
    return f"{type(error).__name__}: {get_first_line(error)}; {file}, line {line}"


class Stopped(BaseException):
    """A stop was requested. It is not an `Exception`, so that no handler on the way mistakes it for a failure.

    by: what requested it, usually a signal's name. can_resume: whether the same command resumes from here; otherwise it
    starts the run again.
    """

    def __init__(self, by: str, can_resume: bool = True) -> None:
        super().__init__(by)
        self.by, self.can_resume = by, can_resume


class RunHeldElsewhere(Exception):
    """Another process is working on this run."""


# How torch, CUDA, the dynamic loader and safetensors report that memory ran out, without a type of its own.
OUT_OF_MEMORY_WORDS = ("out of memory", "allocate memory", "ALLOC_FAILED", "failed to map segment", "bad_alloc")
# Remedies by errno. Some libraries raise errors with the system's message but no errno: see LIMIT_WORDS.
REMEDIES = {
    (errno.EACCES, errno.EPERM, errno.EROFS): "check that you may read and write there",
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP): "check that this is the path you meant",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
    (errno.EAGAIN,): "allow more processes and threads (ulimit -u)",
}
LIMIT_WORDS = {
    os.strerror(errno.EMFILE): errno.EMFILE,
    "can't start new thread": errno.EAGAIN,
}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the accelerator or the machine ran out of memory."""
    if isinstance(error, UserError):
        return False
    named = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    numbered = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return named or numbered or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def describe_out_of_memory(error: BaseException, remedy: str) -> str:
    """Return an out-of-memory error as one line with its remedy."""
    return f"out of memory ({get_first_line(error) if str(error) else type(error).__name__}); {remedy}"


def find_remedy(number: int | None, default: str) -> str:
    """Return the remedy for an errno, or a default for one that the table does not have."""
    return next((remedy for numbers, remedy in REMEDIES.items() if number in numbers), default)


def quotes_value(message: str, value: str) -> bool:
    """Return whether a message quotes a value: as a word of its own, a single character in quotation marks."""
    if len(value) == 1:
        return f"'{value}'" in message
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None


def find_unreadable_variables(error: BaseException) -> str | None:
    """Return the environment's variables, as NAME=VALUE, that a library refused while it was imported: those whose
    value its message quotes. None if it was not, or none is quoted."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    importing = any(frame.f_globals.get("__name__") != "__main__" for frame in frames)
    if not importing or not isinstance(error, ValueError):
        return None
    values = {name: value for name, value in sorted(os.environ.items()) if value}
    quoted = [name for name, value in values.items() if quotes_value(str(error), value)]
    found = [f"{name}={values[name][:80]}" for name in quoted]
    return ", ".join(found[:3]) or None


def describe_machine_error(error: BaseException) -> str | None:
    """Return an error of the machine as one line with its remedy; None for any other error."""
    if is_out_of_memory(error):
        return describe_out_of_memory(
            error, "close other programs, raise the limit (ulimit -v) or take a machine with more"
        )
    words = next((words for words in LIMIT_WORDS if words in str(error)), None)
    if words and not isinstance(error, UserError):
        return f"{getattr(error, 'strerror', None) or get_first_line(error)}; {find_remedy(LIMIT_WORDS[words], '')}"
    if variables := find_unreadable_variables(error):
        return f"{variables}: a library cannot be imported with it ({get_first_line(error)[:200]}); unset it"
    if not isinstance(error, OSError):
        return None
    remedy = find_remedy(error.errno, "check the disk or the network")
    reason = error.strerror or get_first_line(error)
    return f"{error.filename}: {reason}; {remedy}" if error.filename else f"{reason}; {remedy}"


@contextmanager
def translate_machine_errors() -> Iterator[None]:
    """Turn an error of the machine into one line.

    Raises:
        UserError: the machine's error and its remedy. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if message := describe_machine_error(error):
            raise UserError(message) from error
        raise


# What errors from transformers and from the hub mean here, by words they contain.
READ_FAILURES = {
    "trust_remote_code": "it needs code of its own, which is never run",
    "Unrecognized configuration class": "transformers has no model of this architecture for this form of task",
    "ignore_mismatched_sizes": "the shapes of its weights differ from its config.json",
    "snapshot folder": "it is not in the hub's cache, and the hub is out of reach or turned off",
    "Repository Not Found": "the hub has no such repository, or a private one: hf auth login",
    "Revision Not Found": "its repository has no such revision",
    "gated repo": "it is gated: accept its licence on the hub, then hf auth login",
}


@contextmanager
def translate_read_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever libraries raise while reading a user's files into one line.

    Raises:
        UserError: `what`, the reason and the remedy. An out-of-memory error passes, and so does a library's
            refusal of the environment.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error) or find_unreadable_variables(error):
            raise
        reason = next((reason for word, reason in READ_FAILURES.items() if word in str(error)), get_first_line(error))
        raise UserError(f"{what} ({reason[:300]}); {remedy}") from error


@contextmanager
def translate_memory_errors(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    Raises:
        UserError: what ran out, and the remedy: what needs less. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(describe_out_of_memory(error, remedy)) from error
