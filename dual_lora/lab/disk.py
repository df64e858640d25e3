"""Files that reach the disk, and one clear line when they cannot."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dual_lora.lab.faults import out_of_memory
from dual_lora.lab.settings import UserError

MENDS = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there, or name another disk with DUAL_LORA_RUNS",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.EACCES, errno.EPERM, errno.EROFS): "make it writable, or name another folder with DUAL_LORA_RUNS",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into the user's one line."""
    try:
        yield
    except OSError as error:
        if out_of_memory(error):
            raise
        mends = (mend for numbers, mend in MENDS.items() if error.errno in numbers)
        reason, mend = error.strerror or str(error), next(mends, "look at the disk")
        again = "then the same command goes on; finished runs are as they were"
        raise UserError(f"{path}: cannot be written ({reason}); {mend}, {again}") from error


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk itself before this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
