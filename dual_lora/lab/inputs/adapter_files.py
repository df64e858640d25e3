"""Adapters saved by PEFT that a run starts from: in a folder, or on the hub. Only safetensors and JSON are read."""

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dual_lora.lab.config.outside.hub import fetch_files
from dual_lora.lab.config.paths import find_choices, load_yaml, read_json_object, resolve_path
from dual_lora.lab.config.schema import PLAIN_STARTS, Settings, format_typed_value, is_hub_id
from dual_lora.lab.errors import UserError, require, translate_read_errors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of an adapter's configuration that do not change what its weights compute, or that follow from their names
# and shapes.
HARMLESS_FIELDS = {
    "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "target_parameters", "runtime_config",
    "layers_to_transform", "layers_pattern", "layer_replication", "r1", "r2", "lora_dropout", "module_dropout",
    "vera_dropout", "randlora_dropout", "rank_dropout", "scale_warmup_steps", "kernel", "ste", "init_std",
    "direction_init_std", "init_weights",
}  # fmt: skip


def find_adapter(settings: Settings) -> Path | None:
    """Return the folder of the saved adapter that `init_from` names, fetched if it is on the hub; None if it
    names a run or nothing.

    Raises:
        UserError: it holds no safetensors, another method's, rank's or scale's adapter, one whose base weights cannot
            be known, or cannot be fetched.
    """
    if not settings.init_from or settings.method.peft is None:
        return None
    folder = resolve_path("init_from", settings.init_from)
    if not folder.exists() and is_hub_id(settings.init_from):
        folder = fetch_adapter(settings.init_from)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    where = f"init_from={settings.init_from}"
    has_weights = (folder / ADAPTER_WEIGHTS).is_file()
    require(has_weights, f"{where}: no {ADAPTER_WEIGHTS} there, the only format that is read; save the adapter again")
    check_saved_adapter(folder, settings.method.peft, settings)
    start = get_random_start(settings)
    require(
        start is None,
        f"{where}: {start} draws the base weights from the seed, which an adapter does not say; take the run that "
        "trained it, with its seed, or pissa for both",
    )
    return folder


def get_random_start(settings: Settings) -> str | None:
    """Return the setting of a start that changes the base weights by random numbers (PiSSA by a randomized SVD): an
    adapter trained on them fits no others. None for all other starts."""
    start = (settings.method.peft or {}).get("init_lora_weights")
    return f"init_lora_weights={start}" if "_niter_" in str(start) else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter.

    Raises:
        UserError: it is damaged.
    """
    return read_json_object(folder / ADAPTER_CONFIG, "save the adapter again", "peft_type")


def fetch_adapter(name: str) -> Path:
    """Return the folder in the cache with an adapter's files from the hub; offline, those of an earlier download.

    Raises:
        UserError: there is no such repository, or it cannot be reached and was not fetched before.
    """
    remedy = "give the folder of a run, runs/STUDY/ID, of a saved adapter, or its name on the hub"
    with translate_read_errors(f"init_from={name}: neither a folder here nor an adapter that can be fetched", remedy):
        folder = fetch_files(name, None, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    require((folder / ADAPTER_CONFIG).is_file(), f"init_from={name}: no {ADAPTER_CONFIG} there; {remedy}")
    return folder


def check_saved_adapter(folder: Path, own: dict[str, Any], settings: Settings, complete: bool = False) -> None:
    """Refuse a saved adapter whose configuration gives its weights another meaning than this run's, such as another
    alpha.

    own: fields of this run's configuration. Unless they are `complete`, those that are missing or null are not
    compared, because PEFT fills them in.

    Raises:
        UserError: with the first such field, both values and the setting to take.
    """
    saved = read_adapter_config(folder)
    own = own if complete else saved | {field: value for field, value in own.items() if value is not None}
    for field, (theirs, ours) in find_differing_fields(saved, own).items():
        what = f"an adapter with {field}={format_typed_value(theirs)}, this run's has {format_typed_value(ours)}"
        raise UserError(f"init_from={settings.init_from}: {what}; {suggest_field(field, theirs, settings)}")


def suggest_field(field: str, value: Any, settings: Settings) -> str:
    """Return the setting that gives a field of the adapter's configuration a value."""
    files = find_choices("method")
    if field == "peft_type":
        fields = {name: read_method_fields(file) for name, file in files.items()}
        names = [name for name, own in fields.items() if own.get("peft_type") == value and "target_modules" not in own]
        return f"take method={' or '.join(names) or 'NAME of that type'}"
    written = read_method_fields(files[settings.method.name]) if settings.method.name in files else {}
    source = re.search(r"\$\{(method\.\w+)\}", str(written.get(field)))
    if source and source[0] != written[field]:
        return f"take another {source[1]}"  # which the field is computed from
    name = source[1] if source else f"method.peft.{field}"
    if value is None:
        return f"drop {name}"
    return f"take {'' if field in written else '+'}{name}={format_typed_value(value)}"


def read_method_fields(path: Path) -> dict[str, Any]:
    """Return PEFT's fields as in the file of a method, references to other settings unresolved."""
    return OmegaConf.to_container(load_yaml(path)).get("peft") or {}


def compute_rank_share(config: dict[str, Any]) -> float | None:
    """Return the magnitude group's share of the rank, as Dual LoRA rounds it; None for other methods."""
    rank, ratio = config.get("r"), config.get("magnitude_ratio")
    numbers = isinstance(rank, int) and isinstance(ratio, int | float)
    return min(max(round(rank * ratio), 1), rank - 1) / rank if numbers and rank > 1 else None


def find_differing_fields(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that make a saved adapter compute something other than this run's with the same weights, and
    both values of each; method and rank first. A field that a version of PEFT does not have counts as not set."""
    shares = [compute_rank_share(config) for config in (saved, own)]
    if None not in shares:
        saved, own = ({**c, "magnitude_ratio": share} for c, share in zip((saved, own), shares, strict=True))
    found = {}
    for field in sorted(saved.keys() | own.keys(), key=lambda field: (field != "peft_type", field != "r", field)):
        values = [config.get(field) or None for config in (saved, own)]
        if field == "init_lora_weights":
            values = [None if value in PLAIN_STARTS else value for value in values]
        if any(isinstance(value, set) for value in values):  # JSON holds one as a list
            values = [set(value) if isinstance(value, list) else value for value in values]
        if field not in HARMLESS_FIELDS and values[0] != values[1]:
            found[field] = (saved.get(field), own.get(field))
    return found
