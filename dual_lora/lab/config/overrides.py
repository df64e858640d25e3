"""Overrides of a command line, KEY=VALUE in Hydra's grammar: checked by name, and a sweep written out as its runs.

Hydra parses each word. The values of a sweep are listed here, because Hydra 1.3 sorts ranges wrongly, lists ranges of
floats with rounding errors, and expands a range of any length without complaint.
"""

import difflib
import itertools
import math
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, get_args, get_origin

from hydra._internal.grammar import grammar_functions
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep, Sweep, Transformer
from hydra.errors import HydraException

import tasks
from dual_lora.lab.config.outside.models import is_model_place
from dual_lora.lab.config.paths import NOT_UTF8, find_choices, is_utf8, list_choices, load_yaml
from dual_lora.lab.config.schema import GROUPS, Settings, find_type
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import UserError, require, suggest_name

# More runs than anybody wants from one command; composing this many takes minutes.
MAX_RUNS = 10_000
# Several groups have a setting such as `lr`. If the group is left out, the first of these is most likely meant.
LIKELY_GROUPS = ("train", "method", "task", "model", "eval", "hardware", "wandb")
# What transformers' TrainingArguments and PEFT's configurations call a setting of another name here.
HUGGING_FACE_NAMES = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.schedule",
    "output_dir": "study",
    "model_name_or_path": "model",
    "max_seq_length": "task.max_length",
    "target_modules": "model.adapt",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
}
# Types of PEFT that cannot be trained here as intended (model/adapt.py), and why.
UNFIT_METHODS = {
    "adalora": "its ranks follow a schedule that needs a call after every step, which training does not make"
}
# The only Hydra settings a command line may change: how runs are started. The harness decides where they write.
LAUNCHER_KEY = re.compile(r"hydra[/.]launcher(\.|$)")


def iterate_keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every setting's full name, nested ones and their parents."""
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(field.type):
            yield from iterate_keys(field.type, f"{prefix}{field.name}.")


def iterate_open_keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the settings that are dictionaries: below them any key may be given."""
    for field in fields(cls):
        if is_dataclass(field.type):
            yield from iterate_open_keys(field.type, f"{prefix}{field.name}.")
        elif any(getattr(t, "__origin__", t) is dict for t in (field.type, *get_args(field.type))):
            yield prefix + field.name


KNOWN_KEYS, OPEN_KEYS = [*iterate_keys(), *GROUPS], list(iterate_open_keys())


def measure_range(sweep: RangeSweep) -> tuple[int | Fraction, int | Fraction, int]:
    """Return first value, step and number of values of a range, exactly: 0.1 is a tenth.

    Raises:
        ValueError: the step is 0, or a bound is infinite or NaN.
    """
    bounds = (sweep.start, sweep.stop, sweep.step)
    integers = all(isinstance(bound, int) for bound in bounds)
    try:
        start, stop, step = (bound if integers else Fraction(str(bound)) for bound in bounds)
        return start, step, max(0, math.ceil(Fraction(stop - start) / Fraction(step)))
    except ZeroDivisionError as error:
        raise ValueError("its step is 0") from error


def sort_sweep(*args: Any, sweep: Any = None, list: Any = None, reverse: bool = False) -> Any:  # Hydra's names
    """Do what Hydra documents for sort(), also for a range whose bounds are not a whole number of steps apart, and for
    values that were shuffled before.

    Raises:
        TypeError: the values cannot be compared.
    """
    given = args[0] if len(args) == 1 else sweep
    if not isinstance(given, RangeSweep):
        found = grammar_functions.sort(*args, sweep=sweep, list=list, reverse=reverse)
        return replace(found, shuffle=False) if isinstance(found, ChoiceSweep) else found
    first, step, count = measure_range(given)
    low, high = sorted((first, first + (count - 1) * step))
    start, step = (high, -abs(step)) if reverse else (low, abs(step))
    return replace(given, start=start, stop=start + count * step, step=step, shuffle=False)


@cache
def get_parser() -> OverridesParser:
    """Return Hydra's parser with a sort() that does what Hydra documents."""
    functions = create_functions()
    functions.definitions.pop("sort"), functions.functions.pop("sort")
    functions.register(name="sort", func=sort_sweep)
    return OverridesParser(functions)


@cache
def parse_override(word: str) -> Override:
    """Return one word of a command line as Hydra's grammar reads it.

    Raises:
        UserError: it is not of the form KEY=VALUE.
    """
    try:
        require(word.isprintable(), f"{word!r}: contains characters that are not text; remove them")
        require(word.lstrip("+~")[:1] not in ("", "="), f"{word}: not of the form KEY=VALUE")
        return get_parser().parse_override(word)
    # ValueError: a number of 5000 digits; RecursionError: lists within lists; TypeError: sort() of numbers and words
    except (HydraException, ValueError, TypeError, RecursionError) as error:
        remedy = "quote a value of other characters, such as KEY=\"'~/data'\""
        if unknown := re.search(r"Unknown function '(\w+)'", str(error)):
            known = ", ".join(get_parser().functions.functions)
            remedy = f"{unknown[1]}() is not a function here (there are {known}); quote a value that is not a call"
        raise UserError(f"{word[:300]}: not of the form KEY=VALUE; {remedy}") from error


def list_values(override: Override) -> list[str]:
    """Return the values that an override asks for, each as the text after KEY=.

    Raises:
        UserError: they cannot be listed, or there are none or too many.
    """
    key, sweep = override.key_or_group, override._value
    if not override.is_sweep_override():
        return [] if override.is_delete() else [override.get_value_string()]
    where = override.input_line[:300]
    single = "runs need single values; write KEY=VALUE,VALUE or KEY=range(START,STOP,STEP)"
    require(not isinstance(sweep, IntervalSweep), f"{where}: interval() names no values; {single}")
    if isinstance(sweep, Glob):
        require(key in GROUPS, f"{where}: glob() chooses among names of {', '.join(GROUPS)}; write KEY=VALUE,VALUE")
        values = sweep.filter(list_choices(key))
        require(bool(values), f"{where}: matches no {key}; known: {', '.join(list_choices(key))}")
        return values
    if isinstance(sweep, RangeSweep):
        values = list_range(sweep, where)
    else:
        require(bool(sweep.list), f"{where}: gives no runs; give at least one value")
        mixed = any(isinstance(value, Sweep) for value in sweep.list)
        require(not mixed, f"{where}: a range, choice or sort cannot be one of several values; write the values out")
        values = list_choice(sweep, override.input_line.partition("=")[2])
    if sweep.shuffle:
        random.shuffle(values)  # as Hydra does, which seeds nothing: each command has an order of its own
    return values


def list_choice(sweep: ChoiceSweep, text: str) -> list[str]:
    """Return the values of a choice as they are written, so that study=1.10,1.20 is not study=1.1,1.2. Where the text
    after KEY= holds a call, a list or quotes, they are as Hydra writes them."""
    written = [value.strip() for value in text.split(",")]
    is_plain = len(written) == len(sweep.list) and not set(text) & set("([{'\"")
    return written if is_plain else [Transformer.str(value) for value in sweep.list]


def list_range(sweep: RangeSweep, where: str) -> list[str]:
    """Return the values of a range as text; `where` is the word that holds it.

    Raises:
        UserError: there are none, too many, or the range has no end.
    """
    try:
        first, step, count = measure_range(sweep)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}; write KEY=range(START,STOP,STEP) with finite numbers") from error
    require(count > 0, f"{where}: an empty range gives no runs; its second number is not part of it")
    check_number_of_runs(count, where)
    kind = int if isinstance(first, int) and isinstance(step, int) else float
    return [str(kind(first + number * step)) for number in range(count)]


def check_number_of_runs(count: int, where: str) -> None:
    """Refuse more runs than one command can want.

    Raises:
        UserError: with how many are asked for.
    """
    require(count <= MAX_RUNS, f"{where[:300]}: asks for {count:,} runs, at most {MAX_RUNS:,} at once; ask for fewer")


def check_override(override: Override) -> None:
    """Refuse an override of an unknown group, choice or key, naming the nearest known one.

    Raises:
        UserError: what is wrong, and the remedy.
    """
    key = override.key_or_group
    check_text(override.input_line, key)
    require(override.package is None, f"{key}@{override.package}: settings have no packages; write {key}=VALUE")
    require(not override.is_delete(), f"~{key}: settings cannot be removed")
    require(key != "experiment", "experiment: experiments are run by sweep.py: python sweep.py experiment=NAME")
    chooses = key in GROUPS or key == "hydra/launcher"
    if key.split("/")[0].split(".")[0] == "hydra":
        require(LAUNCHER_KEY.match(key), f"{key}: only hydra/launcher may be set of Hydra's own settings; drop it")
        require(not override.is_sweep_override(), f"{key}: one value for all runs")
    elif not chooses and key not in KNOWN_KEYS and not any(key.startswith(parent + ".") for parent in OPEN_KEYS):
        raise UserError(f"{key}: no such setting.{suggest_setting(key)}")  # the suggestion reads every task's file
    added = override.is_add() and (chooses or key in KNOWN_KEYS)
    require(not added, f"+{key}: already exists; write {key}=VALUE without the +")
    require(not override.is_force_add() or not chooses, f"++{key}: a choice; write {key}=NAME without the ++")
    if get_origin(find_type(key)) is list:
        check_list(override)
    for value in list_values(override) if key in GROUPS else ():
        check_group_choice(key, str(parse_override(f"{key}={value}").value()))


def check_list(override: Override) -> None:
    """Refuse single values for a setting that is a list: several would ask for several runs.

    Raises:
        UserError: with the list that was most likely meant.
    """
    key, values = override.key_or_group, list_values(override)
    gives_list = any(value == "null" or value.startswith(("[", "{", "$")) for value in values)
    shown = ",".join(values)
    require(gives_list, f"{key}={shown}: must be a list; write {key}=[{shown}]")


def check_group_choice(group: str, name: str) -> None:
    """Refuse a model, task, method or hardware that is not in conf/.

    Raises:
        UserError: with the nearest name, and all.
    """
    known = list_choices(group)
    if name in known:
        return
    if group == "method" and name in UNFIT_METHODS:
        raise UserError(f"method={name}: not offered, because {UNFIT_METHODS[name]}. Known: {', '.join(known)}")
    if group == "task" and name.partition("/")[0] in tasks.plugins:
        file = tasks.plugins[name.partition("/")[0]].path
        raise UserError(
            f"task={name}: {file} needs its settings, task/{name}.yaml in a folder given by --config-dir DIR"
        )
    full = {choice.rpartition("/")[2]: choice for choice in known} | {choice: choice for choice in known}
    near = difflib.get_close_matches(name, full, n=1, cutoff=0.75)  # bert-base-uncased is not a typo of roberta-base
    hint = f" Did you mean {full[near[0]]}?" if near else ""
    outside = group == "model" and is_model_place(name)
    others = " Any other is model=ORG/NAME, of the hub, or model=DIR." if group == "model" else ""
    require(outside, f"{group}={name}: no such {group}.{hint}{others} Known: {', '.join(known)}")


def suggest_setting(key: str) -> str:
    """Return " Did you mean X?" for the setting that an unknown key most likely means: a key without its group (`lr`),
    with the wrong group, under its Hugging Face name, or misspelt."""
    name = key.rpartition(".")[2]
    parts = [f"{group}.{name}" for group in LIKELY_GROUPS if f"{group}.{name}" in KNOWN_KEYS]
    parts += [HUGGING_FACE_NAMES[name]] if name in HUGGING_FACE_NAMES else []
    parts += [] if parts else [known for known in list_option_keys() if known.endswith(f".{name}")]
    return f" Did you mean {parts[0]}?" if parts else suggest_name(key, KNOWN_KEYS)


def list_option_keys() -> list[str]:
    """Return the full names of all tasks' options and all methods' PEFT fields."""
    places = (("task", "options"), ("method", "peft"))
    files = [
        (f"{group}.{part}", load_yaml(path).get(part))
        for group, part in places
        for path in find_choices(group).values()
    ]
    return list(dict.fromkeys(f"{parent}.{name}" for parent, own in files for name in own or ()))


def check_text(text: str, key: str) -> None:
    """Refuse what is not a value: code to run, or text to be filled in from elsewhere than the settings.

    Raises:
        UserError: what is wrong, and the remedy.
    """
    require(
        redact_secrets(text) == text,
        f"{key}: contains a key or password from the environment, which the record would keep; remove it",
    )
    require(not re.search(r"(?<!\w)_target_(?!\w)", text), f"{key}: _target_ names code to run; settings are values")
    strange = re.sub(r"\$\{[\w.]+\}", "", text)
    require("${" not in strange, f"{key}: ${{...}} may name only other settings, such as ${{method.lr}}")


def iterate_given_keys(key: str, value: object) -> Iterator[str]:
    """Yield the full names that an override sets: train={lr:1} sets train and train.lr."""
    yield key
    for name, part in value.items() if isinstance(value, dict) else ():
        yield from iterate_given_keys(f"{key}.{name}", part)


def check_repeats(words: list[str], where: str = "") -> None:
    """Refuse words that set one key twice: which value is meant would be a guess. where: begins the message.

    Raises:
        UserError: with the key.
    """
    seen: set[str] = set()
    for override in map(parse_override, words):
        names = list(iterate_given_keys(override.key_or_group, override.value()))
        if repeated := next((name for name in names if name in seen), None):
            several = "" if LAUNCHER_KEY.match(repeated) else f", or write {repeated}=VALUE,VALUE for a run of each"
            raise UserError(f"{where}{repeated}: given twice; drop one{several}")
        seen.update(names)


def parse_overrides(words: list[str]) -> list[list[str]]:
    """Return the overrides of every run that a command line (with sweeps) asks for, names checked. The values of the
    last sweep change first.

    Raises:
        UserError: a word is wrong, a key is given twice, or too many runs are asked for.
    """
    check_repeats(words)
    choices = []
    for word in words:
        override = parse_override(word)
        check_override(override)
        # ++KEY of a setting that is there means KEY, and must find it when words of one key are compared
        known = override.is_force_add() and override.key_or_group in KNOWN_KEYS
        key = override.key_or_group if known else override.get_key_element()
        choices.append([f"{key}={value}" for value in list_values(override)])
    check_number_of_runs(math.prod(map(len, choices)), " ".join(words))
    return [list(run) for run in itertools.product(*choices)]


def split_words(argv: list[str], known: Collection[str], program: str, first: str) -> dict[str, str]:
    """Return what the words KEY=VALUE of a command line set, values without quotes.

    known: the names that may be set; first: the one that a word without "KEY=" most likely belongs to.

    Raises:
        UserError: a word of another form, an unknown name, one that is set twice, or an empty value.
    """
    given: dict[str, str] = {}
    for word in argv:
        key, equals, _ = word.partition("=")
        require(is_utf8(word), f"{word[:300]}: {NOT_UTF8}; give another value")
        require(equals, f"{word[:300]}: not of the form KEY=VALUE; write {first}={word[:300]}")
        require(key in known, f"{key}: no such setting of {program}.{suggest_name(key, known)}")
        require(key not in given, f"{key}: given twice; drop one")
        given[key] = unquote(word)
        require(given[key], f"{key}=: needs a value")
    return given


def parse_switch(key: str, value: str) -> bool:
    """Return whether a switch is on, written as Hydra's grammar allows.

    Raises:
        UserError: it is neither true nor false.
    """
    require(value.lower() in ("true", "false"), f"{key}={value}: must be true or false")
    return value.lower() == "true"


def unquote(word: str) -> str:
    """Return the value of KEY=VALUE without the quotes that Hydra's grammar needs around some paths, so that eval.py
    and sweep.py accept what train.py accepts."""
    value = word.partition("=")[2]
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return value
    try:
        return str(parse_override(f"value={value}").value())
    except UserError:
        return value
