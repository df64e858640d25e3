"""The files a model is read from: where they are, and hashes that identify them."""

import hashlib
import os
from functools import cache
from pathlib import Path

from dual_lora.lab.config.paths import BUNDLED, resolve_path
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.inputs.gguf import is_gguf_file, read_gguf_header
from dual_lora.lab.system.files import read_json_object
from dual_lora.lab.system.sealed import hash_file

# Bytes of either end of a weight file that identify it.
END_BYTES = 1 << 20
# What of a model's folder can change a digit.
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt")
MODEL_FILES += ("special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*")


def find_model(settings: Settings) -> Path | None:
    """Return the folder or the GGUF file the model is read from, or None for the hub.

    Raises:
        UserError: `model.path` holds no model.
    """
    model = settings.model
    path = (
        BUNDLED / model.name
        if model.bundled and model.path is None
        else model.path and resolve_path("model.path", model.path)
    )
    if path and is_gguf_file(path):
        read_gguf_header(path)
        return path
    if path and not (path / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json there; give the folder of a saved Hugging Face model")
    if path and not list(path.glob("*.safetensors")):
        raise UserError(f"model.path={path}: no *.safetensors there; other weight formats are not loaded")
    if path:
        kind = read_json_object(path / "config.json", "save the model anew").get("model_type")
        require(isinstance(kind, str), f"{path / 'config.json'}: names no model_type; give a saved Hugging Face model")
    return path or None


def identify_weights(settings: Settings) -> dict[str, str]:
    """Return what identifies the weights: hub id and revision, or a hash over both ends of every weight file, of a GGUF
    file over all that stands before the weights, too."""
    folder = find_model(settings)
    if folder is None:
        known = settings.model.hub or settings.plan
        require(bool(known), f"model={settings.model.name}: not on the hub; give model.path=DIR, a saved model")
        here = os.path.isdir(settings.model.hub or "")
        require(not here, f"model.hub={settings.model.hub}: is a folder here; give it as model.path=DIR")
        return {"hub": f"{settings.model.hub}@{settings.model.revision}"}
    if is_gguf_file(folder):
        ends = read_file_ends(folder, read_gguf_header(folder).size + END_BYTES)
        return {"sha256": hashlib.sha256(f"{folder.stat().st_size}".encode() + ends).hexdigest()}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode() + read_file_ends(file, END_BYTES))
    return {"sha256": digest.hexdigest()}


def read_file_ends(file: Path, first: int) -> bytes:
    """Return the `first` bytes of a file and its last `END`."""
    with file.open("rb") as stream:
        start = stream.read(first)
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        return start + stream.read()


def hash_model_files(settings: Settings) -> dict[str, str]:
    """Return the SHA-256 of every file of the model's folder that can change a digit; of a model of the hub none, which
    is known by its revision. The run's name holds less of them, so that it does not change from version to version."""
    path = find_model(settings)
    if path is None:
        return {}
    found = {"gguf": path}  # whatever the file is called
    if path.is_dir():
        found = {file.name: file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return {name: hash_unchanged_file(found[name], *get_file_stamp(found[name])) for name in sorted(found)}


def get_file_stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


@cache
def hash_unchanged_file(path: Path, *stamp: int) -> str:
    """Return a file's SHA-256, read once for each stamp."""
    return hash_file(path)
