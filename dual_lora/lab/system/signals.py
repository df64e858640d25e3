"""A polite stop: SIGTERM, or SIGINT once, ends the work where nothing is lost by it; the second one ends it at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dual_lora.lab.errors import RESUMES, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a queue sends shortly before the time limit; it means something only where submitit listens to it.
REQUEUE = signal.SIGUSR2


class StopRequest:
    """What was asked for (`asked`: a signal's name, or None), whether it must wait for a good place (`waits`), and what
    the same command does next (`then`)."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.waits, self.then = False, RESUMES
        self.before: dict[int, object] = {}

    def handle_signal(self, number: int, frame: object) -> None:
        """The signal handler: end at once, or where the work is that waits; the next signal does what it did before."""
        self.asked = signal.Signals(number).name
        self.restore_handlers()
        if not self.waits:
            raise Stopped(self.asked, self.then)
        kept = "with a checkpoint" if self.then == RESUMES else "without a checkpoint"
        os.write(2, f"\n{self.asked}: stopping after this step, {kept}; once more ends at once\n".encode())

    def restore_handlers(self) -> None:
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Listen to the signals as long as this lasts, but to none that whoever started this has it ignore."""
        self.asked, self.waits, self.then = None, False, RESUMES
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        heard += [REQUEUE] if callable(signal.getsignal(REQUEUE)) else []
        self.before = {number: signal.signal(number, self.handle_signal) for number in heard}
        try:
            yield
        finally:
            self.restore_handlers()
            self.asked = None

    @contextmanager
    def defer(self, wait: bool = True, then: str | None = None) -> Iterator[None]:
        """Only note a stop that is asked for in here (`wait`), or end at once (not `wait`)."""
        before = self.waits, self.then
        self.waits, self.then = wait, then or self.then
        try:
            yield
        finally:
            self.waits, self.then = before

    def raise_if_asked(self) -> None:
        """End here if that was asked for."""
        if self.asked:
            raise Stopped(self.asked, self.then)


STOP = StopRequest()
