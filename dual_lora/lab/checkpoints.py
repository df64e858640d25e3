"""Whole checkpoints: a manifest with size and SHA-256 of every file, written last, tells one from half of one. It holds
a digest of itself, too."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dual_lora.lab.disk import flush, remove

MANIFEST = "manifest.json"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of what a JSON file is to hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, manifest: Path | None = None, **more: Any) -> None:
    """Write the manifest of the files in `folder` (there, unless told), which makes them whole; keeps `more` in it."""
    manifest = manifest or folder / MANIFEST
    manifest.unlink(missing_ok=True)
    files = {str(path.relative_to(folder)): file_facts(path) for path in files_of(folder)}
    for path in (*files_of(folder), folder):
        flush(path)
    partial = manifest.with_name(f".{manifest.name}.partial")
    held = {"files": files, **more}
    with partial.open("w") as stream:
        json.dump(held | {"digest": digest(held)}, stream, indent=1, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(manifest)
    flush(manifest.parent)


def sealed(folder: Path, manifest: Path | None = None) -> dict[str, Any] | None:
    """Return what the manifest holds if that and every file it names are as they were sealed, else None."""
    manifest = manifest or folder / MANIFEST
    try:
        held = json.loads(manifest.read_text())
        same = held.pop("digest") == digest(held)
        there = all(file_facts(folder / name) == facts for name, facts in held["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return held if same and there else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint below `folder`; half and damaged ones are removed."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        if sealed(path):
            return path
        print(f"{path.name} is damaged or was cut short: removed")
        remove(path)
    return None
