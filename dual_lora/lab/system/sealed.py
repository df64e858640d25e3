"""Sealed folders and files: a manifest, written last, holds the size and SHA-256 of every file in a folder, the
identity of the run that they belong to, and a digest of itself. A folder with an added, missing or changed file is not
intact."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import require
from dual_lora.lab.system.files import (
    MISSING,
    allow_by_umask,
    flush_to_disk,
    remove_path,
    remove_temporary_files,
    translate_access_errors,
    write_text,
)

MANIFEST = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")


def list_files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted; none if there is no folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size in bytes and its SHA-256.

    Raises:
        OSError: it cannot be read.
    """
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def hash_content(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_digest_right(content: dict[str, Any]) -> bool:
    """Return whether a JSON object holds its own digest; False without one."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return content.get("digest") == hash_content(rest)


def seal_folder(folder: Path, manifest: Path | None = None, **more: Any) -> None:
    """Seal the files in `folder` by writing its manifest (there, unless a path is given), which also keeps `more`.

    Raises:
        OSError: something cannot be written.
    """
    manifest = manifest or folder / MANIFEST
    manifest.unlink(missing_ok=True)
    remove_temporary_files(folder, manifest.name)
    for path in list_files(folder):
        allow_by_umask(path)
        flush_to_disk(path)
    flush_to_disk(folder)
    held = {"files": {str(path.relative_to(folder)): describe_file(path) for path in list_files(folder)}, **more}
    write_text(manifest, json.dumps(held | {"digest": hash_content(held)}, indent=1, allow_nan=False))


def read_seal(folder: Path, manifest: Path | None = None) -> dict[str, Any] | None:
    """Return the manifest's content if it and all files are as they were sealed and there are no others, else None.

    Raises:
        UserError: a file cannot be read, which says nothing of what it holds.
    """
    manifest = manifest or folder / MANIFEST
    try:
        with translate_access_errors(folder, missing_too=False):
            held = json.loads(manifest.read_text("utf-8"))
            intact = is_digest_right(held)
            names = {str(path.relative_to(folder)) for path in list_files(folder) if path != manifest}
            same = names == held["files"].keys()
            same = same and all(describe_file(folder / name) == facts for name, facts in held["files"].items())
    except (*MISSING, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {name: value for name, value in held.items() if name != "digest"} if intact and same else None


def check_owner(held: dict[str, Any], identity: str, path: Path) -> None:
    """Refuse what was sealed for another run. Seals of earlier versions name none.

    Raises:
        UserError: the other run and the remedy.
    """
    owner = held.get("identity", identity)
    require(owner == identity, f"{path}: belongs to run {owner}, not to {identity}; remove it or put it back")


def parse_checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a folder that `CHECKPOINT_NAME` matches."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def find_newest_checkpoint(folder: Path, identity: str) -> Path | None:
    """Return a run's newest intact checkpoint below `folder`; incomplete and damaged ones are removed.

    Raises:
        UserError: a checkpoint is another run's, or of another step than its name says, or cannot be read.
    """
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    for path in sorted(found, key=parse_checkpoint_step, reverse=True):
        if held := read_seal(path):
            check_owner(held, identity, path)
            name = held.get("name", path.name)  # which seals of earlier versions lack
            require(name == path.name, f"{path}: was written as {name}; remove it or give it that name")
            return path
        print(f"{path.name} is damaged or incomplete: removed")
        remove_path(path)
    return None
