"""Files that reach the disk, and one clear line when they cannot."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, get_first_line, is_out_of_memory, require

WRITE_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there, or name another disk with DUAL_LORA_RUNS",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.EACCES, errno.EPERM, errno.EROFS): "make it writable, or name another folder with DUAL_LORA_RUNS",
}


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into the user's one line."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        mends = (mend for numbers, mend in WRITE_REMEDIES.items() if error.errno in numbers)
        reason, mend = error.strerror or str(error), next(mends, "look at the disk")
        again = "then the same command goes on; finished runs are as they were"
        raise UserError(f"{path}: cannot be written ({reason}); {mend}, {again}") from error


def flush_to_disk(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk itself before this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


WRITE_FAILURES = ("PytorchStreamWriter", "unexpected pos")  # what torch says of a file that it cannot write
MIN_FREE_BYTES = 2**20  # bytes; a disk with less is full


@contextmanager
def translate_save_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to save weights into the user's one line."""
    with translate_write_errors(folder), raise_disk_errors(folder):
        yield


@contextmanager
def raise_disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that safetensors, tokenizers and torch have of their own for a disk that fails into OSErrors."""
    try:
        yield
    except Exception as error:
        said = re.search(r"os error (\d+)", str(error))
        if is_out_of_memory(error) or not (said or any(words in str(error) for words in WRITE_FAILURES)):
            raise
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        full = shutil.disk_usage(there).free < MIN_FREE_BYTES
        number = int(said[1]) if said else errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def read_json_object(path: Path, mend: str, *keys: str) -> dict[str, Any]:
    """Return the object that a JSON file holds, with at least these keys.

    Raises:
        UserError: it holds something else; `mend` says what to do.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({get_first_line(error)}); {mend}") from error
    require(isinstance(content, dict), f"{path}: damaged (no JSON object); {mend}")
    lacking = [key for key in keys if key not in content]
    require(not lacking, f"{path}: damaged (no {', '.join(lacking)}); {mend}")
    return content
