"""Experiments as data: conf/experiment/NAME.yaml, at one of three scales, as the runs a table or figure needs.

    scale=full     the paper's models and protocol
    scale=small    small real models, hours on two CPU cores
    scale=smoke    bundled models, seconds; shows that the harness works and nothing else

A file gives these fields for all scales. Below the name of a scale it may give them again, which replaces them there
(`run` is added to):

    title     heading of the report
    run       overrides that every run shares; those of the scale come after
    seeds     seeds of every cell that names none
    blocks    lists of overrides, each crossed with all cells (such as a task with its published settings)
    cells     a row's label: its overrides, or several lists of them. A value such as 0.5x is this multiple of what run
              or block gives the same setting
    rows      settings whose values head rows, in addition to the label
    columns   a setting whose values head the columns, or `published`: the columns of the published table, or a mapping
              from headings to fields of a run's result
    mean      one of `rows`, over whose values a mean is added
    baselines labels of the rows the others are compared to; they themselves are compared to the first of them. A label
              is a baseline, planned or a floor, or none of these
    planned   labels of the rows whose comparisons with every baseline are the planned family: each gets a verdict, and
              p is corrected for their number. All other comparisons are exploratory
    contrasts planned differences within a row, {plus: [...], minus: [...]}: the mean over the columns of `plus` minus
              that over those of `minus`, for every row but floors that has all of them. They belong to the planned
              family
    margin    the largest difference that counts as equivalent, in points: {task: 1.0, mean: 0.5}, for a task and for a
              mean over tasks
    floors    labels of rows that learn next to nothing, such as an untrained adapter, which every other row
              should beat
    starts    tasks whose runs start from the row's own best run of another task, by its main score over all seeds:
              {glue/rte: glue/mnli}. Its adapter is taken, its head is not; that run is done first
    median    true: the median of three and more runs follows their mean
    published tables of dual_lora/paper to show with ours; the first gives the columns if `columns` is `published`
    tune      how each row's learning rate is chosen: see `Tune`
    limit     what a reader must not conclude from the table, printed above it
    analyse   what is measured of each finished run's weights and is part of the report: `ranks` of the updates,
              `entries` (the same, and layer by layer), `truncation` (scores with each update cut to rank 1, 2, 4, ...),
              `curvature` (of the loss, at the start), `similarity` (to the updates of the row `reference`) or `fit`
              (how well each method's form fits the updates). `truncation`, `similarity` and `fit` average over seeds:
              in addition to the label, only models and tasks may head rows and columns then
    reference label of the row whose updates `analyse: similarity` compares all others with
    records   another experiment, among whose runs these are kept and found; so runs that both have are done once

conf/scale/NAME.yaml gives these fields for every experiment at that scale; an experiment's own come after. An override
of a key replaces those of the lists before; within one list a key appears once.
"""

import functools
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from itertools import combinations
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dual_lora import paper
from dual_lora.lab.config.compatibility import check_model_paths
from dual_lora.lab.config.compose import check_length, describe_config_error, has_type, load_settings
from dual_lora.lab.config.overrides import check_repeats, parse_overrides
from dual_lora.lab.config.paths import find_choices, list_choices, load_yaml
from dual_lora.lab.config.recorded import iterate_setting_names
from dual_lora.lab.config.schema import Settings, get_setting
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, require, suggest_name
from dual_lora.lab.record.identity import serialize_identity_settings

SCALES = ("full", "small", "smoke")
ANALYSES = ("ranks", "entries", "truncation", "curvature", "similarity", "fit")
MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")
AVERAGED = ("truncation", "similarity", "fit")  # analyses whose tables have a line for each label, model and task
LISTS = ("seeds", "rows", "baselines", "planned", "floors", "published")  # fields whose values appear once
CONTRAST_SIDES = ("plus", "minus")
MARGINS = ("task", "mean")
MARGIN_FORM = "positive points for task or mean are needed"
DERIVED_FIELDS = ("name", "scale", "study")  # fields that no file gives


# The label of a cell and its overrides, by key.
Job = tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Tune:
    """How the learning rate is chosen, the same for every label.

    `grid` holds the rates of each label; all labels have equally many. With `relative` they are multiples of the rate a
    run has otherwise. A rate is chosen by its main score on rows that are not reported, a mean over the runs with
    `seeds` (`task_seeds` for single tasks, by their names). These rows are either `holdout` training examples that are
    set apart (refused for a task that scores several sets one by one), or what the task's `options` say is scored.
    `max_steps` is the length of these runs; null: that of the reported ones.
    """

    grid: dict[str, list[float]]
    holdout: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1000])
    task_seeds: dict[str, list[int]] = field(default_factory=dict)
    relative: bool = False
    max_steps: int | None = None

    def describe_rows(self) -> str:
        """Return what rates are chosen on."""
        if self.holdout:
            return f"{self.holdout} training examples set apart"
        return ", ".join(f"task.options.{key}={value}" for key, value in self.options.items())


@dataclass(frozen=True)
class Cell:
    """One run of a table: its row's label, its settings, the trial runs (`tuning`) that choose its learning rate, and
    the cells from whose best run it starts (`sources`)."""

    label: str
    settings: Settings
    tuning: tuple[Settings, ...] = ()
    sources: tuple["Cell", ...] = ()

    @functools.cached_property
    def planned_key(self) -> str:
        """What cells of one planned run share, the same before and after results choose its rate and its start:
        settings, the rates and seeds of its trials, and what it starts from. Sources differ only in their seeds."""
        settings = replace(self.settings, init_from=None) if self.sources else self.settings
        if self.tuning:
            settings = replace(settings, train=replace(settings.train, lr=self.tuning[0].train.lr))
        trials, starts = [(one.train.lr, one.seed) for one in self.tuning], [one.settings.seed for one in self.sources]
        sources = [source.planned_key for source in self.sources[:1]]
        return "\n".join([serialize_identity_settings(settings), str(trials), str(starts), *sources])


@dataclass(frozen=True)
class Experiment:
    """One experiment at one scale; its fields are explained at the head of this module."""

    name: str
    scale: str
    study: str
    title: str
    cells: dict[str, list]
    columns: str | dict[str, str]
    run: list[str]
    seeds: list[int]
    blocks: list[list[str]] = field(default_factory=lambda: [[]])
    rows: list[str] = field(default_factory=list)
    mean: str | None = None
    baselines: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    contrasts: list[dict[str, list]] = field(default_factory=list)
    margin: dict[str, float] = field(default_factory=dict)
    floors: list[str] = field(default_factory=list)
    starts: dict[str, str] = field(default_factory=dict)
    median: bool = False
    published: list[str] = field(default_factory=list)
    tune: Tune | None = None
    limit: str = ""
    analyse: str = ""
    reference: str = ""
    records: str | None = None

    @classmethod
    def load(cls, name: str, scale: str | None = None) -> "Experiment":
        """Return an experiment at a scale, by default the first its file has.

        Raises:
            UserError: there is no such experiment or scale, or its file is wrong.
        """
        return cls.from_content(name, load_experiment_file(name), scale)

    @classmethod
    def from_content(cls, name: str, content: dict[str, Any], scale: str | None = None) -> "Experiment":
        """Return the experiment that the content of a file describes.

        Raises:
            UserError: the scale or a field is missing, a field has the wrong form, or a list sets a key twice.
        """
        where = f"conf/experiment/{name}.yaml"
        scale, study = choose_scale(name, content, scale)
        common, own = {k: v for k, v in content.items() if k not in SCALES}, content[scale] or {}
        shared = OmegaConf.to_container(load_yaml(find_choices("scale")[scale]))
        for part, file in ((common, where), (own, where), (shared, f"conf/scale/{scale}.yaml")):
            check_fields(cls, part, file)
        for part in (shared, common, own):
            check_repeats(part.get("run", []), f"{where}, scale={scale}: run: ")
        run = [*shared.get("run", []), *common.get("run", []), *own.get("run", [])]
        values = shared | common | own | {"run": run}
        missing = [f.name for f in fields(cls) if f.name not in (*DERIVED_FIELDS, *values) and is_required(f)]
        require(not missing, f"{where}: {', '.join(missing)}: missing")
        if values.get("tune"):
            check_fields(Tune, values["tune"], f"{where}: tune")
            require("grid" in values["tune"], f"{where}: tune.grid: missing")
            values["tune"] = Tune(**values["tune"])
        return cls(name, scale, study, **values)

    def __post_init__(self) -> None:
        where = f"conf/experiment/{self.name}.yaml"
        for name in LISTS:
            check_distinct(getattr(self, name), f"{where}: {name}")
        require(bool(self.seeds), f"{where}: seeds: none given; at least one is needed")
        rows = ", ".join(self.rows) or "none"
        require(self.mean in (None, *self.rows), f"{where}: mean: {self.mean}: not one of rows, which are {rows}")
        for label, override_lists in self.cells.items():
            require(bool(override_lists), f"{where}: cells: {label}: no overrides")
            for overrides in list_alternatives(override_lists):
                check_repeats(overrides, f"{where}: cells: {label}: ")
        for block in self.blocks:
            check_repeats(block, f"{where}: blocks: ")
        for label in (*self.baselines, *self.planned, *self.floors, *(self.tune.grid if self.tune else ())):
            require(label in self.cells, f"{where}: {label}: no such cell; its cells are {', '.join(self.cells)}")
        for one, other in combinations(("planned", "baselines", "floors"), 2):
            for label in getattr(self, one):
                both = label in getattr(self, other)
                require(not both, f"{where}: {label}: both in {one} and in {other}; give it in one of them")
        require(bool(self.baselines) or not self.planned, f"{where}: planned: nothing to compare with; give baselines")
        for contrast in self.contrasts:
            check_contrast(contrast, self.columns, where)
        sides = [{side: sorted(map(str, contrast[side])) for side in CONTRAST_SIDES} for contrast in self.contrasts]
        check_distinct(sides, f"{where}: contrasts")
        heads = self.list_heading_settings()
        for chosen, by in (("train.lr", self.tune), ("init_from", self.starts)):
            said = f"{where}: {chosen}: results choose it, so it cannot head rows or columns"
            require(not by or chosen not in heads, f"{said}; drop it there")
        require(self.analyse in ("", *ANALYSES), f"{where}: analyse: {self.analyse}: not one of {', '.join(ANALYSES)}")
        apart = [key for key in heads if key not in ("model.name", "task.name")]
        require(
            self.analyse not in AVERAGED or not apart,
            f"{where}: analyse: {self.analyse} would average over values of {', '.join(apart)} as over seeds; give "
            "each value a cell with a label of its own, and head rows and columns by model.name and task.name",
        )
        compares = self.analyse == "similarity"
        has_right_reference = self.reference in self.cells if compares else not self.reference
        require(
            has_right_reference,
            f"{where}: reference: {self.reference}: the label of a cell, only with analyse: similarity",
        )
        for kind, points in self.margin.items():
            require(kind in MARGINS and points > 0, f"{where}: margin.{kind}: {points}: {MARGIN_FORM}")
        for table in self.published:
            require(table in paper.list_tables(), f"{where}: {table}: no such table of dual_lora/paper")
        if self.tune:
            check_tune(self.tune, f"{where}: tune")

    def compose_cells(self, extra: list[str]) -> list[Cell]:
        """Return every cell, composed and checked.

        `extra` overrides come last, and a seed among them replaces the seeds. Where an extra override names a model,
        task, method, or value of a row's or column's heading that the experiment has itself, it chooses those runs and
        changes nothing in them.

        Raises:
            UserError: one of them is wrong, or different runs would have one place in the table.
        """
        return self.compose_jobs(self.list_jobs(extra), extra)

    def compose_jobs(self, jobs: list[Job], extra: list[str]) -> list[Cell]:
        """Return the cells of the jobs that `list_jobs` gives, as `compose_cells`.

        Raises:
            UserError: as `compose_cells`.
        """
        places = {"model", "task", "method"} | {key.removesuffix(".name") for key in self.list_heading_settings()}
        has = {key: {job[key] for _, job in jobs if key in job} for key in places}
        self.check_contrasts([(label, job.get(str(self.columns))) for label, job in jobs])
        found: list[Cell] = []
        for more in (dict(map(split_override, words)) for words in parse_overrides(extra)):
            chosen = {key: value for key, value in more.items() if value in has.get(key, ())}
            rest = {key: value for key, value in more.items() if key not in chosen}
            rows = ", ".join(sorted(has["method"]))
            require("method" not in rest, f"experiment={self.name} method={rest.get('method')}: its rows have {rows}")
            for label, job in jobs:
                if all(job.get(key, value) == value for key, value in chosen.items()):
                    self.check_replaced(label, job | rest, rest)
                    settings = load_settings(list(map("=".join, (job | rest).items())))
                    check_length(settings, list(map("=".join, rest.items())))
                    found += [
                        cell
                        for cell in self.create_seeded_cells(label, settings, "seed" in job | rest)
                        if cell not in found
                    ]
        require(bool(found), f"experiment={self.name}: no cell of it has {' '.join(extra)}; drop one of these")
        self.check_task_seeds({job.get("task") for _, job in jobs} | {cell.settings.task.name for cell in found})
        self.check_places(found, extra)
        check_model_paths(cell.settings for cell in found)
        return self.add_sources(found, jobs, extra) if self.starts else found

    def check_replaced(self, label: str, job: dict[str, str], extra: dict[str, str]) -> None:
        """Refuse an extra override of a setting for which a row's run has the experiment's own value all the same.

        Raises:
            UserError: with the override.
        """
        own = {"init_from": "the runs to start from"} if job.get("task") in self.starts else {}
        if self.tune and not self.tune.relative and label in self.tune.grid:
            own |= dict.fromkeys(("train.lr", "method.lr"), f"the rates that {label} is tried at")
        for key in own.keys() & extra.keys():
            word, file = f"experiment={self.name} {key}={extra[key]}", f"conf/experiment/{self.name}.yaml"
            raise UserError(f"{word}: {file} has {own[key]}; leave this out, or change the file")

    def list_jobs(self, extra: list[str]) -> list[Job]:
        """Return the label and the overrides of every cell, without seeds and without `extra`."""
        study = [] if any(e.startswith("study=") for e in extra) else [f"study={self.find_run_study()}"]
        return [
            (label, dict(map(split_override, job)))
            for block in self.blocks
            for label, override_lists in self.cells.items()
            for overrides in list_alternatives(override_lists)
            for words in [self.compute_multiples([*self.run, *block, *overrides, *study])]
            for job in parse_overrides(drop_replaced_overrides(words))
        ]

    def add_sources(self, cells: list[Cell], jobs: list[Job], extra: list[str]) -> list[Cell]:
        """Return the cells, each that `starts` names with the cells it starts from: those of its row with every seed,
        whatever seeds and tasks `extra` chooses.

        Raises:
            UserError: the experiment has no such cells.
        """
        kept = [word for word in extra if split_override(word)[0] not in ("seed", "task")]
        asked = {self.starts[task] for task in {cell.settings.task.name for cell in cells} & self.starts.keys()}
        known = {job.get("task") for _, job in jobs}
        for task in asked - known:
            raise UserError(f"conf/experiment/{self.name}.yaml: starts: {task}: no cell has this task")
        sources = cells
        if asked and kept != extra:  # words left out seeds or tasks that the cells start from
            words = [*kept, f"task={','.join(sorted(asked))}"]
            sources = replace(self, starts={}).compose_jobs(jobs, words)
        return [replace(cell, sources=self.choose_sources(cell, sources)) for cell in cells]

    def choose_sources(self, cell: Cell, sources: list[Cell]) -> tuple[Cell, ...]:
        """Return the cells among `sources` that a cell starts from: those of its row, on the task that `starts` names.

        Raises:
            UserError: there is none.
        """
        task = self.starts.get(cell.settings.task.name)
        if task is None:
            return ()
        heads = [key for key in self.list_heading_settings() if key != "task.name"]
        place = [get_setting(cell.settings, key) for key in heads]
        found = tuple(
            other
            for other in sources
            if (other.settings.task.name, other.label) == (task, cell.label)
            and [get_setting(other.settings, key) for key in heads] == place
        )
        where = f"conf/experiment/{self.name}.yaml: starts.{cell.settings.task.name}: {task}"
        require(
            bool(found) and task != cell.settings.task.name, f"{where}: {cell.label} has no other runs of that task"
        )
        return found

    def compute_multiples(self, overrides: list[str]) -> list[str]:
        """Return the overrides, every multiple computed from the last number before it of the same setting.

        Raises:
            UserError: no earlier override gives the setting a number.
        """
        found: list[str] = []
        numbers: dict[str, float] = {}
        for word in overrides:
            key, value = split_override(word)
            if multiple := MULTIPLE.fullmatch(value):
                where = f"conf/experiment/{self.name}.yaml: {word}"
                require(key in numbers, f"{where}: {value} needs a number for {key} in run or blocks; give one")
                value = f"{float(multiple[1]) * numbers[key]:g}"
            try:
                numbers[key] = float(value)
            except ValueError:  # several values, or words: no multiple can be taken of these, nor of what they replace
                numbers.pop(key, None)
            found.append(f"{key}={value}" if multiple else word)
        return found

    def check_contrasts(self, places: list[tuple[str, str | None]]) -> None:
        """Refuse a contrast that no row but a floor could have. places: the label and the column of every run, as they
        are written.

        Raises:
            UserError: with the columns.
        """
        tested = {label for label, _ in places if label not in self.floors}
        rows = {label: {word for other, word in places if other == label} for label in tested}
        for contrast in self.contrasts:
            columns = [str(value) for side in CONTRAST_SIDES for value in contrast[side]]
            has_row = any(set(columns) <= words for words in rows.values())
            where = f"conf/experiment/{self.name}.yaml: contrasts"
            require(has_row, f"{where}: no row has all of the columns {', '.join(columns)}; give them as cells do")

    def check_task_seeds(self, known: set[str | None]) -> None:
        """Refuse seeds of trials for a task that no cell has. known: the tasks that cells have.

        Raises:
            UserError: with the task.
        """
        for task in self.tune.task_seeds if self.tune else ():
            hint = suggest_name(task, filter(None, known))
            where = f"conf/experiment/{self.name}.yaml: tune.task_seeds: {task}"
            require(task in known, f"{where}: no cell has this task; drop it, or name one that they have.{hint}")

    def find_run_study(self) -> str:
        """Return the folder below runs/ that the runs are in unless the command line names another.

        Raises:
            UserError: `records` names no experiment that has this scale.
        """
        return Experiment.load(self.records, self.scale).study if self.records else self.study

    def find_report_study(self, study: str) -> str:
        """Return the folder below runs/ that the report is in. study: that of the runs."""
        return self.study if study == self.find_run_study() else study

    def list_heading_settings(self) -> list[str]:
        """Return the settings that, in addition to label and task, say where in the table a run is."""
        named = isinstance(self.columns, str) and self.columns != "published"
        return [*self.rows, *([self.columns] if named else [])]

    def check_places(self, cells: list[Cell], extra: list[str]) -> None:
        """Refuse different runs that would be averaged as if they were the same but for the seed.

        Raises:
            UserError: with a setting in which they differ.
        """
        known: dict[tuple, Settings] = {}
        for cell in cells:
            mine = cell.settings
            task = mine.task.name if self.columns == "published" else None  # whose columns are of tasks
            where = (cell.label, mine.seed, task, *(get_setting(mine, key) for key in self.list_heading_settings()))
            other = known.setdefault(where, mine)
            for key in (
                dict.fromkeys((*iterate_setting_names(asdict(mine)), *iterate_setting_names(asdict(other))))
                if mine != other
                else ()
            ):
                values = get_setting(other, key), get_setting(mine, key)
                require(
                    values[0] == values[1],
                    f"experiment={self.name}{''.join(f' {word}' for word in extra)}: {cell.label} would hold runs with "
                    f"{key} {values[0]} and {values[1]} in one place; choose among the values it has",
                )

    def create_seeded_cells(self, label: str, settings: Settings, fixed: bool) -> list[Cell]:
        """Return a cell for each seed, with the runs its rate is chosen by."""
        seeds = [settings.seed] if fixed else self.seeds
        settings = replace(settings, wandb=replace(settings.wandb, tags=[*settings.wandb.tags, self.name, self.scale]))
        return [Cell(label, replace(settings, seed=seed), self.list_trials(label, settings)) for seed in seeds]

    def list_trials(self, label: str, settings: Settings) -> tuple[Settings, ...]:
        """Return the runs by which a cell's learning rate is chosen.

        Raises:
            UserError: they would train on rows that the cell's runs are scored on, or be scored on several sets as one.
        """
        if self.tune is None or label not in self.tune.grid:
            return ()
        # Rows that the reported runs are scored on are neither trained nor chosen on.
        held = settings.eval.holdout
        require(
            self.tune.holdout or not held,
            f"eval.holdout={held}: rates of experiment={self.name} are chosen on other rows than training rows, so "
            "that its trials would train on those held out; drop it",
        )
        mixed = self.tune.holdout and load_task(settings).held_out_option
        require(
            not mixed,
            f"experiment={self.name}: its trials set {self.tune.holdout} training rows apart, and those of "
            f"{settings.task.name} are of several sets, which it scores one by one; take another task, or in the "
            "experiment's file tune.options instead of tune.holdout",
        )
        scored = replace(settings.eval, holdout=self.tune.holdout, holdout_skip=held, before=False)
        task = replace(settings.task, options={**settings.task.options, **self.tune.options})
        marked = replace(settings.wandb, job_type="tune")
        trial = replace(settings, eval=scored, task=task, wandb=marked)
        unit = trial.train.lr if self.tune.relative else 1
        rates = [round_rate(float(rate) * unit) for rate in self.tune.grid[label]]
        seeds = self.tune.task_seeds.get(task.name, self.tune.seeds)
        steps = self.tune.max_steps or trial.train.max_steps
        trained = [replace(trial.train, lr=rate, max_steps=steps) for rate in rates]
        return tuple(replace(trial, seed=seed, train=train) for train in trained for seed in seeds)


def load_experiment_file(name: str) -> Any:
    """Return the content of conf/experiment/NAME.yaml.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    known = list_choices("experiment")
    hint = suggest_name(name, known)
    require(name in known, f"experiment={name}: no such experiment.{hint} Known: {', '.join(known)}")
    try:
        return OmegaConf.to_container(load_yaml(find_choices("experiment")[name]))
    except YAMLError as error:
        raise UserError(describe_config_error(error)) from error
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"conf/experiment/{name}.yaml: {describe_config_error(error)}") from error


def choose_scale(name: str, content: Any, scale: str | None) -> tuple[str, str]:
    """Return the scale, by default the first that the file has, and the folder below runs/ that belongs to it.

    Raises:
        UserError: the file has no scale, or not this one.
    """
    has = [key for key in content if key in SCALES] if isinstance(content, dict) else []
    require(bool(has), f"conf/experiment/{name}.yaml: gives no scale; one of {', '.join(SCALES)} is needed")
    scale = scale or has[0]
    require(scale in has, f"scale={scale}: experiment {name} has {', '.join(has)}")
    return scale, name if scale == has[0] else f"{name}_{scale}"


def list_alternatives(override_lists: list) -> list[list[str]]:
    """Return a cell's lists of overrides; it may give a single one."""
    return override_lists if isinstance(override_lists[0], list) else [override_lists]


def split_override(word: str) -> tuple[str, str]:
    """Return the key and the value of an override."""
    key, _, value = word.partition("=")
    return key, value


def check_distinct(values: list, where: str) -> None:
    """Refuse a list that has a value twice.

    Raises:
        UserError: with `where` and the value.
    """
    for number, value in enumerate(values):
        require(value not in values[:number], f"{where}: {value}: given twice; drop one")


def check_tune(tune: Tune, where: str) -> None:
    """Refuse a choice of learning rates among unequally many or none, by no runs, or by one that counts twice.

    Raises:
        UserError: with `where` and the field.
    """
    sizes = {label: len(rates) for label, rates in tune.grid.items()}
    have_equal_sizes = len(set(sizes.values())) == 1 and all(sizes.values())
    require(have_equal_sizes, f"{where}.grid: every label needs as many rates, one at least, not {sizes}")
    require(tune.describe_rows() != "", f"{where}: give holdout or options, rates need rows to be chosen on")
    for label, rates in tune.grid.items():
        check_distinct([round_rate(rate) for rate in rates], f"{where}.grid: {label}")
    for name, seeds in {"seeds": tune.seeds, **{f"task_seeds: {k}": v for k, v in tune.task_seeds.items()}}.items():
        require(bool(seeds), f"{where}.{name}: no seed; rates are chosen by runs with one or more")
        check_distinct(seeds, f"{where}.{name}")


def round_rate(rate: float) -> float:
    """Return a learning rate as it is tried: with six digits."""
    return float(f"{float(rate):.6g}")


def check_contrast(contrast: dict[str, list], columns: str | dict[str, str], where: str) -> None:
    """Refuse a contrast without one of the sides or with a column on both, or columns that no setting heads.

    Raises:
        UserError: with `where`, the contrast and the form that is needed.
    """
    sides = [contrast.get(side) for side in CONTRAST_SIDES]
    has_both_sides = set(contrast) == set(CONTRAST_SIDES) and all(sides)
    form = "{plus: [...], minus: [...]} with values of columns is needed"
    require(has_both_sides, f"{where}: contrasts: {contrast}: {form}")
    for name, values in zip(CONTRAST_SIDES, sides, strict=True):
        check_distinct(values, f"{where}: contrasts: {name}")
    both = [value for value in sides[0] if value in sides[1]]
    require(not both, f"{where}: contrasts: {both[:1]}: on both sides; give it on one")
    has_setting_columns = isinstance(columns, str) and columns not in ("published", "task.name")
    require(
        has_setting_columns,
        f"{where}: contrasts: need columns with the values of one setting, as method.magnitude_ratio has",
    )


def is_required(field: Field) -> bool:
    """Return whether a field of a dataclass has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def check_fields(cls: type, values: object, where: str) -> None:
    """Refuse what is not a mapping, fields that a class does not have, and values of other types than its fields'.

    Raises:
        UserError: with `where` and the field.
    """
    require(isinstance(values, dict), f"{where}: {str(values)[:80]}: fields with their values are needed here")
    known = {f.name: f.type for f in fields(cls) if f.name not in DERIVED_FIELDS}
    for key, value in values.items():
        require(key in known, f"{where}: {key}: no such field.{suggest_name(str(key), known)}")
        kind = dict if known[key] == Tune | None and value else known[key]
        wrong = f"{where}: {key}: {str(value)[:80]!r} has the wrong form; {__name__} shows the right one"
        require(has_type(value, kind), wrong)


def drop_replaced_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides without those that a later one of the same key replaces."""
    last = {override.partition("=")[0]: number for number, override in enumerate(overrides)}
    return [override for number, override in enumerate(overrides) if last[override.partition("=")[0]] == number]
