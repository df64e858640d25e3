"""The JSON file of a benchmark: what it holds from the start, its name, and adding to the one of the same day."""

import json
import os
import platform
from datetime import date
from pathlib import Path

import torch


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
