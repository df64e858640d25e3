"""`eval.py`: evaluate a finished run again, export it, or analyse or save what it did to the weights."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from dual_lora.lab.config.outside.plugins import check_plugins
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.config.overrides import parse_switch, split_words
from dual_lora.lab.config.paths import check_writable, resolve_path
from dual_lora.lab.config.recorded import load_recorded_settings, replace_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import check_data_dir
from dual_lora.lab.errors import EXIT_OK, require
from dual_lora.lab.inputs.model_files import identify_weights
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.libraries import import_heavy_libraries

PATH_KEYS = {"run", "data_dir", "model.path", "export", "against", "save_updates"}
RUN_WORDS = {"run": str, "data_dir": str, "model.path": str, "eval.batch_size": int}
OWN_WORDS = ("export", "model.dtype", "push_to_hub", "analyse", "against", "save_updates")


def parse_run_words(argv: list[str], **more: type) -> tuple[Path, dict[str, str | int]]:
    """Return the run folder that a command line names, and its other settings: data_dir, model.path, eval.batch_size,
    and those in `more` (name: type).

    Raises:
        UserError: another setting, an impossible value, or no run.
    """
    known = {**RUN_WORDS, **more}
    given: dict[str, str | int] = split_words(argv, known, Path(sys.argv[0]).name, first="run")
    for key, value in given.items():
        is_valid = known[key] is str or (value.isdecimal() and len(value) < 10 and int(value) > 0)
        require(is_valid, f"{key}={value[:80]}: must be a whole number above 0")
        given[key] = known[key](value)
    for key in PATH_KEYS & given.keys():
        given[key] = str(resolve_path(key, given[key]))
    require("run" in given, "run=runs/STUDY/ID is needed: which run?")
    return Path(given.pop("run")), given


def evaluate_command(argv: list[str]) -> int:
    """Evaluate the finished run that `argv` names and print its scores next to the recorded ones, or export or analyse
    it, or save its updates; return the exit code.

    Raises:
        UserError: the command line or the run's record is wrong.
    """
    argv = take_outside_words(argv, takes_folder=False)
    run, values = parse_run_words(argv, **dict.fromkeys(OWN_WORDS, str))
    folder, dtype, push = (values.pop(key, None) for key in ("export", "model.dtype", "push_to_hub"))
    updates_file = values.pop("save_updates", None)
    analyse, against = parse_switch("analyse", values.pop("analyse", "false")), values.pop("against", None)
    require(folder or not dtype, "model.dtype: only with export=DIR; a run is evaluated in its own dtype")
    require(folder or not push, "push_to_hub: only with export=DIR, the folder that is pushed")
    require(analyse or not against, "against: only with analyse=true")
    asked = {"analyse=true": analyse, "export=DIR": folder, "save_updates=FILE": updates_file}
    asked_names = [name for name, given in asked.items() if given]
    require(len(asked_names) < 2, f"{' and '.join(asked_names)}: one at a time")
    scores_rows = not asked_names or "eval.batch_size" not in values
    require(scores_rows, f"eval.batch_size: {' '.join(asked_names)} scores no rows; drop it")
    record = Record(run.resolve())
    record.finish_cleanup()
    check_plugins(record.read_environment().get("plugins", {}), f"run={run}")
    settings = replace_settings(load_recorded_settings(run), values)
    if settings.data_dir:
        check_data_dir(settings)
    settings.hardware.check_installed()
    if folder:
        return export_command(settings, record, Path(folder), dtype or settings.model.dtype, push)
    if analyse:
        return analyse_command(settings, record, Path(against) if against else None, values)
    if updates_file:
        return save_updates_command(settings, record, Path(updates_file))
    with import_heavy_libraries():
        from dual_lora.lab.evaluate.trained import reevaluate_run

    return reevaluate_run(settings, record)


def analyse_command(settings: Settings, record: Record, against: Path | None, values: dict[str, str | int]) -> int:
    """Check that a run, and the one it is compared to, can be analysed; analyse it and return the exit code.

    Raises:
        UserError: one is not finished, their models differ, or the run's folder cannot be written.
    """
    record.require_result(f"run={record.format_path()}")
    check_writable(record.folder, "copy the record to another folder")
    other = None
    if against:
        other = replace_settings(load_recorded_settings(against, "against"), values), Record(against.resolve())
        other[1].require_result(f"against={against}")
        require(
            other[0].model.name == settings.model.name and identify_weights(other[0]) == identify_weights(settings),
            f"against={against}: its model is {other[0].model.name}, this run's is {settings.model.name}; "
            "only changes of the same weights compare",
        )
    with import_heavy_libraries():
        from dual_lora.lab.weights.analyse import analyse_run

    print(analyse_run(settings, record, other))
    return EXIT_OK


def save_updates_command(settings: Settings, record: Record, file: Path) -> int:
    """Check where dW of a run is to be written; write it and return the exit code.

    Raises:
        UserError: the run is not finished, or the file exists or cannot be written.
    """
    record.require_result(f"run={record.format_path()}")
    require(file.suffix == ".safetensors", f"save_updates={file}: give a name that ends in .safetensors")
    require(not os.path.lexists(file), f"save_updates={file}: exists; give a new name")
    check_writable(file.parent, "give another file as save_updates=FILE")
    with import_heavy_libraries():
        from dual_lora.lab.weights.save import save_updates

    print(save_updates(settings, record, file))
    return EXIT_OK


def export_command(settings: Settings, record: Record, folder: Path, dtype: str, push: str | None) -> int:
    """Check where a run is to be exported to; export it, push it to the hub's repository `push`, if any, and return the
    exit code.

    Raises:
        UserError: the run is not finished, the folder cannot be written or is not empty, or it cannot be pushed.
    """
    replace(settings.model, dtype=dtype)  # checks its name
    record.require_result(f"run={record.format_path()}")
    require(not folder.exists() or folder.is_dir(), f"export={folder}: a file; give a new folder")
    require(not folder.exists() or not any(folder.iterdir()), f"export={folder}: not empty; give a new folder")
    check_writable(folder, "give another folder as export=DIR")
    if push:
        from dual_lora.lab.evaluate.push import check_push, push_export

        check_push(push)
    with import_heavy_libraries():
        from dual_lora.lab.evaluate.export import export_model

    print(export_model(settings, record, folder, dtype), flush=True)
    if push:
        print(push_export(folder, push))
    return EXIT_OK
