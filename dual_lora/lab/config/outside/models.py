"""Models that have no file in conf/model: a folder or a hub id, with the settings that such a file would hold.

They follow from config.json only. conf/family/ has the names of modules by `model_type`; of any other type, the
modules are those of PEFT's own table for LoRA, or else all linear layers but the head.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from dual_lora.lab.config.outside.hub import use_cache_if_unreachable
from dual_lora.lab.config.paths import find_choices, load_yaml, read_json_object, resolve_path
from dual_lora.lab.config.schema import MAX_NAME, is_hub_id
from dual_lora.lab.errors import UserError, require, suggest_name, translate_read_errors

# PEFT's word for every linear layer but the head, as the role that a model of an unknown type has.
ALL_LINEAR = "all-linear"
FAMILY_FIELDS = ("types", "generates", "roles", "head", "adapt")
HUB_PLACE = re.compile(r"(?P<id>[^@]+)(?:@(?P<revision>[\w./-]+))?")
HUB_CACHE = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/[0-9a-f]{40}")
WRITERS = ("ForCausalLM", "LMHeadModel")  # how the classes of models that write text end
SIXTEEN_BITS = ("bfloat16", "float16")
TOKENIZER_SIGNS = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.bpe", "*.codes", "*.tiktoken", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SAVED_MODEL = "a saved Hugging Face model"
RESAVE_REMEDY = "save the model again"
# What this process found, one line for each model.
found_models: dict[str, str] = {}


def is_model_place(name: str) -> bool:
    """Return whether a name given as model=NAME is a path or a hub id, and not one of conf/model."""
    return "/" in name or name in (".", "..") or name.lower().endswith(".gguf") or Path(name).is_dir()


def find_hub_id(name: str) -> re.Match | None:
    """Return the match of a hub id, ORG/NAME or ORG/NAME@REVISION; None for a folder that exists, or any other path."""
    found = HUB_PLACE.fullmatch(name)
    return found if found and is_hub_id(found["id"]) and not Path(name).is_dir() else None


def describe_model(name: str) -> dict[str, Any]:
    """Return the settings of the model in a folder or on the hub, as a file in conf/model would give them.

    Raises:
        UserError: there is no model, or one that no task here can use.
    """
    hub = find_hub_id(name)
    if hub:
        config, place = read_hub_model(hub["id"], hub["revision"])
        called = hub["id"]
    else:
        folder = locate_folder(name)
        config, place, called = read_config_json(folder), {"path": str(folder)}, name_folder(folder)
    where, kind = f"model={name}", str(config.get("model_type"))
    require(kind != "None", f"{where}: its config.json names no model_type; give {SAVED_MODEL}")
    seq2seq = config.get("is_encoder_decoder") and not config.get("is_decoder")
    remedy = "take one that reads and writes in one stack (LLaMA), or an encoder for classes (BERT)"
    require(not seq2seq, f"{where}: {kind} has an encoder and a decoder, which no task here trains; {remedy}")
    family = load_families().get(kind) or guess_family(kind, config)
    stored = config.get("dtype") or config.get("torch_dtype")
    dtype = "bfloat16" if family["generates"] and stored in SIXTEEN_BITS else "float32"
    values = {"name": called, **place, "dtype": dtype, **family}
    found_models[name] = format_model(values, kind)
    return values


def locate_folder(name: str) -> Path:
    """Return the absolute path of a model's folder.

    Raises:
        UserError: what is missing in the folder.
    """
    is_gguf = name.lower().endswith(".gguf")
    require(not is_gguf, f"model={name}: a GGUF file does not say all of its model; take model=NAME model.path={name}")
    folder = Path(os.path.abspath(resolve_path("model", name)))
    if not folder.is_dir():
        remedy = f"give {SAVED_MODEL}, or a model of the hub as model=ORG/NAME"
        raise UserError(f"model={name}: {'a file' if folder.exists() else 'no such folder'}; {remedy}")
    missing = list_missing_files(folder)
    require(not missing, f"model={name}: {explain_no_model(folder, missing, 'model')}")
    return folder


def list_missing_files(folder: Path) -> list[str]:
    """Return what is missing in a folder that should hold a saved model, in words."""
    patterns = {
        "config.json": ("config.json",),
        "weights (*.safetensors)": ("*.safetensors",),
        "tokenizer (tokenizer.json)": TOKENIZER_SIGNS,
    }
    return [what for what, names in patterns.items() if not any(any(folder.glob(name)) for name in names)]


def explain_no_model(folder: Path, missing: list[str], key: str) -> str:
    """Return what is missing in a folder that should hold a saved model and what to do about it, in one line. key: the
    setting that names the folder."""
    found = ", ".join(f"no {what}" for what in missing) + " there"
    if near := find_near_model(folder):
        return f"{found}, but a model in {near}; give {key}={near}"
    if (folder / "adapter_config.json").exists():
        return f"{found}, but an adapter; give the model that it belongs to"
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles and "config.json" not in missing:
        return f"{found}, and {pickles[0]} is a pickle, which is never read; save the model again (save_pretrained)"
    if missing == ["tokenizer (tokenizer.json)"]:
        return f"{found}; save it into the same folder (tokenizer.save_pretrained)"
    return f"{found}; give the folder of {SAVED_MODEL}"


def find_near_model(folder: Path) -> Path | None:
    """Return the folder above or the only one below that holds a model."""
    below = [child for child in sorted(folder.iterdir()) if child.is_dir()] if folder.is_dir() else []
    below = [child for child in below if not list_missing_files(child)]
    above = [] if list_missing_files(folder.parent) else [folder.parent]
    return next(iter(above or (below if len(below) == 1 else [])), None)


def name_folder(folder: Path) -> str:
    """Return what the model of a folder is called in records: the folder's name, or the hub id that the hub's cache has
    it under, without characters that a file's name should not have."""
    cached = HUB_CACHE.fullmatch("/".join(folder.parts[-3:]))
    if cached:
        return f"{cached['org']}/{cached['name']}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-.")[:MAX_NAME] or "model"


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json, as they are there.

    Raises:
        UserError: it is damaged, or not a file.
    """
    return read_json_object(folder / "config.json", RESAVE_REMEDY)


@cache
def read_hub_model(hub: str, revision: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a hub model's config.json, and its place: hub id and the commit that `revision` names now.

    Raises:
        UserError: it cannot be fetched, or is damaged.
    """
    from huggingface_hub import hf_hub_download

    use_cache_if_unreachable(models=True)
    at = f"@{revision}" if revision else ""
    remedy = "check its name, log in for a gated one (hf auth login), or give model=DIR, a saved model"
    with translate_read_errors(f"model={hub}{at}: cannot fetch its config.json from the hub", remedy):
        file = Path(hf_hub_download(hub, "config.json", revision=revision))
    return read_config_json(file.parent), {"hub": hub, "revision": file.parent.name}


def load_families() -> dict[str, dict[str, Any]]:
    """Return the settings of every family in conf/family, by the `model_type` of its models.

    Raises:
        UserError: two files name the same type.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, path in find_choices("family").items():
        values = load_yaml(path)
        for key in values:
            near = suggest_name(key, FAMILY_FIELDS)
            require(key in FAMILY_FIELDS, f"{path}: {key}: a family has {', '.join(FAMILY_FIELDS)}.{near}")
        roles = dict(values.roles)
        family = {"generates": bool(values.get("generates")), "roles": roles, "head": list(values.get("head", []))}
        family["adapt"] = list(values.get("adapt", roles))
        for kind in values.types:
            require(kind not in found, f"conf/family/{name}.yaml: {kind} is in another family, too; keep one")
            found[kind] = family
    return found


def guess_family(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a model whose type is in no family. PEFT's table is imported only here, with torch."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    names = KNOWN.get(kind, [])
    roles = {"peft": names if isinstance(names, str) else "|".join(map(re.escape, names))}
    classes = config.get("architectures") or []
    writes = any(str(name).endswith(WRITERS) for name in classes)
    roles = roles if names else {"linear": ALL_LINEAR}
    return {"generates": writes, "roles": roles, "head": [], "adapt": list(roles)}


def format_model(values: dict[str, Any], kind: str) -> str:
    """Return what was found of a model, as one line."""
    modules = dict.fromkeys(values["roles"][role].replace("\\d+", "N").replace("\\", "") for role in values["adapt"])
    head = f", trains {' '.join(values['head'])} in full for classes (model.head)" if values["head"] else ""
    return (
        f"model {values['name']} has no settings file. Its config.json says {kind}: adapts {' '.join(modules)} "
        f"(model.adapt, model.roles){head}, in {values['dtype']} (model.dtype)"
    )


def print_found_models() -> None:
    """Print what was found of models without a settings file, once the command line is checked."""
    while found_models:
        print(found_models.pop(next(iter(found_models))), flush=True)
