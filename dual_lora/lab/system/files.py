"""Files that reach the disk complete or not at all, and one clear line when they cannot."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dual_lora.lab.errors import UserError, find_remedy, get_first_line, is_out_of_memory

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # errors that say a file is not there


OF_RUNS = "keep runs elsewhere with DUAL_LORA_RUNS=DIR; then the same command resumes, and finished runs are unchanged"


@contextmanager
def translate_write_errors(path: Path, otherwise: str = OF_RUNS) -> Iterator[None]:
    """Turn a failure to write at or below `path` into one line. otherwise: what else than the reason's remedy helps.

    Raises:
        UserError: the path, the reason and the remedy. An out-of-memory error passes.
    """
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        reason, remedy = error.strerror or str(error), find_remedy(error.errno, "check the disk")
        raise UserError(f"{path}: cannot be written ({reason}); {remedy}, or {otherwise}") from error


@contextmanager
def translate_access_errors(path: Path, missing_too: bool = True) -> Iterator[None]:
    """Turn a failure to read `path` into one line. missing_too: also where there is no such file.

    Raises:
        UserError: the path, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        if not missing_too and isinstance(error, MISSING):
            raise
        reason, remedy = error.strerror or get_first_line(error), find_remedy(error.errno, "check the disk")
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk itself.

    Raises:
        OSError: it cannot be flushed.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def name_temporary_file(path: Path) -> Path:
    """Return a name next to `path` that no other writer uses, in this process or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def remove_temporary_files(folder: Path, *names: str) -> None:
    """Remove what killed writers of the named files left in a folder, without names those of all files. Other files are
    left alone. No writer may be at work meanwhile."""
    if names:
        pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})(\.\d+-[0-9a-f]{{8}})?\.partial")
    else:
        pattern = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a new empty file next to `path`, to be filled; it replaces `path` once it is complete and on disk.

    A link at `path` is replaced, never followed, and the umask decides the file's mode.

    Raises:
        OSError: it cannot be written. `path` is then unchanged.
    """
    temporary = name_temporary_file(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a UTF-8 file that is not a link; the text survives a kill of this process once this returns.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(number, "a", encoding="utf-8") as stream:
        stream.write(text)


def read_umask() -> int:
    """Return the process's umask, which can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def allow_by_umask(path: Path) -> None:
    """Give a file the mode of a new one; safetensors makes files that only their owner can read.

    Raises:
        OSError: the mode cannot be changed.
    """
    path.chmod(0o666 & ~read_umask())


def remove_path(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


WRITE_FAILURES = ("PytorchStreamWriter", "unexpected pos")  # how torch reports a file that it cannot write
MIN_FREE_BYTES = 2**20  # a disk with less is full


@contextmanager
def translate_save_errors(folder: Path, otherwise: str = OF_RUNS) -> Iterator[None]:
    """Turn a failure to save weights into one line. otherwise: see `translate_write_errors`.

    Raises:
        UserError: the folder, the reason and the remedy. Other errors pass.
    """
    with translate_write_errors(folder, otherwise), raise_disk_errors(folder):
        yield


@contextmanager
def raise_disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that safetensors, tokenizers and torch raise for a failing disk into OSErrors.

    Raises:
        OSError: with the errno in the message, else ENOSPC on a full disk, else EIO. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os error (\d+)", str(error))
        if is_out_of_memory(error) or not (found or any(words in str(error) for words in WRITE_FAILURES)):
            raise
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        full = shutil.disk_usage(there).free < MIN_FREE_BYTES
        number = int(found[1]) if found else errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number)) from error
