"""Peak memory of some work (the accelerator's, else the process's resident set), and settings that need less."""

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

from dual_lora.lab.config.schema import Settings

STATUS_FILE, RESET_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager that measures the peak memory of its body; `peak` is in bytes. On Linux the kernel's high-water
    mark is reset first, so that runs in one process do not inherit each other's; elsewhere it is the process's."""

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                RESET_FILE.write_text("5", "utf-8")
        return self

    def __exit__(self, *error) -> None:
        self.peak = read_peak()


def suggest_smaller_batch(settings: Settings) -> str:
    """Return settings that train on as many examples per step, but fewer at a time."""
    train = settings.train
    size, parts = train.batch_size, next((n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0), 1)
    if parts == 1:
        return f"a lower task.max_length or {suggest_smaller_model(settings)}"
    smaller = f"train.batch_size={size // parts} train.accumulation={train.accumulation * parts}"
    return f"{smaller} takes less for as many examples per step"


def suggest_smaller_model(settings: Settings) -> str:
    """Return settings with which the model itself needs less."""
    half = " or model.dtype=bfloat16" if settings.model.dtype == "float32" else ""
    return f"a smaller model{half} takes less, or take a machine with more"


def suggest_fewer_rows(settings: Settings, sharded: bool) -> str:
    """Return settings with which evaluation needs less, if a single row does not fit, or rows that must stay
    together."""
    size = settings.eval.batch_size if sharded else 1
    return f"eval.batch_size={size // 2} takes less" if size > 1 else suggest_smaller_model(settings)


def read_peak() -> int:
    """Return the peak memory in bytes since the innermost `PeakMemory` began."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else read_resident_peak()


def read_resident_peak() -> int:
    """Return the high-water mark of the resident set in bytes."""
    if STATUS_FILE.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS_FILE.read_text("utf-8"))[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks below 256 MiB instead of returning them to the system, which must zero new ones.

    Returning them took a fifth of the time of a batched beam search on a CPU. Without glibc this has no effect.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 2**28)
        libc.mallopt(trim_threshold, 2**31 - 1)
