"""A polite stop: SIGTERM, or SIGINT once, ends the work where nothing is lost by it; the second one ends it at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a queue sends shortly before the time limit; it means something only where submitit listens to it.
REQUEUE = signal.SIGUSR2


class Stopped(BaseException):
    """Somebody asked for an end. Not an `Exception`, so that nothing on the way takes it for a failure."""


class Stop:
    """What was asked for (`asked`: a signal's name, or None) and whether it must wait for a good place (`waits`)."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.waits = False
        self.before: dict[int, object] = {}

    def hear(self, number: int, frame: object) -> None:
        """The signal handler: end at once, or where the work is that waits; the next signal does what it did before."""
        self.asked = signal.Signals(number).name
        self.forget()
        if not self.waits:
            raise Stopped(self.asked)
        os.write(2, f"\n{self.asked}: stopping after this step, with a checkpoint; once more ends at once\n".encode())

    def forget(self) -> None:
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen to the signals as long as this lasts, but to none that whoever started this has it ignore."""
        self.asked, self.waits = None, False
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        heard += [REQUEUE] if callable(signal.getsignal(REQUEUE)) else []
        self.before = {number: signal.signal(number, self.hear) for number in heard}
        try:
            yield
        finally:
            self.forget()
            self.asked = None

    @contextmanager
    def waiting(self, wait: bool = True) -> Iterator[None]:
        """Only note a stop that is asked for in here (`wait`), or end at once (not `wait`)."""
        before, self.waits = self.waits, wait
        try:
            yield
        finally:
            self.waits = before

    def check(self) -> None:
        """End here if that was asked for."""
        if self.asked:
            raise Stopped(self.asked)


STOP = Stop()
