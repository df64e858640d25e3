"""Where the repository, its configuration and the run records are; paths that a setting gives; YAML and JSON files."""

import io
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, find_remedy, get_first_line, require
from tasks.base import build_unique_keys

ROOT = Path(__file__).resolve().parents[3]
RUNS = Path(os.path.expanduser(os.environ.get("DUAL_LORA_RUNS") or ROOT / "runs"))
with suppress(FileNotFoundError):  # the current folder is gone, which commands refuse
    RUNS = RUNS.absolute()  # records name runs that others start from
BUNDLED = Path(__file__).parents[1] / "model" / "bundled"
CONF = ROOT / "conf"


# Folders of settings files next to CONF, which a command line adds.
own_folders: list[Path] = []


def find_choices(group: str) -> dict[str, Path]:
    """Return the files of a config group by the names of the choices, e.g. "glue/rte" of "task"."""
    folders = [folder / group for folder in (CONF, *own_folders)]
    found = {p.relative_to(f).with_suffix("").as_posix(): p for f in folders for p in f.rglob("*.yaml")}
    return dict(sorted(found.items()))


def list_choices(group: str) -> list[str]:
    """Return the choices of a config group."""
    return list(find_choices(group))


def resolve_path(key: str, value: str) -> Path:
    """Return the path that a setting gives, with ~ expanded. The caller checks whether anything exists there.

    Raises:
        UserError: the path is impossible, or access is denied.
    """
    try:
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user
        reason = getattr(error, "strerror", None) or get_first_line(error)
        raise UserError(f"{key}={value[:80]}: cannot be read ({reason}); give another path") from error
    require(is_utf8(os.path.abspath(path)), f"{key}={value[:80]}: {NOT_UTF8}; give another path")
    return path


NOT_UTF8 = "has bytes that are not UTF-8, which tokenizers and safetensors cannot open"


def is_utf8(text: str) -> bool:
    """Return whether text of the command line or the environment is UTF-8. Python keeps other bytes as surrogates."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def check_plain_file(path: Path) -> None:
    """Refuse a pipe or a device: reading one may never end.

    Raises:
        UserError: it is one.
    """
    is_plain = path.is_file() or path.is_dir() or not path.exists()
    require(is_plain, f"{path}: a pipe or a device, not a file; replace it")


ELSEWHERE_REMEDY = "set DUAL_LORA_RUNS=DIR to keep runs elsewhere"


def check_writable(folder: Path, remedy: str = ELSEWHERE_REMEDY) -> None:
    """Refuse a folder that cannot be written, or made, before anything is computed for it.

    Raises:
        UserError: with the part of the path that is in the way, and `remedy`.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(is_writable, f"{folder}: {there} is not a writable folder; {remedy}")


# The largest YAML file here has a few hundred values. Nested aliases can turn ten lines into billions.
MAX_YAML_VALUES = 100_000


def load_yaml(path: Path) -> Any:
    """Return a YAML file as an OmegaConf config.

    Raises:
        UserError: it is a pipe or a device, or its aliases make more values than any settings hold.
        OSError, ValueError, yaml.YAMLError, omegaconf.errors.OmegaConfBaseException: it cannot be read.
    """
    check_plain_file(path)
    return parse_yaml(path, path.read_text(encoding="utf-8"))


def parse_yaml(path: Path, text: str) -> Any:
    """Return the text of a YAML file as an OmegaConf config. path: what messages name.

    Raises:
        UserError, OSError, ValueError, yaml.YAMLError, omegaconf.errors.OmegaConfBaseException: as `load_yaml`.
    """
    from omegaconf import OmegaConf

    stream = io.StringIO(text)
    stream.name = str(path)
    loader = build_yaml_loader()(stream)
    try:
        node = loader.get_single_node()
        values = count_yaml_values(node, {})
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; fix the file") from error
    require(values <= MAX_YAML_VALUES, f"{path}: its aliases make {values:,} values; write the values themselves")
    content = {} if node is None else loader.construct_document(node)
    if not isinstance(content, list | dict | str | None):
        raise OSError(f"Invalid loaded object type: {type(content).__name__}")
    return OmegaConf.create(content)


@cache
def build_yaml_loader() -> type:
    """Return OmegaConf's YAML loader with libyaml's parser, which is ten times as fast as that in Python."""
    from omegaconf._utils import get_yaml_loader
    from yaml.constructor import SafeConstructor
    from yaml.cyaml import CParser
    from yaml.resolver import Resolver

    class Loader(CParser, get_yaml_loader()):
        def __init__(self, stream: io.StringIO) -> None:
            CParser.__init__(self, stream)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return Loader


def format_yaml(content: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads back as they are."""
    import yaml

    return yaml.dump(content, Dumper=build_yaml_dumper(), sort_keys=False)


@cache
def build_yaml_dumper() -> type:
    """Return PyYAML's dumper, made to quote also text like 1e3, which only OmegaConf's loader reads as a number."""
    from yaml import SafeDumper

    class Dumper(SafeDumper):
        pass

    known = Dumper.yaml_implicit_resolvers
    read = build_yaml_loader().yaml_implicit_resolvers
    Dumper.yaml_implicit_resolvers = {key: known.get(key, []) + read.get(key, []) for key in known | read}
    return Dumper


def count_yaml_values(node: Any, known: dict[int, int]) -> int:
    """Return how many values a YAML node holds once its aliases are written out. `known` are those counted before."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_YAML_VALUES + 1  # of one that holds itself there is no end
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(count_yaml_values(part, known) for part in parts)
    return known[id(node)]


def read_json_object(path: Path, remedy: str, *keys: str) -> dict[str, Any]:
    """Return the object that a JSON file holds, with at least these keys.

    Raises:
        UserError: it holds something else; `remedy` says what to do.
    """
    check_plain_file(path)
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=build_unique_keys)
    except OSError as error:
        remedy = find_remedy(error.errno, remedy)
        raise UserError(f"{path}: cannot be read ({error.strerror or get_first_line(error)}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({get_first_line(error)}); {remedy}") from error
    require(isinstance(content, dict), f"{path}: damaged (not a JSON object); {remedy}")
    missing = [key for key in keys if key not in content]
    require(not missing, f"{path}: damaged (no {', '.join(missing)}); {remedy}")
    return content
