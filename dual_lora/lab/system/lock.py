"""One process a run: a lock in the run's folder, which the system lifts when its process ends, however that ends.

The file also says who holds it. On file systems that do not carry locks from one machine to another that text is all
there is. Whoever holds it therefore touches the file now and then; another machine's that was not touched for some
minutes is taken for that of a dead process. A process that is frozen for longer, and wakes, is not seen.
"""

import fcntl
import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from dual_lora.lab.errors import Elsewhere
from dual_lora.lab.system.files import translate_write_errors

LOCK_NAME = ".lock"
# Seconds between two touches, and without one until another machine's process is taken for dead.
TOUCH_SECONDS, STALE_SECONDS = 20, 180


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if there is none.

    Raises:
        Elsewhere: another process holds it.
        UserError: it cannot be written.
    """
    path = folder / LOCK_NAME
    with translate_write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        stream = acquire_lock(path)
    left = threading.Event()
    heart = threading.Thread(target=touch_until, args=(stream, left), daemon=True)
    heart.start()
    try:
        yield
    finally:
        left.set()
        heart.join()
        path.unlink(missing_ok=True)
        stream.close()


def touch_until(stream: TextIO, left: threading.Event) -> None:
    """Touch the lock file until it is left."""
    while not left.wait(TOUCH_SECONDS):
        with suppress(OSError):  # a disk that is gone for a while
            os.utime(stream.fileno())


def measure_lock_age(stream: TextIO, folder: Path) -> float:
    """Return for how long the lock file was not touched, by the clock of whoever keeps the files."""
    with tempfile.TemporaryFile(dir=folder) as fresh:
        return os.fstat(fresh.fileno()).st_mtime - os.fstat(stream.fileno()).st_mtime


def acquire_lock(path: Path) -> TextIO:
    """Return the lock file, open, locked and with this process's name in it.

    Raises:
        Elsewhere: another process of this machine holds the lock, or one of another machine that is alive.
    """
    while True:
        stream = path.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stream:
                raise Elsewhere(describe_holder(read_holder(stream))) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                break
        stream.close()  # its last holder removed it after it was opened here
    other = read_holder(stream)
    if other.get("host", platform.node()) != platform.node() and measure_lock_age(stream, path.parent) < STALE_SECONDS:
        stream.close()
        raise Elsewhere(
            f"{describe_holder(other)}; if that process is gone, try again in {STALE_SECONDS // 60} minutes or remove "
            f"{path}"
        )
    stream.truncate(0)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    stream.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}) + "\n")
    stream.flush()
    return stream


def read_holder(stream: TextIO) -> dict[str, str | int]:
    """Return who wrote the lock file: pid, host and since when; nothing while it is being written."""
    stream.seek(0)
    try:
        found = json.loads(stream.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def describe_holder(other: dict[str, str | int]) -> str:
    if not other:
        return "another process is doing it"
    return f"process {other.get('pid')} on {other.get('host')} is doing it since {other.get('since')}"
