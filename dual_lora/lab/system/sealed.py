"""Whole checkpoints: a manifest with size and SHA-256 of every file, written last, tells one from half of one. It holds
a digest of itself, too."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dual_lora.lab.system.files import flush_to_disk, remove_path

MANIFEST = "manifest.json"


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def hash_content(content: dict[str, Any]) -> str:
    """Return the SHA-256 of what a JSON file is to hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal_folder(folder: Path, manifest: Path | None = None, **more: Any) -> None:
    """Write the manifest of the files in `folder` (there, unless told), which makes them whole; keeps `more` in it."""
    manifest = manifest or folder / MANIFEST
    manifest.unlink(missing_ok=True)
    files = {str(path.relative_to(folder)): describe_file(path) for path in list_files(folder)}
    for path in (*list_files(folder), folder):
        flush_to_disk(path)
    partial = manifest.with_name(f".{manifest.name}.partial")
    held = {"files": files, **more}
    with partial.open("w") as stream:
        json.dump(held | {"digest": hash_content(held)}, stream, indent=1, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(manifest)
    flush_to_disk(manifest.parent)


def read_seal(folder: Path, manifest: Path | None = None) -> dict[str, Any] | None:
    """Return what the manifest holds if that and every file it names are as they were sealed, else None."""
    manifest = manifest or folder / MANIFEST
    try:
        held = json.loads(manifest.read_text())
        same = held.pop("digest") == hash_content(held)
        there = all(describe_file(folder / name) == facts for name, facts in held["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return held if same and there else None


def parse_checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint below `folder`; half and damaged ones are removed."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=parse_checkpoint_step, reverse=True):
        if read_seal(path):
            return path
        print(f"{path.name} is damaged or was cut short: removed")
        remove_path(path)
    return None
