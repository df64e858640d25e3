"""From a command line to typed settings, with one clear line for every mistake, before torch is imported."""

import atexit
import copy
import gc
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, UnsupportedInterpolationType
from yaml import MarkedYAMLError, YAMLError

from dual_lora.lab import faults, processes, runs
from dual_lora.lab.runs import ROOT, Record, check_writable, model_facts, task_of, without_secrets
from dual_lora.lab.settings import Settings, UserError, first_line, nearest, place, require
from dual_lora.lab.stopping import STOP, Stopped

CONF = ROOT / "conf"
GROUPS = ("model", "task", "method", "hardware")
# Done; a run failed; something for the user to mend; stopped on request, the same command goes on; done elsewhere.
EXIT_OK, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_ELSEWHERE = 0, 1, 2, 3, 4
# What Hydra is asked to show, and the words that say which; it has options that read files of code, too.
HYDRA_FLAGS = {"--help", "-h", "--hydra-help", "--version", "--info", "-i", "--cfg", "-c", "--resolve"}
HYDRA_WORDS = {"job", "hydra", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
MULTIRUN = {"-m", "--multirun"}
# What a command line may say to Hydra itself: how jobs are started. Where they write is the harness's to say.
HYDRA_KEYS = re.compile(r"hydra(/|\.)(launcher|sweeper)(\.(?!params)|$)")
# A record holds every setting, so none may come from the environment, where keys and passwords are.
OmegaConf.clear_resolver("oc.env")


@contextmanager
def heavy() -> Iterator[None]:
    """Import what imports torch, transformers and PEFT: half a million objects that all stay. Searches for garbage
    among them would take a fifth of the time that importing does, and later half a second after each run and plan."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton counts what is left


def schema(cls: type) -> type:
    """Return a dataclass like `cls` that is not frozen: OmegaConf merges values into nothing frozen."""
    return make_dataclass(
        cls.__name__, [(f.name, schema(f.type) if is_dataclass(f.type) else f.type) for f in fields(cls)]
    )


def typed(cls: type, values: dict) -> object:
    """Return the frozen dataclass `cls` from plain values of the right types."""
    return cls(
        **{f.name: typed(f.type, values[f.name]) if is_dataclass(f.type) else values[f.name] for f in fields(cls)}
    )


SCHEMA = schema(Settings)
ConfigStore.instance().store(name="schema", node=SCHEMA)


def choices(group: str) -> list[str]:
    """Return the choices of a config group, e.g. "glue/rte" of "task"."""
    return sorted(p.relative_to(CONF / group).with_suffix("").as_posix() for p in (CONF / group).rglob("*.yaml"))


def keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every setting's full name, nested ones and their parents."""
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")


def open_keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the settings that are dictionaries: below them any key may be given."""
    for field in fields(cls):
        if is_dataclass(field.type):
            yield from open_keys(field.type, f"{prefix}{field.name}.")
        elif any(getattr(t, "__origin__", t) is dict for t in (field.type, *get_args(field.type))):
            yield prefix + field.name


KNOWN, OPEN = [*keys(), *GROUPS], list(open_keys())


def check_names(override: Override) -> None:
    """Refuse an override of an unknown group, choice or key, naming the nearest known one."""
    key = override.key_or_group
    check_text(override.input_line, key)
    require(not override.is_delete(), f"~{key}: settings cannot be removed")
    require(key != "experiment", "experiment: experiments are run by sweep.py: python sweep.py experiment=NAME")
    if key in GROUPS:
        values = [override.value()] if not override.is_sweep_override() else list(override.sweep_string_iterator())
        for value in values:
            hint = nearest(str(value), choices(key))
            require(str(value) in choices(key), f"{key}={value}: no such {key}.{hint} Known: {', '.join(choices(key))}")
    elif re.match(r"hydra(/|\.|$)", key):
        require(HYDRA_KEYS.match(key), f"{key}: of Hydra's own only hydra/launcher and hydra/sweeper may be set")
        require(not override.is_sweep_override(), f"{key}: one value for all runs")
    else:
        opened = any(key.startswith(parent + ".") for parent in OPEN)
        require(opened or key in KNOWN, f"{key}: no such setting.{'' if opened else nearest(key, KNOWN)}")
    added = override.is_add() and key in [*KNOWN, "hydra/launcher"]
    require(not added, f"+{key}: is there already; write {key}=VALUE without the +")


def check_text(text: str, key: str) -> None:
    """Refuse what is no value: code to run, or text to be filled in from elsewhere than the settings."""
    require(
        without_secrets(text) == text, f"{key}: holds a key or password of the environment, which a record would keep"
    )
    require(not re.search(r"(?<!\w)_target_(?!\w)", text), f"{key}: _target_ names code to run; settings are values")
    strange = re.sub(r"\$\{[\w.]+\}", "", text)
    require("${" not in strange, f"{key}: of ${{...}} only other settings, such as ${{method.lr}}")


def parse_one(override: str) -> Override:
    try:
        require(override.isprintable(), f"{override!r}: holds characters that are no text")
        require(override.lstrip("+~")[:1] not in ("", "="), f"{override}: not of the form KEY=VALUE")
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:  # of a number of 5000 digits, of lists without end
        mend = "quote a value of other characters, such as KEY=\"'~/data'\""
        raise UserError(f"{override[:300]}: not of the form KEY=VALUE; {mend}") from error


def parse(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every job that a command line (with sweeps) asks for, names checked."""
    parsed = [parse_one(override) for override in overrides]
    for override in parsed:
        check_names(override)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def settings(config: DictConfig, overrides: list[str] = ()) -> Settings:
    """Return typed settings from a composed config.

    Raises:
        UserError: a value is missing, of the wrong type or impossible.
    """
    method = config.method
    if method.r1 is not None and method.r2 is not None:
        total = method.r1 + method.r2
        require(min(method.r1, method.r2) > 0, f"method.r1={method.r1} and method.r2={method.r2}: must be positive")
        named = any(o.startswith("method.rank=") for o in overrides)
        require(
            not named or method.rank == total, f"method.rank={method.rank}: method.r1 + method.r2 is {total}; drop one"
        )
        method.rank, method.magnitude_ratio = total, method.r1 / total
    try:
        config = OmegaConf.masked_copy(config, [f.name for f in fields(Settings)])
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    result = typed(Settings, values)
    check_pair(result)
    return result


def check_pair(settings: Settings) -> None:
    """Refuse a task the model cannot do, and a protocol that the task's form does not have."""
    task, form = settings.task, task_of(settings).form
    smooths = form == "regression" and task.label_smoothing
    require(not smooths, f"task.label_smoothing={task.label_smoothing}: {task.name} has no classes to smooth over")
    writes = form == "generation"
    able = writes or settings.hardware.sharding != "full"
    require(able, f"hardware.sharding=full: not for {task.name}, whose head trains; take hardware.sharding=replicas")
    require(not writes or task.max_new_tokens, f"task.max_new_tokens=0: {task.name} needs at least one token to write")
    require(writes or not settings.model.chat, f"model.chat=true: {task.name} has no prompts; take model.chat=false")
    if settings.model.generates or not writes:
        return
    able = [m for m in choices("model") if OmegaConf.load(CONF / "model" / f"{m}.yaml").get("generates")]
    raise UserError(
        f"task={settings.task.name}: {settings.model.name} writes no text; take a model that does: {', '.join(able)}"
    )


def one_line(error: Exception) -> str:
    """Return an OmegaConf or Hydra error as one line with the setting's full name in front."""
    cause = error
    while isinstance(cause, HydraException) and cause.__cause__:
        cause = cause.__cause__
    text, key = first_line(cause), getattr(cause, "full_key", None)
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
        return f"{cause.problem_mark.name}: line {cause.problem_mark.line + 1}: {cause.problem}; mend the file"
    if isinstance(cause, UnsupportedInterpolationType):
        return f"{key}: {text}; write the value itself"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and "." not in str(key):
        return f"{key}: no such setting"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key}: not among the {key.partition('.')[0]}'s; write +{key}=VALUE to add it"
    return f"{key}: {text}" if key else text


@cache
def composed(conf: Path, choices: tuple[str, ...]) -> DictConfig:
    """Compose files of `conf`, once: that takes Hydra half a second, and a study's many runs choose few of them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=list(choices))


def load(overrides: list[str]) -> Settings:
    """Compose and check one job's settings from its overrides."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        chosen = [o for o in parsed if o.key_or_group in GROUPS or o.is_hydra_override()]
        config = copy.deepcopy(composed(CONF, tuple(o.input_line for o in chosen)))
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in chosen], config)
    except Exception as error:  # Hydra and OmegaConf raise a dozen kinds over what they are told
        raise UserError(one_line(error)) from error
    try:
        return settings(config, overrides)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def check(argv: list[str]) -> list[Settings]:
    """Return the settings of every job a command line asks for; nothing heavy is loaded.

    Raises:
        UserError: a name, a value or a file is wrong.
    """
    for flag in (a for a in argv if a.startswith("-")):
        require(flag in MULTIRUN, f"{flag}: no such option; settings are KEY=VALUE, -m runs several, --help shows all")
    from dual_lora.lab import launching

    jobs = parse([a for a in argv if not a.startswith("-")])
    launching.check(argv)
    many = bool(MULTIRUN & set(argv))
    require(many or len(jobs) == 1, f"{len(jobs)} runs asked for: add -m to run them all")
    found = [load(job) for job in jobs]
    for settings in found:
        if not settings.plan:
            processes.check(settings)
            settings.hardware.check_installed()
        record = Record.of(settings)  # reads what names the run: data and weights must be there
        if not settings.force:
            record.result()
    return found


def asks_hydra(argv: list[str]) -> bool:
    """Return whether Hydra is to show something rather than to run anything.

    Raises:
        UserError: it is to do more than that, or to show settings that are wrong.
    """
    flags = {a.partition("=")[0] for a in argv if a.startswith("-")}
    if not flags & HYDRA_FLAGS:
        return False
    for flag in flags - MULTIRUN:
        require(flag in HYDRA_FLAGS, f"{flag}: no such option; of Hydra's own {', '.join(sorted(HYDRA_FLAGS))}")
    for job in parse([a for a in argv if not a.startswith("-") and a not in HYDRA_WORDS]):
        load(job)
    return True


# Why runs of this process did not finish, by their folders: a full disk takes no failure.json.
unfinished: dict[Path, dict[str, str]] = {}
KILLED = {"error": "Killed", "message": "ended without a result; the same command tries again"}


def reason(error: BaseException) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def attempt(settings: Settings) -> dict[str, str] | None:
    """Do one job; whatever goes wrong is returned and kept for `conclude`, so that other jobs go on. A stop ends all of
    them, and so does an error in one of several processes."""
    with heavy():
        from dual_lora.lab import lock, training

    try:
        training.run(settings)
        return None
    except (Exception, SystemExit) as caught:
        error = caught
    processes.after_the_first()
    if isinstance(error, lock.Elsewhere):
        print(f"done elsewhere: {Record.of(settings).shown()}: {error}", file=sys.stderr)
    elif not isinstance(error, UserError):
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    unfinished[Record.of(settings).folder] = reason(error)
    if processes.several():  # the others may wait for this one, and would wait in its next run
        sys.exit(conclude([settings]))
    return reason(error)


def conclude(jobs: list[Settings]) -> int:
    """Print every job that did not finish, with the reason, and return the exit code."""
    failures = [(Record.of(settings), failure) for settings in jobs if (failure := why_unfinished(settings))]
    known = {"UserError": EXIT_USER, "Elsewhere": EXIT_ELSEWHERE, "Stopped": EXIT_STOPPED}
    for record, failure in failures:
        error, message = failure["error"], first_line(failure["message"])
        if error == "Elsewhere":
            line = f"done elsewhere: {record.shown()}" if len(jobs) > 1 else ""  # of one alone `attempt` has said it
        elif error == "Stopped":
            line = f"stopped: {record.shown()}: by {message}; the same command goes on"
        else:
            line = f"failed: {record.shown()}: {message if error == UserError.__name__ else f'{error}: {message}'}"
        if line:
            print(without_secrets(line), file=sys.stderr)
    if len(jobs) > 1:
        print(f"{len(jobs) - len(failures)} of {len(jobs)} runs finished", file=sys.stderr)
    return min((known.get(failure["error"], EXIT_FAILED) for _, failure in failures), default=EXIT_OK)


def why_unfinished(settings: Settings) -> dict[str, str] | None:
    """Return why a job that was tried has no result; None if it has one."""
    record = Record.of(settings)
    failure = unfinished.pop(record.folder, None) or record.tried(settings).failure()
    if (failure is None or failure["error"] == "Elsewhere") and record.result():
        return None
    return failure or KILLED


def train(run: Callable[[], None]) -> int:
    """Check the command line, let Hydra or a launcher run its jobs, say what failed."""
    from dual_lora.lab import launching

    argv = sys.argv[1:]
    jobs = [] if asks_hydra(argv) else check(argv)
    if any(settings.plan for settings in jobs):
        return draw_plans(jobs)
    launcher = launching.chosen(argv)
    if jobs and launching.elsewhere(launcher):
        launching.launch(jobs, launcher)
    else:
        run()
    return conclude(jobs)


def draw_plans(jobs: list[Settings]) -> int:
    """Plan every job, and say in the end which do not fit.

    Raises:
        UserError: what one refused plan, or several, would need.
    """
    with heavy():
        from dual_lora.lab import plan

    require(all(settings.plan for settings in jobs), "plan: true for all runs or for none")
    refused = []
    for settings in jobs:
        try:
            plan.run(settings)
        except UserError as error:
            refused.append(str(error))
    require(not refused, "\n".join(refused))
    return EXIT_OK


# What runs from before a setting was added did.
ADDED = {
    "init_from": None,
    "plan": False,
    "model": {"architecture": {}, "chat": False},
    "task": {"stop": [], "train_rows": None},
    "train": {"save_minutes": None, "group_by_length": None, "loss_scale": None},
    "eval": {"holdout": None},
    "wandb": {"job_type": "train", "tags": []},
    "hardware": {"name": "single", "accelerator": "a100-80gb", "devices": 1, "sharding": "none", "base": None},
}


def recorded(run: Path, key: str = "run") -> Settings:
    """Return the settings a run's record holds. key: what the command line calls that run.

    Raises:
        UserError: there is no record, or one that today's settings cannot hold.
    """
    path = run / "config.yaml"
    require(path.is_file(), f"{key}={run}: no config.yaml there; give the folder of a run, runs/STUDY/ID")
    try:
        stored = OmegaConf.load(path)
        check_text(str(OmegaConf.to_container(stored)), "its values")
        return settings(OmegaConf.merge(OmegaConf.structured(SCHEMA), ADDED, stored))
    except (UserError, OmegaConfBaseException, OSError, YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a run's settings as this version knows them ({one_line(error)})") from error


PLACES = {"run", "data_dir", "model.path", "export", "against"}


def read_again(argv: list[str], **more: type) -> tuple[Path, dict[str, str | int]]:
    """Return the run a command line names and what else it sets: where files are now, rows at a time, and `more`.

    Raises:
        UserError: another setting, an impossible value, or no run.
    """
    known = {"run": str, "data_dir": str, "model.path": str, "eval.batch_size": int, **more}
    given = dict(a.partition("=")[::2] for a in argv)
    for key, value in given.items():
        require(key in known, f"{key}: no such setting of {Path(sys.argv[0]).name}.{nearest(key, list(known))}")
        require(value, f"{key}=: needs a value")
        whole = known[key] is str or (value.isdecimal() and len(value) < 10 and int(value) > 0)
        require(whole, f"{key}={value[:80]}: must be a whole number above 0")
        given[key] = known[key](value)
    for key in PLACES & given.keys():
        given[key] = str(place(key, given[key]))
    require("run" in given, "run=runs/STUDY/ID is needed: which run?")
    return Path(given.pop("run")), given


def changed(settings: Settings, values: dict[str, str | int]) -> Settings:
    """Return the settings with other values, by their full names."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        part = replace(getattr(settings, group), **{name: value}) if group else value
        settings = replace(settings, **{group or name: part})
    return settings


def evaluate_again(argv: list[str]) -> int:
    """Evaluate the finished run that `argv` names and print its scores beside the recorded ones, or export or analyse
    it."""
    run, values = read_again(argv, **{"export": str, "model.dtype": str, "analyse": str, "against": str})
    folder, dtype = values.pop("export", None), values.pop("model.dtype", None)
    analyse, against = values.pop("analyse", "false"), values.pop("against", None)
    require(folder or not dtype, "model.dtype: only with export=DIR; a run is evaluated in its own dtype")
    require(analyse in ("true", "false"), f"analyse={analyse}: must be true or false")
    require(analyse == "true" or not against, "against: only with analyse=true")
    require(analyse == "false" or not folder, "analyse=true and export=DIR: one at a time")
    settings = changed(recorded(run), values)
    settings.hardware.check_installed()
    record = Record(run.resolve())
    if folder:
        return export_run(settings, record, Path(folder), dtype or settings.model.dtype)
    if analyse == "true":
        return analyse_run(settings, record, Path(against) if against else None, values)
    with heavy():
        from dual_lora.lab import reevaluation

    return reevaluation.run(settings, record)


def analyse_run(settings: Settings, record: Record, against: Path | None, values: dict[str, str | int]) -> int:
    """Check that a run, and the one it is compared to, can be analysed, and do it."""
    require(record.result() is not None, f"run={record.shown()}: not finished, it has no result.json")
    other = None
    if against:
        other = changed(recorded(against, "against"), values), Record(against.resolve())
        require(other[1].result() is not None, f"against={against}: not finished, it has no result.json")
        require(
            other[0].model.name == settings.model.name and model_facts(other[0]) == model_facts(settings),
            f"against={against}: its model is {other[0].model.name}, this run's is {settings.model.name}; "
            "only changes of the same weights compare",
        )
    with heavy():
        from dual_lora.lab import analysing

    print(analysing.run(settings, record, other))
    return EXIT_OK


def export_run(settings: Settings, record: Record, folder: Path, dtype: str) -> int:
    """Check where a run is to be exported to, and export it."""
    replace(settings.model, dtype=dtype)  # checks its name
    require(record.result() is not None, f"run={record.shown()}: not finished, it has no result.json")
    require(not folder.exists() or folder.is_dir(), f"export={folder}: a file; give a new folder")
    require(not folder.exists() or not any(folder.iterdir()), f"export={folder}: not empty; give a new folder")
    check_writable(folder, "give another folder as export=DIR")
    with heavy():
        from dual_lora.lab import export

    print(export.write(settings, record, folder, dtype))
    return EXIT_OK


def ended(error: Exception) -> tuple[int, str]:
    """Return the exit code and the line for what ended the work. What is neither the user's nor the machine's fault is
    the program's: its traceback is printed before."""
    if isinstance(error, UserError):
        return EXIT_USER, str(error)
    if said := faults.line(error):
        return EXIT_USER, said
    print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    return EXIT_FAILED, f"{type(error).__name__}: {first_line(error)}; a fault of the program, not of the settings"


def guard(do: Callable[..., int], *args: object) -> None:
    """Exit with what `do` returns; whatever else ends it becomes one line, a stop somebody asked for included."""
    name = Path(sys.argv[0]).name
    silence = nullcontext() if processes.first() else redirect_stdout(io.StringIO())
    try:
        with STOP.heard(), silence:
            place("DUAL_LORA_RUNS", str(runs.RUNS))
            try:
                sys.exit(do(*args))
            except Exception:
                processes.after_the_first()
                raise
    except Exception as error:
        code, message = ended(error)
        print(f"{name}: {without_secrets(message)}", file=sys.stderr)
        sys.exit(code)
    except Stopped as stopped:
        if processes.first():
            print(f"{name}: stopped by {stopped}; the same command {stopped.then}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
