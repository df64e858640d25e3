"""The files a model is read from: which they are, a folder that holds only these, and hashes that identify them.

transformers follows what lies in a model's folder: an adapter, an index that names other weights, a file with decoding
settings. So it is never given that folder, but one of links to the files listed here, with a cleaned config.json. For
a hub model the links point into the cache, to which only these files are downloaded.
"""

import atexit
import hashlib
import json
import os
import re
import sys
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dual_lora.lab.config.outside.hub import fetch_files, find_conversion
from dual_lora.lab.config.outside.models import (
    RESAVE_REMEDY,
    explain_no_model,
    list_missing_files,
    read_config_json,
)
from dual_lora.lab.config.paths import BUNDLED, read_json_object, resolve_path
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, get_first_line, require, translate_read_errors
from dual_lora.lab.inputs.adapter_files import ADAPTER_CONFIG
from dual_lora.lab.inputs.gguf import is_gguf_file, link_alone, read_gguf_header
from dual_lora.lab.inputs.model_config import clean_config, fit_class_fields
from dual_lora.lab.system.sealed import hash_file

# Bytes of either end of a weight file that identify it.
END_BYTES = 1 << 20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*",
)  # fmt: skip
SPECIAL_TOKENS, SPECIAL_TOKEN_LISTS = "special_tokens_map.json", ("additional_special_tokens", "extra_special_tokens")
# Of rarer tokenizers; records of earlier versions do not hold them.
RARE_TOKENIZER_FILES = (
    "*.spm", "*.bpe", "*.codes", "*.tiktoken", "tekken.json", "dict.txt", "emoji.json", "normalizer.json",
    "entity_vocab.json", "target_vocab.json", "byte_maps.json", "word_*.json",
)  # fmt: skip
# Files of a model's folder that a record hashes. generation_config.json is no longer read, but old records contain it.
RECORDED_FILES = ("*.safetensors", "config.json", "generation_config.json", *TOKENIZER_FILES)
COMMIT = re.compile(r"[0-9a-f]{40}")


def find_model(settings: Settings) -> Path | None:
    """Return the folder or the GGUF file the model is read from, or None for the hub.

    Raises:
        UserError: `model.path` holds no model, or what lies there cannot be honoured.
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
    if path:
        check_model_folder(path)
    return path or None


def translate_model_errors(settings: Settings) -> AbstractContextManager[None]:
    """Turn a failure to find, fetch or read a model into one line."""
    where = find_model(settings) or settings.model.hub
    return translate_read_errors(
        f"model={settings.model.name}: cannot load {where}", "give model.path=DIR, a complete saved model"
    )


def fetch_model(settings: Settings, weights: bool = False) -> Path:
    """Return the folder in the hub's cache with a model's config.json and tokenizer, and with its weights if they are
    asked for. All of them are of one commit, whatever a revision such as main names meanwhile.

    Raises:
        UserError: they cannot be fetched, or the repository holds no config.json, an adapter, or no safetensors.
    """
    hub, revision = settings.model.hub, settings.model.revision
    where = f"model={settings.model.name}: {hub}@{revision}"
    with translate_model_errors(settings):
        folder = fetch_files(hub, revision, "config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, *RARE_TOKENIZER_FILES)
        require((folder / "config.json").is_file(), f"{where}: no config.json there; give the repository of a model")
        adapter = (folder / ADAPTER_CONFIG).exists()
        require(not adapter, f"model.hub={hub}: holds an adapter next to the model; take the model it belongs to")
        if weights:
            fetch_files(hub, folder.name, WEIGHTS, INDEX)
            in_one_file = (folder / WEIGHTS).is_file()
            if not in_one_file and not (folder / INDEX).is_file():
                found = find_conversion(hub)
                remedy = f"model.revision={found}, the hub's conversion" if found else "a revision that has one"
                raise UserError(f"{where}: neither {WEIGHTS} nor {INDEX} there; take {remedy}, or give model.path=DIR")
            if not in_one_file:
                fetch_files(hub, folder.name, *list_shards(folder / INDEX))
    return folder


def check_model_folder(path: Path) -> None:
    """Refuse a folder that holds no model, or more than one.

    Raises:
        UserError: a file is missing or damaged, or an adapter lies next to the weights.
    """
    missing = list_missing_files(path)
    if any("tokenizer" not in what for what in missing):  # a tuned model's folder has none, nor does a plan need it
        raise UserError(f"model.path={path}: {explain_no_model(path, missing, 'model.path')}")
    adapter = path / ADAPTER_CONFIG
    require(
        not adapter.exists(),
        f"{adapter}: an adapter next to the model, which may be merged already; move it away, or merge it first",
    )
    read_config_fields(path)


def read_config_fields(folder: Path, weights: bool = True) -> dict[str, Any]:
    """Return the fields of a folder's config.json that decide what the model is. weights: whether the folder holds
    them; the number of layers is then compared with theirs.

    Raises:
        UserError: the file is damaged, or a field cannot be honoured.
    """
    file = folder / "config.json"
    values = read_config_json(folder)
    kind = values.get("model_type")
    require(isinstance(kind, str), f"{file}: names no model_type; give a saved Hugging Face model")
    tensors = sum(len(list_tensors(found)) for found in list_weight_files(folder)) if weights else None
    return clean_config(values, str(file), tensors)


def list_weight_files(folder: Path) -> list[Path]:
    """Return the files the weights are read from: one, or the shards that an index names.

    Raises:
        UserError: there are none, or the index names files that are not shards in this folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    require(index.is_file(), f"model.path={folder}: neither {WEIGHTS} nor {INDEX} there; {RESAVE_REMEDY}")
    names = list_shards(index)
    for name in names:
        require((folder / name).is_file(), f"{index}: names {name}, which is not there; get the complete model")
    return [folder / name for name in names]


def list_shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights names.

    Raises:
        UserError: the index is damaged, or names files that cannot be shards in the same folder.
    """
    shards = read_json_object(index, RESAVE_REMEDY, "weight_map")["weight_map"]
    names_files = shards and isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    require(bool(names_files), f"{index}: damaged (weight_map names no files); {RESAVE_REMEDY}")
    names = sorted(set(shards.values()))
    for name in names:
        is_shard = Path(name).name == name and name.endswith(".safetensors")
        require(is_shard, f"{index}: names {name[:80]!r}; weights are read from *.safetensors in the same folder only")
    return names


def list_tensors(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        UserError: the file is damaged.
    """
    return read_tensor_names(file, *get_file_stamp(file))


@cache
def read_tensor_names(file: Path, *stamp: int) -> list[str]:
    """Return the names in the header of a safetensors file, read once for each stamp.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            require(length <= file.stat().st_size, f"{file}: damaged; get the file again")
            header = json.loads(stream.read(length))
        return [name for name in header if name != "__metadata__"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({get_first_line(error)}); get the file again") from error


def find_deciding_index(folder: Path) -> Path | None:
    """Return the index of the weights if it decides which are read: if the folder holds a tensor twice. Otherwise the
    shards say all that it says.

    Raises:
        UserError: the index names two shards that hold the same tensor.
    """
    read = list_weight_files(folder)
    if read == [folder / WEIGHTS]:
        return None
    files = {file: list_tensors(file) for file in sorted(folder.glob("*.safetensors"))}
    names = [name for file in read for name in files[file]]
    require(len(names) == len(set(names)), f"{folder / INDEX}: two of its files hold the same tensor; {RESAVE_REMEDY}")
    others = {name for file in files if file not in read for name in files[file]}
    return folder / INDEX if others & set(names) else None


def list_matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files in a folder that match one of the patterns, sorted."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def identify_weights(settings: Settings) -> dict[str, str]:
    """Return what identifies the weights: hub id and revision, or a hash over both ends of every weight file. Of a GGUF
    file everything before the weights is hashed, too.

    Raises:
        UserError: the model is nowhere, or cannot be read.
    """
    folder = find_model(settings)
    if folder is None:
        needs_place = not settings.model.hub and not settings.plan
        require(not needs_place, f"model={settings.model.name}: not on the hub; give model.path=DIR, a saved model")
        is_folder = os.path.isdir(settings.model.hub or "")
        require(not is_folder, f"model.hub={settings.model.hub}: is a folder here; give it as model.path=DIR")
        return {"hub": f"{settings.model.hub}@{settings.model.revision}"}
    if is_gguf_file(folder):
        ends = read_file_ends(folder, read_gguf_header(folder).size + END_BYTES)
        return {"sha256": hashlib.sha256(f"{folder.stat().st_size}".encode() + ends).hexdigest()}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode() + read_file_ends(file, END_BYTES))
    if index := find_deciding_index(folder):
        digest.update(index.read_bytes())
    return {"sha256": digest.hexdigest()}


def read_file_ends(file: Path, first: int) -> bytes:
    """Return the `first` bytes of a file and its last `END_BYTES`."""
    with file.open("rb") as stream:
        start = stream.read(first)
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        return start + stream.read()


def hash_model_files(settings: Settings) -> dict[str, str]:
    """Return the SHA-256 of every file in the model's folder that can change a digit. A model of the hub is identified
    by its revision: empty for a commit; for a name such as main, the commit that it names. A run's identity uses
    fewer files, so that it stays the same between versions.

    Raises:
        UserError: the model cannot be read.
    """
    path = find_model(settings)
    if path is None:
        pinned = COMMIT.fullmatch(settings.model.revision or "")
        return {} if pinned else {"commit": fetch_model(settings).name}
    found = {"gguf": path}  # whatever the file is called
    if path.is_dir():
        files = list_matching_files(path, RECORDED_FILES + RARE_TOKENIZER_FILES)
        found = {file.name: file for file in [*files, *filter(None, [find_deciding_index(path)])]}
    return {name: hash_unchanged_file(found[name], *get_file_stamp(found[name])) for name in sorted(found)}


def find_changed_files(known: dict[str, str], settings: Settings) -> list[str]:
    """Return the names of the model's files whose hashes differ from `known`, those in a record. A file that an earlier
    version did not record counts as unchanged.

    Raises:
        UserError: the model cannot be read.
    """
    now = hash_model_files(settings)
    rare = {name for name in now.keys() - known.keys() if any(fnmatch(name, p) for p in RARE_TOKENIZER_FILES)}
    return sorted(name for name in (known | now).keys() - rare if known.get(name) != now.get(name))


def warn_unchecked_weights(folder: Path, settings: Settings) -> None:
    """Print that the record in `folder` does not say which files its base model had: a commit of the hub tells the
    weights, but not whether another folder holds the same."""
    what = f"model.path={settings.model.path} may hold other weights than it was trained on"
    print(f"not checked: {folder} records no hashes of model={settings.model.name}, so {what}", file=sys.stderr)


def get_file_stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


@cache
def hash_unchanged_file(path: Path, *stamp: int) -> str:
    """Return a file's SHA-256, read once for each stamp."""
    return hash_file(path)


def link_model(path: Path, weights: bool = True) -> Path:
    """Return a folder, kept while Python runs, that holds links to the files a model is read from, with or without its
    weights, and nothing else.

    Raises:
        UserError: the model cannot be read, or its config.json not be honoured.
    """
    if is_gguf_file(path):
        return Path(link_alone(path).name)
    held = list_weight_files(path) if weights else []
    index = [path / INDEX] if held and held != [path / WEIGHTS] else []
    files = [*held, *index, *list_matching_files(path, TOKENIZER_FILES + RARE_TOKENIZER_FILES)]
    stamps = tuple((file, *get_file_stamp(file)) for file in [path / "config.json", *files])
    folder = Path(link_files(path, stamps, weights).name)
    if not folder.is_dir():  # a process that was forked from this one removed it at its end
        link_files.cache_clear()
        folder = Path(link_files(path, stamps, weights).name)
    return folder


@cache
def link_files(path: Path, stamps: tuple[tuple[Path | int, ...], ...], weights: bool) -> TemporaryDirectory:
    """Link the files named in `stamps`, next to a cleaned copy of config.json.

    Raises:
        UserError: config.json cannot be honoured.
    """
    folder = TemporaryDirectory(prefix="model-")
    fields = fit_class_fields(read_config_fields(path, weights), str(path / "config.json"))
    (Path(folder.name) / "config.json").write_text(json.dumps(fields), "utf-8")
    atexit.register(folder.cleanup)  # Python would do it with a warning
    for file, *_ in stamps[1:]:
        link = Path(folder.name) / file.name
        if file.name == SPECIAL_TOKENS:
            link.write_text(json.dumps(read_special_tokens(file)), "utf-8")
        else:
            link.symlink_to(file.resolve())
    return folder


def read_special_tokens(file: Path) -> dict[str, Any]:
    """Return the special tokens that a special_tokens_map.json names; its other fields would be taken for options.

    Raises:
        UserError: the file is damaged, a token has no text, or tokenizer_config.json names another one.
    """
    values = read_json_object(file, RESAVE_REMEDY)
    listed = {name: value for name, value in values.items() if name in SPECIAL_TOKEN_LISTS}
    named = {name: value for name, value in values.items() if name.endswith("_token") and not name.startswith("add_")}
    config = file.with_name("tokenizer_config.json")
    others = read_json_object(config, RESAVE_REMEDY) if config.is_file() else {}
    if "added_tokens_decoder" in others:
        others = {}  # transformers then ignores the map
    for name, value in named.items():
        text, other = get_token_text(value), get_token_text(others.get(name))
        require(bool(text) and isinstance(text, str), f"{file}: {name} is not text; {RESAVE_REMEDY}")
        require(other in (None, text), f"{file}: {name} is {text!r}, but {other!r} in {config.name}; keep one of them")
    return named | listed


def get_token_text(token: Any) -> Any:
    """Return the text of a special token, which may be in an object with more about it."""
    return token.get("content") if isinstance(token, dict) else token
