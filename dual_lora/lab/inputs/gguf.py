"""A model in one GGUF file, the format of llama.cpp: the file's header, read without torch.

transformers turns such a file into a model and a tokenizer. What it would misread is refused here, before anything
heavy is loaded, or corrected in `load_gguf_tokenizer`.
"""

import atexit
import json
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dual_lora.lab.errors import UserError, get_first_line, require

MAGIC, VERSIONS = b"GGUF", (2, 3)
# How the format stores a value, by the number of its type. Texts and lists are stored separately.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
SAVED_MODEL_REMEDY = "give the saved Hugging Face model, model.path=DIR"
# How byte-level tokenizers split a text before they merge bytes, by llama.cpp's names (src/llama-vocab.cpp).
# transformers knows a list of its own, and splits like GPT-2 for all others.
LIKE_GPT2 = {"gpt-2", "jais", "mpt", "olmo", "phi-2"}
# Each digit by itself, the rest like GPT-2.
DIGITS = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
# A piece that is itself a token is not split by the merges, and a text begins with a special token unless the file says
# otherwise. transformers does neither.
IGNORE_MERGES = {
    "falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What precedes the weights: metadata by name (None for a list), names of tensors, and the header's size in
    bytes."""

    values: dict[str, Any]
    tensors: tuple[str, ...]
    size: int

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    @property
    def pre_tokenizer(self) -> str | None:
        """Name of the pre-tokenizer (how texts are split before merging); None if the tokenizer is not byte-level."""
        byte_level = self.values.get("tokenizer.ggml.model") == "gpt2"
        return str(self.values.get("tokenizer.ggml.pre", "unnamed")) if byte_level else None


class Cursor:
    """A position in the bytes of a file; moving beyond their end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.offset = data, 0

    def skip(self, size: int) -> None:
        """Move forward by `size` bytes.

        Raises:
            EOFError: the file ends before that.
        """
        if self.offset + size > len(self.data):
            raise EOFError("it ends too early")
        self.offset += size

    def read_number(self, kind: str) -> Any:
        """Return the number here, of a type of `struct`, and move past it."""
        start = self.offset
        self.skip(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.data, start)[0]

    def read_string(self) -> str:
        """Return the text here, which its length precedes, and move past it."""
        length = self.read_number("Q")
        self.skip(length)
        return self.data[self.offset - length : self.offset].decode()

    def read_value(self, kind: int) -> Any:
        """Return the value here, of a type of the format, and move past it; None for a list."""
        if kind == TEXT:
            return self.read_string()
        return (
            self.read_number(FORMATS[kind])
            if kind != LIST
            else self.skip_list(self.read_number("I"), self.read_number("Q"))
        )

    def skip_list(self, kind: int, length: int) -> None:
        """Move past a list of `length` values of one type."""
        if kind in FORMATS:
            self.skip(length * struct.calcsize(f"<{FORMATS[kind]}"))
            return
        for _ in range(length):
            self.read_value(kind)

    def read_tensor(self) -> tuple[str, int]:
        """Return a tensor's name and its offset in the weights, in bytes."""
        name = self.read_string()
        self.skip(8 * self.read_number("I") + 4)
        return name, self.read_number("Q")


def is_gguf_file(path: Path) -> bool:
    """Return whether a path ends like a GGUF file's."""
    return path.suffix.lower() == ".gguf"


def read_gguf_header(path: Path) -> Header:
    """Return the header of a GGUF file that transformers reads correctly.

    Raises:
        UserError: there is no such file, it is damaged or of another format, or transformers would misread it.
    """
    require(path.is_file(), f"model.path={path}: no such file; give a GGUF file, or the folder of a saved model")
    stamp = path.stat()
    return read_checked_header(path, stamp.st_size, stamp.st_mtime_ns)


@cache
def read_checked_header(path: Path, size: int, changed: int) -> Header:
    """Return the header of a file with this size and time of change.

    Raises:
        UserError: as `read_gguf_header`.
    """
    require(read_magic(path) == MAGIC, f"model.path={path}: not a GGUF file; {SAVED_MODEL_REMEDY}")
    installed = find_spec("gguf") is not None
    require(installed, f"model.path={path}: GGUF files need the package gguf; pip install -e '.[quantised]'")
    try:
        found = parse_header(path)
    except (EOFError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"model.path={path}: damaged ({get_first_line(error)}); get the file again") from error
    check_gguf_model(path, found)
    check_gguf_tokenizer(path, found)
    return found


def read_magic(path: Path) -> bytes:
    """Return the first bytes of a file, by which the format is recognized."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC))


def parse_header(path: Path) -> Header:
    """Return the header of a GGUF file, whatever model it holds.

    Raises:
        EOFError: the file is cut short.
        ValueError: it is of an unknown version.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(data)
        cursor.skip(len(MAGIC))
        version, tensors, count = (cursor.read_number(kind) for kind in "IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, only 2 and 3 are supported")
        values = {cursor.read_string(): cursor.read_value(cursor.read_number("I")) for _ in range(count)}
        places = dict(cursor.read_tensor() for _ in range(tensors))
        found = Header(values, tuple(places), cursor.offset)
        cursor.skip(max(places.values(), default=0))  # the last tensor must begin within the file
        return found


def check_gguf_model(path: Path, found: Header) -> None:
    """Refuse a file that transformers cannot turn into a model, or only into one that computes something else.

    Raises:
        UserError: the file is a part, of an unknown architecture, or has scaled positions.
    """
    parts = found.values.get("split.count", 1)
    require(
        parts == 1,
        f"model.path={path}: one of {parts} parts; join them first (llama-gguf-split --merge), or {SAVED_MODEL_REMEDY}",
    )
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    known = {name.replace("_", "") for name in {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}}
    is_known = found.architecture.replace("-", "").replace("_", "") in known
    require(
        is_known,
        f"model.path={path}: transformers cannot read {found.architecture} models from GGUF; {SAVED_MODEL_REMEDY}",
    )
    scaled = found.values.get(f"{found.architecture}.rope.scaling.type", "none") != "none"
    scaled = scaled and found.architecture != "gpt-oss" or any(name.startswith("rope_") for name in found.tensors)
    require(
        not scaled,
        f"model.path={path}: its positions are scaled, which transformers would ignore; {SAVED_MODEL_REMEDY}",
    )


def check_gguf_tokenizer(path: Path, found: Header) -> None:
    """Refuse a tokenizer that would split texts differently from the model's training.

    Raises:
        UserError: the way it splits texts is unknown, or transformers does not follow it.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = found.pre_tokenizer is None or found.pre_tokenizer in LIKE_GPT2 | DIGITS | set(GGUF_PRE_TOKENIZER_SPLITS)
    require(
        known,
        f"model.path={path}: the way its tokenizer splits texts ({found.pre_tokenizer}) is not supported; "
        f"{SAVED_MODEL_REMEDY}",
    )
    glued = found.pre_tokenizer is None and found.values.get("tokenizer.ggml.add_space_prefix") is False
    glued = glued and not found.architecture.startswith("gemma")
    require(
        not glued,
        f"model.path={path}: its tokenizer puts no space before a text, transformers would; {SAVED_MODEL_REMEDY}",
    )


@cache
def link_alone(path: Path) -> TemporaryDirectory:
    """Return a folder, kept while Python runs, that holds a link to the file and nothing else. transformers would also
    read an adapter or decoding settings next to it."""
    folder = TemporaryDirectory(prefix="gguf-")
    atexit.register(folder.cleanup)  # Python would do it with a warning
    (Path(folder.name) / path.name).symlink_to(path.resolve())
    return folder


def load_gguf_tokenizer(path: Path) -> Any:
    """Return the file's own tokenizer as transformers builds it, but splitting texts as the file says, and without the
    token that transformers adds to every byte-level vocabulary."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, options = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, parts)
    state, pre_tokenizer = json.loads(backend.to_str()), read_gguf_header(path).pre_tokenizer
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(parts["tokens"])]
    if pre_tokenizer in DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    if pre_tokenizer in IGNORE_MERGES:
        state["model"]["ignore_merges"] = True
        options.setdefault("add_bos_token", True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)
