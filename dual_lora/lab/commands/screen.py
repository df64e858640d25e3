"""What a command prints: no secrets, and no error if the reading end is closed or cannot encode a character."""

import codecs
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EPIPE

from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import Stopped
from dual_lora.lab.system.libraries import hide_foreign_warnings

# What replaces characters that are not in an encoding; any other becomes "?".
PLAIN = {"–": "-", "—": "-", "−": "-", "±": "+-", "×": "x", "…": "...", "≤": "<=", "≥": ">=", "†": "+", "‡": "++"}


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Return plain text for characters that are not in an encoding, and where to continue (a codecs error handler)."""
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in missing), error.end


codecs.register_error("plain", replace_unencodable)


class LenientFile(io.FileIO):
    """A file descriptor to write to. After the first `error` everything written is dropped."""

    error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, or pretend to, and return the number of bytes."""
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


class Screen(io.TextIOWrapper):
    """Standard output or error as the program sees it, in place of Python's own stream."""

    def write(self, text: str) -> int:
        """Write a text without its secrets."""
        return super().write(redact_secrets(text))


def open_screen(name: str, number: int) -> Screen:
    """Return the stream that takes the place of sys.stdout or sys.stderr."""
    before = getattr(sys, name)
    if before is not None:
        with suppress(OSError, ValueError):
            before.flush()
    options = {"line_buffering": number == 2 or (before is not None and before.line_buffering)}
    encoding = before.encoding if before is not None else "utf-8"
    return Screen(io.BufferedWriter(LenientFile(number, "w", closefd=False)), encoding, "plain", **options)


def fill_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed; otherwise the next file opened would receive the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


@contextmanager
def guard_screen(command: str) -> Iterator[None]:
    """Print through `Screen` for as long as this lasts, without third-party warnings. Streams that somebody else has
    replaced (pytest) stay."""
    fill_standard_descriptors()
    names = {name: n for n, name in ((1, "stdout"), (2, "stderr")) if getattr(sys, name) is getattr(sys, f"__{name}__")}
    before = {name: getattr(sys, name) for name in names}
    ours = {name: open_screen(name, number) for name, number in names.items()}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: (
        None if isinstance(found.exc_value, (Stopped, KeyboardInterrupt)) else hook(found)
    )
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        with warnings.catch_warnings():
            hide_foreign_warnings()
            yield
    finally:
        for stream in ours.values():
            stream.flush()
        lost = ours["stdout"].buffer.raw.error if "stdout" in ours else None
        if lost and lost.errno != EPIPE:  # a closed pipe is fine: its reader had enough (`| head`)
            print(f"{command}: what it printed could not be written ({lost.strerror})", file=sys.stderr)
        for name, stream in before.items():
            setattr(sys, name, stream)
        sys.unraisablehook = hook
