"""The JSON file of a benchmark: what it holds from the start, its name, and adding to the one of the same day."""

import json
import os
import platform
from datetime import date
from pathlib import Path

import torch

from ..analysis.cells.command import make_writable_folder


class BenchError(ValueError):
    """A mistake that the user can fix; its text is one line."""


def create_record(device: torch.device) -> dict:
    """Return a record of this machine and day without measurements."""
    return {"hardware": describe_hardware(device), "date": date.today().isoformat(), "cases": {}}


def describe_hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def get_record_path(record: dict, folder: Path) -> Path:
    """Return the file of a record's day and hardware."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in record["hardware"].lower()).split())
    return folder / f"{record['date']}-{slug}.json"


def check_folder(record: dict, folder: Path) -> None:
    """Refuse a folder that the record cannot be written to, before anything is measured for it.

    Raises:
        BenchError: it cannot be made or written, or holds something else under the record's name.
    """
    try:
        make_writable_folder(folder)
    except OSError as error:
        raise BenchError(f"--out {folder}: cannot be written ({error.strerror}); give another folder") from error
    path = get_record_path(record, folder)
    if os.path.lexists(path) and "cases" not in load_record(path):
        raise BenchError(f"{path}: no file of a benchmark; move it away")


def load_record(path: Path) -> dict:
    """Return the object that a JSON file holds.

    Raises:
        BenchError: there is no such file, or it holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise BenchError(f"{path}: not a file; give the JSON file of a benchmark")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, BenchError) else BenchError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise BenchError(f"{path}: no file of a benchmark")
    return content


def write_record(record: dict, folder: Path) -> None:
    """Write the record, keeping what else a file of the same day and hardware already has."""
    path = get_record_path(record, folder)
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {"cases": {}}
    folder.mkdir(parents=True, exist_ok=True)
    merged = {**earlier, **record, "cases": {**earlier["cases"], **record["cases"]}}
    replace_text(path, json.dumps(merged, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
