"""One process per run, and per report: a lock in its folder, which the system releases when its process ends for any
reason.

The file also says who holds it, because some file systems do not share locks between machines. The holder touches the
file every 20 seconds; a lock from another machine that was not touched for three minutes is considered stale. A process
that is frozen for longer and then continues is not detected.
"""

import fcntl
import json
import os
import platform
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from dual_lora.lab.errors import RunHeldElsewhere
from dual_lora.lab.system.files import translate_write_errors

LOCK_NAME = ".lock"
# Seconds between two touches, and after the last one until another machine's process counts as dead.
TOUCH_SECONDS, STALE_SECONDS = 20, 180
WAIT_SECONDS = 0.5  # between two tries of a process that waits
MAX_HOLDER_CHARACTERS = 4096  # no lock that this program wrote is longer


@contextmanager
def hold_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is created if there is none. wait: until another process gives it up.

    Raises:
        RunHeldElsewhere: another process holds it, unless this one waits.
        UserError: it cannot be written.
    """
    path = folder / LOCK_NAME
    with translate_write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        stream = await_lock(path) if wait else acquire_lock(path)
    released = threading.Event()
    heart = threading.Thread(target=touch_until, args=(stream, released), daemon=True)
    heart.start()
    try:
        yield
    finally:
        released.set()
        heart.join()
        if is_file_at(stream, path):
            path.unlink(missing_ok=True)
        stream.close()


def touch_until(stream: TextIO, released: threading.Event) -> None:
    """Touch the lock file until it is released."""
    while not released.wait(TOUCH_SECONDS):
        with suppress(OSError):  # a disk that is away for a while
            os.utime(stream.fileno())


def measure_lock_age(stream: TextIO, folder: Path) -> float:
    """Return the seconds between the lock's last touch and now, by the file server's clock. A touch in the future, as a
    clock that was set back leaves it, counts like one as long ago.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as fresh:
        return abs(os.fstat(fresh.fileno()).st_mtime - os.fstat(stream.fileno()).st_mtime)


def is_file_at(stream: TextIO, path: Path) -> bool:
    """Return whether an open file is still the one with this name, and has no other name."""
    try:
        held = os.fstat(stream.fileno())
        return os.path.samestat(held, path.lstat()) and held.st_nlink == 1
    except OSError:
        return False


def open_lock(path: Path) -> TextIO:
    """Return the lock file, open; a link or anything else but a plain file is removed first.

    Raises:
        OSError: it cannot be written.
    """
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink(missing_ok=True)
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8", errors="replace")


def acquire_lock(path: Path) -> TextIO:
    """Return the lock file, open, locked and with this process's name in it. Only a new file is written.

    Raises:
        RunHeldElsewhere: a process of this machine holds the lock, or a live one of another machine.
        OSError: it cannot be written.
    """
    while True:
        stream = open_lock(path)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stream:
                raise RunHeldElsewhere(describe_holder(read_holder(stream))) from None
        if is_file_at(stream, path):
            if not os.fstat(stream.fileno()).st_size:
                break
            check_stale(stream, path)
            path.unlink(missing_ok=True)  # a dead process's
        stream.close()  # its last holder removed it after it was opened here, or it was stale
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    stream.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}) + "\n")
    stream.flush()
    return stream


def await_lock(path: Path) -> TextIO:
    """Return the lock file as `acquire_lock` does, once no other process holds it; say whom it waits for.

    Raises:
        OSError: it cannot be written.
    """
    announced = False
    while True:
        try:
            return acquire_lock(path)
        except RunHeldElsewhere as held:
            if not announced:
                print(f"{path.parent}: waiting: {held}", file=sys.stderr)
            announced = True
            time.sleep(WAIT_SECONDS)


def check_stale(stream: TextIO, path: Path) -> None:
    """Refuse a lock that a live process of another machine may hold; otherwise its process is dead.

    Raises:
        RunHeldElsewhere: who holds it. The file is then closed.
        OSError: nothing can be written there.
    """
    other = read_holder(stream)
    if other.get("host", platform.node()) == platform.node() or measure_lock_age(stream, path.parent) >= STALE_SECONDS:
        return
    stream.close()
    later = f"try again in {STALE_SECONDS // 60} minutes or remove {path}"
    raise RunHeldElsewhere(f"{describe_holder(other)}; if that process is gone, {later}")


def read_holder(stream: TextIO) -> dict[str, str | int]:
    """Return what the lock file says: pid, host and since when; nothing while it is being written, or if damaged."""
    stream.seek(0)
    try:
        found = json.loads(stream.read(MAX_HOLDER_CHARACTERS))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_holder(other: dict[str, str | int]) -> str:
    """Return the holder of a lock in words."""
    if not other:
        return "another process is working on it"
    return f"process {other.get('pid')} on {other.get('host')} has held the lock since {other.get('since')}"
