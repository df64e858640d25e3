"""What the machine does wrong, rather than the user or the program, in one line: memory, disks, files. Loads nothing
heavy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dual_lora.lab.settings import UserError, first_line

# How torch, CUDA and safetensors word the end of memory where they have no type for it.
NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")
MENDS = {
    (errno.EACCES, errno.EPERM, errno.EROFS): "see that you may read and write there",
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR): "see that what is there is what was meant",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
}


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has come to its end, the accelerator's or the machine's."""
    if isinstance(error, UserError):
        return False
    named = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    lacking = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return named or lacking or any(word in str(error) for word in NO_MEMORY)


def line(error: BaseException) -> str | None:
    """Return a fault of the machine's with its mend, or None for another error."""
    if out_of_memory(error):
        said = first_line(error) if str(error) else type(error).__name__
        return f"out of memory ({said}); close other programs or take a machine with more"
    if not isinstance(error, OSError):
        return None
    mend = next((mend for numbers, mend in MENDS.items() if error.errno in numbers), "look at the disk or the network")
    reason = error.strerror or first_line(error)
    return f"{error.filename}: {reason}; {mend}" if error.filename else f"{reason}; {mend}"


@contextmanager
def told() -> Iterator[None]:
    """Turn a fault of the machine's into the user's one line."""
    try:
        yield
    except Exception as error:
        if said := line(error):
            raise UserError(said) from error
        raise
