"""Experiments: every one composes at every scale and runs at the smallest; missing runs are done once; rates are chosen
on rows that are not reported."""

import json
import re
import shutil
from functools import cache, partial
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import tasks
from dual_lora import kernels, paper
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.errors import EXIT_OK, EXIT_USER, UserError
from dual_lora.lab.inputs.splits import load_scored_splits, load_split
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.record.run import prepare_runs
from dual_lora.lab.report.comparison.comparisons import pretend_finished
from dual_lora.lab.report.comparison.matches import iterate_matches
from dual_lora.lab.statistics.compare import count_resamples
from dual_lora.lab.statistics.multiple import adjust_holm
from dual_lora.lab.study import schedule as study_schedule
from dual_lora.lab.study.experiment import SCALES, Cell, Experiment, drop_replaced_overrides, load_experiment_file
from dual_lora.lab.study.outcome import Outcome
from dual_lora.lab.study.schedule import run_cells
from dual_lora.lab.study.time_left import TimeLeft
from tests.support.places import ROOT
from tests.support.published import get_row
from tests.support.small_runs import SMALL, SPEC, TINY

TUNE = {"holdout": 9, "grid": {"LoRA": [1e-3]}}
TABLES = [name for name in list_choices("experiment") if "kind" not in load_experiment_file(name)]
GLUE = {"MNLI": "mnli", "SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola"}
GLUE |= {"QNLI": "qnli", "QQP": "qqp", "RTE": "rte", "STS-B": "stsb"}


@cache
def composed(name: str, scale: str) -> list[Cell]:
    """Return an experiment's cells with one seed."""
    return Experiment.load(name, scale).compose_cells(["seed=0"])


def content(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf/experiment" / f"{name}.yaml"))


@pytest.fixture
def experiment(monkeypatch):
    """A function that makes `experiment=small` mean SPEC with changes."""

    def use(**changes):
        monkeypatch.setattr(
            Experiment, "load", lambda name, scale=None: Experiment.from_content(name, SPEC | changes, scale)
        )
        return "experiment=small"

    return use


@pytest.mark.parametrize("name", TABLES)
def test_every_experiment_composes_and_can_show_a_difference(name):
    scales = [scale for scale in SCALES if scale in content(name)]
    assert "smoke" in scales
    for scale in scales:
        cells = composed(name, scale)
        assert all(cell.settings.model.bundled for cell in cells) == (scale == "smoke")
        experiment = Experiment.load(name, scale)
        if experiment.analyse == "fit":  # compares forms, which are no rows
            continue
        assert len(cells) > 1
        count = comparisons(experiment, cells)
        assert adjust_holm([1 / (1 + count_resamples(count)), *[1.0] * (count - 1)])[0] < 0.05


@pytest.mark.parametrize(
    ("name", "extra", "labels", "same"),
    [
        ("nlu", ["model=roberta-base", "task=glue/rte"], 7, {"train.epochs": {80}, "method.alpha": {None, 8, 4}}),
        ("commonsense", ["model=llama3-8b"], 11, {"hardware.base": {None}, "train.batch_size": {2, 16}}),
        ("rank_allocation", ["method.magnitude_ratio=0.0625"], 6, {"method.magnitude_ratio": {None, 0.0625}}),
        ("rank_allocation", ["method.magnitude_ratio=0.25,0.5"], 6, {"method.magnitude_ratio": {None, 0.25, 0.5}}),
        ("nlu", ["method=lora,dual_lora", "model=roberta-base", "task=glue/rte"], 4, {"method.rank": {8}}),
        ("nlg", ["model=gpt2-medium"], 7, {"model.name": {"gpt2-medium"}}),
        # what says not where a run stands is a setting of all
        ("commonsense", ["model=llama3-8b", "train.batch_size=8"], 11, {"train.batch_size": {8}}),
        ("update_rank", ["train.max_steps=1"], 3, {"train.max_steps": {1}}),
    ],
)
def test_a_value_of_the_table_chooses_among_its_runs(name, extra, labels, same):
    cells = Experiment.load(name).compose_cells([*extra, "seed=0"])
    assert len({cell.label for cell in cells}) == labels
    assert not any(cell in cells[:number] for number, cell in enumerate(cells))
    for key, values in same.items():
        assert {get_setting(cell.settings, key) for cell in cells} == values


def test_one_folder_is_not_taken_for_several_models(tmp_path):
    said = f"^model.path={tmp_path}: one folder for model=gpt2-medium and model=gpt2-large; choose one of them"
    with pytest.raises(UserError, match=said):
        Experiment.load("nlg").compose_cells([f"model.path={tmp_path}"])
    assert Experiment.load("nlg").compose_cells([f"model.path={tmp_path}", "model=gpt2-large"])


def test_different_runs_in_one_place_of_the_table_are_refused():
    with pytest.raises(UserError, match="^experiment=rank_sweep method.rank=17: LoRA would hold .* method.alpha 4"):
        Experiment.load("rank_sweep").compose_cells(["method.rank=17"])
    with pytest.raises(UserError, match="LoRA would hold runs with task.name glue/sst2 and glue/mrpc in one place"):
        Experiment.load("rank_sweep", "small").compose_cells(["task=glue/sst2,glue/mrpc"])
    pairs = [["model=tiny-roberta", "task=demo/sentiment"], ["model=tiny-llama", "task=demo/choice"]]
    two = Experiment.from_content("two", SPEC | {"smoke": SPEC["smoke"] | {"blocks": pairs, "run": []}})
    with pytest.raises(UserError, match="^experiment=two: no cell of it has model=tiny-llama task=demo/sentiment;"):
        two.compose_cells(["model=tiny-llama", "task=demo/sentiment"])
    with pytest.raises(UserError, match="^experiment=two method=dora: its rows have dual_lora, lora$"):
        two.compose_cells(["method=dora"])


@pytest.mark.parametrize("word", ["train.lr=5e-4", "method.lr=5e-4"])
def test_a_rate_that_an_experiment_chooses_itself_cannot_be_given(word):
    """A row without a grid takes it."""
    said = (
        f"^experiment=verdict {word}: conf/experiment/verdict.yaml has the rates that Full is tried at; leave this out"
    )
    with pytest.raises(UserError, match=said):
        Experiment.load("verdict", "smoke").compose_cells([word])
    cells = Experiment.load("verdict", "smoke").compose_cells([word, "method=head_only"])
    assert {cell.settings.train.lr for cell in cells} == {5e-4}


def test_a_grid_can_be_relative_to_the_rate_of_a_runs_protocol():
    extra = ["model=deberta-v2-xxlarge", "task=glue/sst2", "seed=0"]
    cells = {cell.label: cell for cell in Experiment.load("nlu").compose_cells(extra)}
    rates = {label: [trial.train.lr for trial in cell.tuning] for label, cell in cells.items()}
    assert rates["LoRA"] == rates["Dual LoRA"] == [3e-5, 6e-5, 1.2e-4] and rates["Full"] == [1.5e-6, 3e-6, 6e-6]
    given = {cell.label: cell for cell in Experiment.load("nlu").compose_cells([*extra, "train.lr=5e-4"])}
    assert [trial.train.lr for trial in given["LoRA"].tuning] == [2.5e-4, 5e-4, 1e-3]


def comparisons(experiment: Experiment, cells: list[Cell]) -> int:
    """Return how many comparisons of main scores there are once all cells are finished."""
    outcomes = [pretend_finished(Outcome(cell, None, None, None)) for cell in cells]
    return max(1, len(list(iterate_matches(experiment, outcomes))))


def head(name: str) -> dict[str, str]:
    """Return what the head of an experiment's file says of each scale."""
    lines = (ROOT / "conf/experiment" / f"{name}.yaml").read_text().partition("\ntitle:")[0].splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    parts = re.split(rf"\b({'|'.join(SCALES)}): ", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) | {"": parts[0]}


EXPERIMENTS = [(name, s) for name in TABLES for s in SCALES if s in content(name)]


@pytest.mark.parametrize(("name", "scale"), EXPERIMENTS)
def test_every_experiment_says_runs_time_hardware_and_what_to_expect(name, scale):
    said, experiment = head(name), Experiment.load(name, scale)
    assert f"python sweep.py experiment={name}" in said[""]
    told = said[scale]
    assert re.search(r"minutes?|hours?", told) and "Expected: " in told
    assert re.search("A100 80 GB|AMD EPYC|Intel Xeon", told)
    cells = composed(name, scale)
    trials = prepare_runs([trial for cell in cells for trial in cell.tuning])
    # At most, by the rates chosen. Their names would need the weights, and so the folder of a model beyond the hub.
    runs = cells if trials else {serialize_identity_settings(cell.settings) for cell in cells}
    number = len(experiment.seeds) * len(runs)
    if "seed=" in str(experiment.cells):  # rows with seeds of their own
        number = len(experiment.compose_cells([]))
    assert told.startswith(f"{number} runs")
    assert not trials or f" and {len(trials)} to choose rates" in told


@pytest.mark.parametrize(("name", "scale"), EXPERIMENTS)
def test_rates_that_are_tuned_for_no_row_are_a_limit_the_report_tells(name, scale):
    experiment = Experiment.load(name, scale)
    tuned = experiment.tune is not None and set(experiment.baselines) <= set(experiment.tune.grid)
    assert tuned or experiment.limit or scale == "smoke" or experiment.columns == "train.lr"


def test_the_published_settings_of_glue_are_those_of_the_paper():
    table = paper.load_table("lora_table9_10_glue_settings")
    keys = {"train.lr": "lr", "train.batch_size": "batch", "train.epochs": "epochs", "task.max_length": "max_length"}
    keys["task.warmup_ratio"] = "warmup_ratio"
    blocks = [dict(o.split("=", 1) for o in block) for block in content("nlu")["full"]["blocks"]]
    assert len(blocks) == 24
    for block in blocks:
        (column,) = [c for c, name in GLUE.items() if f"glue/{name}" == block["task"]]
        for key, setting in keys.items():
            if key not in block:  # DeBERTa's script counts warm-up in steps: PROTOCOLS.md
                assert key == "task.warmup_ratio" and float(block["task.warmup_steps"]) > 0
                continue
            printed = get_row(table, model=block["model"], printed_in="paper", setting=setting).values[column]
            assert float(block[key]) == printed.number, (block["model"], column, key)


def test_every_experiment_runs_with_bundled_models_and_reports(runs_folder, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "explain_slow_bfloat16", lambda device: None)  # every processor computes it, if slowly
    assert sweep_command(["experiment=all", "scale=smoke", "wandb.mode=disabled"]) == 0
    for name in set(list_choices("experiment")) - set(TABLES):
        made = {path.name for path in (runs_folder / f"{name}_smoke" / "report").iterdir()}
        assert made == {"table.md", "figure.png"}
    for name in TABLES:
        study = Experiment.load(name, "smoke").study
        made = {path.name for path in (runs_folder / study / "report").iterdir()}
        assert {"table.md", "table.tex", "table.csv", "report.html"} <= made
        drawn = (
            {"figure.png", "figure.pdf"},
            {"ranks.png", "stable_ranks.pdf", "histograms_1.png"},
            {"cost.png"},
            {"truncation.png"},
            {"curvature.png"},
            {"changes.png"},
            {"rates.png"},  # of fits, whose tables say it all
        )
        assert any(figures <= made for figures in drawn)
        assert "[a]" not in (runs_folder / study / "report" / "table.md").read_text(), "a cell is missing"


def test_later_overrides_replace_earlier_ones():
    assert drop_replaced_overrides(["a=1", "b=2", "a=3", "+c.d=4", "+c.d=5"]) == ["b=2", "a=3", "+c.d=5"]


def test_missing_runs_are_done_once_and_the_report_is_the_same_from_the_records(experiment, runs_folder, capsys):
    name = experiment()
    assert sweep_command([name, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "4 runs, 0 finished, 4 to do" in shown and "| LoRA" in shown
    assert "Main score (accuracy)" in shown and shown.count("data: train tasks/demo.py v") == 1
    report = runs_folder / "small" / "report"
    first = {p.name: p.read_bytes() for p in report.iterdir()}
    assert sweep_command([name, *SMALL]) == 0
    assert "4 runs, 4 finished, 0 to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in report.iterdir()} == first
    report.rename(report.with_name("old"))
    assert sweep_command([name, "run=false", *SMALL]) == 0
    assert {p.name: p.read_bytes() for p in report.iterdir()} == first


def test_a_damaged_result_does_not_stop_the_other_runs(experiment, runs_folder, capsys):
    name = experiment()
    assert sweep_command([name, *SMALL]) == 0
    damaged, lost = sorted((runs_folder / "small").glob("*/result.json"))[:2]
    damaged.write_text(damaged.read_text()[:40])
    lost.unlink()
    capsys.readouterr()
    assert sweep_command([name, *SMALL]) == EXIT_USER
    printed = capsys.readouterr()
    assert "4 runs, 2 finished, 1 to do" in printed.out and lost.is_file()
    assert f"{damaged}: damaged (" in printed.err


def test_words_that_an_experiment_would_not_use_are_refused(experiment):
    name = experiment()
    with pytest.raises(UserError, match="^train.epochs=9: train.max_steps=2 is used instead; drop one$"):
        sweep_command([name, *SMALL, "train.epochs=9"])
    for run in ("run=false", "run=False"):  # as settings are written
        with pytest.raises(UserError, match="^run=false force=true: nothing is to run; drop one$"):
            sweep_command([name, *SMALL, run, "force=true"])


def test_the_time_left_is_judged_by_the_runs_most_like_those_to_do():
    def job(model: str, *more: str):
        return load_settings([f"model={model}", "task=demo/sentiment", *more])

    lora, dual = job("tiny-roberta", "method=lora"), job("tiny-roberta", "method=dual_lora")
    other, short = job("tiny-deberta", "method=lora"), job("tiny-roberta", "method=lora", "train.max_steps=1")
    progress = TimeLeft()
    assert progress.describe_time([lora]) == "time left not known before a run is done"
    progress.add_run(lora, 60)
    assert progress.describe_time([lora, dual, other]) == "about 3 min left"  # nothing better is known of the others
    progress.add_run(dual, 180)
    progress.add_run(other, 600)
    assert [progress.estimate_seconds(one) for one in (lora, dual, other)] == [60, 180, 600]
    progress.add_run(short, 2)
    assert progress.estimate_seconds(short) == 2 and progress.estimate_seconds(lora) == 60
    assert progress.describe_time([lora, dual, other]) == "about 14 min left"


def test_the_time_left_covers_what_comes_after_the_choice_of_rates(runs_folder, monkeypatch, capsys):
    spec = SPEC | {"tune": {"holdout": 9, "grid": {"Dual LoRA": [1e-3, 2e-3]}}}
    cells = Experiment.from_content("small", spec).compose_cells([])
    clock = iter(range(0, 6000, 60))
    monkeypatch.setattr(study_schedule, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("dual_lora.lab.study.schedule.execute_run", lambda run: None)
    run_cells(cells, "small", [])
    left = re.findall(r"\[(\d/\d)\] [^,]+, (.*)", capsys.readouterr().out)
    assert left == [
        ("1/2", "time left not known before a run is done"),
        ("2/2", "about 5 min left"),  # this one, and two seeds of two rows
        ("1/2", "about 2 min left"),
        ("2/2", "about 60 s left"),
    ]


def test_a_missing_run_is_a_dash_with_its_reason(experiment, runs_folder):
    name = experiment(cells={"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]})
    sweep_command([name, *SMALL])
    table = runs_folder / "small" / "report" / "table.md"
    assert table.read_text().count("(2)") == 2
    gone = sorted((runs_folder / "small").glob("*_dual_lora_s*/result.json"))
    for number, path in enumerate(gone):
        for away, reason in ((path.unlink, "started, not finished"), (partial(shutil.rmtree, path.parent), "not run")):
            away()
            sweep_command([name, "run=false", *SMALL])
            (line,) = (line for line in table.read_text().splitlines() if line.startswith("| Dual LoRA"))
            second = number == 1 and away == path.unlink  # the first is gone, this one begun: two reasons
            why = r"– \[a, b\]" if second else r"– \[a\]" if number else r"\(1\)‡? \[a\]"
            assert re.search(why, line) and f"- – [{'b' if second else 'a'}]: {reason}\n" in table.read_text()


def test_a_report_is_not_replaced_by_one_that_leaves_out_runs_of_it(experiment, runs_folder, capsys):
    name, report = experiment(), runs_folder / "small" / "report"
    assert sweep_command([name, *SMALL]) == 0
    first = {p.name: p.read_bytes() for p in report.iterdir()}
    for word in ("method=lora", "seed=0"):
        assert sweep_command([name, *SMALL, word]) == 0
        shown = capsys.readouterr()
        assert shown.out.endswith(f"report: {report}_selection\n")
        said = f"{report}_selection: replaces that of another selection; repeat its command to have it back\n"
        assert (said in shown.err) == (word == "seed=0")
        assert {p.name: p.read_bytes() for p in report.iterdir()} == first
    shutil.rmtree(report)
    assert sweep_command([name, *SMALL, "method=lora", "run=false"]) == 0  # where there is nothing to lose
    assert "| Dual LoRA" not in (report / "table.md").read_text()
    assert sweep_command([name, *SMALL, "run=false"]) == 0
    assert {p.name: p.read_bytes() for p in report.iterdir()} == first


def test_the_reports_of_two_experiments_in_one_study_lie_beside_each_other(experiment, runs_folder, capsys):
    one, study = experiment(), runs_folder / "both"
    sweep_command([one, *SMALL, "study=both", "run=false"])
    first = (study / "report/table.md").read_bytes()
    for _ in range(2):
        sweep_command(["experiment=cost", "scale=smoke", "study=both", "run=false", "wandb.mode=disabled"])
        assert "(cost, scale=smoke)" in (study / "report_cost_smoke/table.md").read_text()
        assert (study / "report/table.md").read_bytes() == first


def test_a_failing_run_is_told_and_the_others_are_reported(experiment, runs_folder, capsys):
    assert sweep_command([experiment(), *SMALL, "+method.peft.rank_pattern={query:1}"]) == 2
    shown = capsys.readouterr()
    assert "2 of 4 runs finished" in shown.err and "| LoRA" in shown.out
    assert "[a]: failed: " in shown.out


def test_a_rate_is_chosen_on_rows_that_are_not_reported(experiment, runs_folder, capsys):
    grids = {"LoRA": [1e-5, 5e-3], "Dual LoRA": [1e-3, 2e-3]}
    name = experiment(tune={"holdout": 32, "grid": grids})
    steps = [o for o in SMALL if not o.startswith(("train.max", "eval.max"))]
    assert sweep_command([name, "train.max_steps=20", "train.max_examples=null", "eval.max_examples=64", *steps]) == 0
    shown = capsys.readouterr().out
    assert "4 runs to choose learning rates, 0 finished" in shown and "4 runs, 0 finished" in shown
    assert "chosen from 1e-05, 0.005 by the main score on 32 training examples set apart" in shown
    results = [json.loads(path.read_text()) for path in runs_folder.glob("small/*/result.json")]
    trials = [r for r in results if r["seed"] == 1000]
    assert len(trials) == 4 and all(r["data"]["validation"]["rows"] == 32 for r in trials)
    assert all("set apart" in r["data"]["validation"]["origin"] for r in trials)
    best = max((r for r in trials if r["method"] == "lora"), key=lambda r: r["metrics"]["accuracy"])
    config = OmegaConf.load(runs_folder / "small" / best["identity"] / "config.yaml")
    assert f"learning rate, LoRA: {config.train.lr:g}; chosen" in shown


def test_rates_of_e2e_are_chosen_on_validation_records():
    cells = Experiment.load("nlg", "full").compose_cells(["seed=0"])
    tuned = [cell for cell in cells if cell.tuning]
    assert len(tuned) == 12 and {cell.settings.task.options["scored"] for cell in cells} == {"test"}
    assert {trial.task.options["scored"] for cell in tuned for trial in cell.tuning} == {"validation"}
    assert {tuple(t.train.lr for t in c.tuning) for c in tuned if c.label == "LoRA"} == {(1e-4, 2e-4, 5e-4)}


def test_rows_set_apart_are_not_trained_on():
    task = tasks.load("demo/sentiment")
    settings = load_settings(["model=tiny-roberta", "task=demo/sentiment", "eval.holdout=50"])
    train = load_split(task, "train", settings)
    apart = load_scored_splits(task, settings)["validation"]
    ids = set(apart.rows["id"])
    assert len(ids) == 50 and len(train.rows) == 1950 and not ids & set(train.rows["id"])
    other = load_settings(["model=tiny-roberta", "task=demo/sentiment", "eval.holdout=50", "seed=7"])
    assert set(load_scored_splits(task, other)["validation"].rows["id"]) == ids
    with pytest.raises(UserError, match="eval.holdout=2000: .* has 2000 rows"):
        load_split(task, "train", load_settings(["task=demo/sentiment", "model=tiny-roberta", "eval.holdout=2000"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["DoRA"]}, "conf/experiment/small.yaml: DoRA: no such cell; its cells are LoRA, Dual LoRA"),
        ({"column": "x"}, "column: no such field. Did you mean columns?"),
        ({"published": ["dora_table0"]}, "dora_table0: no such table"),
        ({"tune": {"holdout": 9, "grid": {"LoRA": [1], "Dual LoRA": [1, 2]}}}, "every label needs as many rates"),
        ({"tune": {"grid": {"LoRA": [1]}}}, "tune: give holdout or options"),
        ({"tune": TUNE | {"grid": {"LoRA": []}}}, "tune.grid: every label needs as many rates, one at least, not"),
        ({"tune": TUNE | {"grid": {"LoRA": [1e-3, 2, 0.001]}}}, "small.yaml: tune.grid: LoRA: 0.001: given twice"),
        ({"tune": TUNE | {"seeds": []}}, "small.yaml: tune.seeds: no seed; rates are chosen by runs with one or more"),
        ({"tune": TUNE | {"seeds": [5, 6, 5]}}, "small.yaml: tune.seeds: 5: given twice; drop one"),
        ({"tune": TUNE | {"task_seeds": {"demo/sentiment": []}}}, "tune.task_seeds: demo/sentiment: no seed"),
        ({"tune": TUNE | {"task_seeds": {"demo/sentiment": [5, 5]}}}, "task_seeds: demo/sentiment: 5: given twice"),
        ({"smoke": SPEC["smoke"] | {"seeds": [0, 1, 0, 0, 1]}}, "small.yaml: seeds: 0: given twice; drop one"),
        ({"smoke": SPEC["smoke"] | {"seeds": []}}, "small.yaml: seeds: none given; at least one is needed"),
        ({"rows": ["task.name", "task.name"]}, "small.yaml: rows: task.name: given twice; drop one"),
        ({"baselines": ["LoRA", "LoRA"]}, "small.yaml: baselines: LoRA: given twice; drop one"),
        ({"mean": "task.name"}, "small.yaml: mean: task.name: not one of rows, which are none"),
        ({"mean": "tsk.name", "rows": ["task.name"]}, "mean: tsk.name: not one of rows, which are task.name"),
        (
            {"columns": "method.rank", "analyse": "truncation"},
            "analyse: truncation would average over values of method.rank as over seeds; give each value a cell",
        ),
        (
            {"rows": ["task.name", "train.lr"], "analyse": "similarity", "reference": "LoRA"},
            "analyse: similarity would average over values of train.lr as over seeds",
        ),
        ({"rows": ["method.alpha"], "analyse": "fit"}, "analyse: fit would average over values of method.alpha"),
    ],
)
def test_mistakes_in_a_file(changes, message):
    with pytest.raises(UserError) as error:
        Experiment.from_content("small", SPEC | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiment=costt", "no such experiment. Did you mean cost?"),
        ("run=false", "experiment=NAME is needed"),
        ("experiment=cost run=maybe", "run=maybe: must be true or false"),
        ("experiment=cost scale=huge", "scale=huge: experiment cost has full, small, smoke"),
        ("experiment=cost train.lrr=3", "train.lrr: no such setting"),
    ],
)
def test_mistakes(argument, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("?", r"\?")):
        sweep_command(argument.split())


def test_a_sweep_counts_no_run_as_finished_whose_weights_were_changed(runs_folder, capfd):
    spec = {**SPEC, "cells": {"LoRA": ["method=lora"]}, "baselines": []}
    cells = Experiment.from_content("small", spec).compose_cells([*TINY, "seed=0"])
    assert run_cells(cells, "small", []) == EXIT_OK
    (adapter,) = runs_folder.glob("*/*/adapter")
    with (adapter / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert run_cells(cells, "small", []) == EXIT_USER
    assert "adapter_model.safetensors: changed since the run" in capfd.readouterr().err
    shutil.rmtree(adapter)  # committed records are kept without weights
    assert run_cells(cells, "small", []) == EXIT_OK
