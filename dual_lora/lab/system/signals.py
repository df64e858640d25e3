"""Stopping on request: the first SIGTERM, SIGINT or SIGHUP ends the work where nothing is lost; the second, at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dual_lora.lab.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a queue sends shortly before the time limit; it means something only where submitit listens to it.
REQUEUE = signal.SIGUSR2


class StopRequest:
    """A stop requested by a signal.

    asked: the signal's name, or None. waits: whether work may continue to a safe point first. safe_point: when that is
    reached, in words, if it is not the end of a training step. can_resume: whether the same command resumes from there.
    repeats: whether that command does its finished runs again before, which a command sets that has several.
    raised: whether `Stopped` was raised at once; an interrupted library may turn it into its own error.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.raised = False
        self.waits, self.safe_point, self.can_resume, self.repeats = False, None, True, False
        self.before: dict[int, object] = {}

    def handle_signal(self, number: int, frame: object) -> None:
        """Handle a signal: end at once, unless it is the first one and the work in progress waits for a good place.

        Raises:
            Stopped: the work ends here.
        """
        first, self.asked = self.asked is None, signal.Signals(number).name
        if not (first and self.waits):
            self.raised = True
            raise Stopped(self.asked, self.can_resume)
        kept = "with a checkpoint" if self.can_resume else "without a checkpoint"
        safe_point = self.safe_point or f"after this step, {kept}"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self.asked}: stopping {safe_point}; once more ends at once\n".encode())

    def restore_handlers(self) -> None:
        """Restore the signal handlers from before `listen`."""
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Listen to the signals as long as this lasts, except to those that the parent process has set to be ignored.

        Raises:
            Stopped: a stop was requested.
        """
        self.asked, self.raised, self.repeats = None, False, False
        self.waits, self.safe_point, self.can_resume = False, None, True
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        heard += [REQUEUE] if callable(signal.getsignal(REQUEUE)) else []
        self.before = {number: signal.signal(number, self.handle_signal) for number in heard}
        try:
            yield
        finally:
            self.restore_handlers()
            self.asked = None

    @contextmanager
    def defer(self, wait: bool = True, can_resume: bool = True, safe_point: str | None = None) -> Iterator[None]:
        """Within this context, remember a requested stop and continue (wait=True), or stop at once (wait=False).

        Raises:
            Stopped: a second stop was requested.
        """
        before = self.waits, self.can_resume, self.safe_point
        self.waits, self.can_resume, self.safe_point = wait, self.can_resume and can_resume, safe_point
        try:
            yield
        finally:
            self.waits, self.can_resume, self.safe_point = before

    def raise_if_asked(self) -> None:
        """End here if a stop was requested.

        Raises:
            Stopped: it was.
        """
        if self.asked:
            raise Stopped(self.asked, self.can_resume)


STOP = StopRequest()
