"""The run or adapter that `init_from` names: its weights, and whether this run can start from them."""

from pathlib import Path

from dual_lora.lab.config.paths import resolve_path
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.inputs.adapter_files import ADAPTER_WEIGHTS, check_saved_adapter, find_adapter, get_random_start
from dual_lora.lab.inputs.model_files import hash_model_files, warn_unchecked_weights
from dual_lora.lab.record.record import Record


def find_init_weights(settings: Settings) -> Path:
    """Return the weights file of the adapter or the run that `init_from` names.

    Raises:
        UserError: there is none, it is damaged, another method, rank, scale or model trained it, or another seed gives
            other base weights.
    """
    if adapter := find_adapter(settings):
        return adapter / ADAPTER_WEIGHTS
    folder = resolve_path("init_from", settings.init_from)
    file = Record(folder).get_weights_file(settings)
    if not (folder / "result.json").is_file() or not file.is_file():
        remedy = "give the folder of one, runs/STUDY/ID" + (", or of an adapter" if settings.method.peft else "")
        raise UserError(f"init_from={folder}: no finished run with {file.name}; {remedy}")
    result = Record(folder).read_result()
    for part, mine in (("method", settings.method.name), ("model", settings.model.name)):
        if result[part] != mine:
            reason = f"trained with {part}={result[part]}, this run has {part}={mine}; take {part}={result[part]}"
            raise UserError(f"init_from={folder}: {reason}")
    start, seed = get_random_start(settings), result["seed"]
    if start and seed != settings.seed:
        what = f"{start} draws the base weights from the seed, {seed} there and {settings.seed} here"
        raise UserError(f"init_from={folder}: {what}; take seed={seed}, or pissa for both")
    Record(folder).verify_files(file.parent.name)
    if settings.method.peft is not None:
        check_adapted_modules(folder, settings)
        check_saved_adapter(file.parent, settings.method.peft, settings)
    return file


def check_adapted_modules(folder: Path, settings: Settings) -> None:
    """Refuse to start from a run that adapted other modules.

    Raises:
        UserError: with the roles of both.
    """
    saved = load_recorded_settings(folder, "init_from")
    theirs, ours = ({run.roles[role] for role in run.model.adapt} for run in (saved, settings))
    adapt, own = (f"[{','.join(run.model.adapt)}]" for run in (saved, settings))
    reason = f"trained with model.adapt={adapt}, this run has {own}; take model.adapt={adapt}"
    require(theirs == ours, f"init_from={folder}: {reason}")


def check_base_weights(settings: Settings) -> None:
    """Refuse an adapter to start from that was trained on other base weights, as far as its run recorded them.

    Raises:
        UserError: with a file of the weights, or that record is damaged.
    """
    if not settings.init_from or settings.method.peft is None:
        return
    folder = find_init_weights(settings).parent.parent
    record = Record(folder)
    if record.holds_result():
        record.verify_files("environment.json")
    known = record.read_environment().get("model_files") or {}
    if not known and settings.model.path:
        warn_unchecked_weights(folder, settings)
    now = hash_model_files(settings) if known else {}
    for name in sorted(known.keys() & now.keys()):
        weights = name.endswith(".safetensors") or name in ("gguf", "commit")
        reason = (
            f"init_from={settings.init_from}: trained on other base weights ({name}) of model={settings.model.name}"
        )
        require(
            known[name] == now[name] or not weights, f"{reason}; give the folder it was trained on as model.path=DIR"
        )
