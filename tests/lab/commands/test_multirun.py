"""Several runs, or plans, of one command: lines and tables that name what varies, each identity computed once, no run
or plan that stops another, and nothing written where no record belongs."""

import re
import subprocess
import sys

import pytest

from dual_lora.lab.commands.train import plan_runs, train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.overrides import parse_overrides
from dual_lora.lab.config.recorded import find_differences
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_USER
from dual_lora.lab.record import run as record_run
from dual_lora.lab.record.run import Run, prepare_runs
from dual_lora.lab.record.summary import format_seconds
from dual_lora.lab.study import schedule
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.study.experiment import Experiment, drop_replaced_overrides
from dual_lora.lab.study.listing import format_results
from dual_lora.lab.study.schedule import run_cells
from dual_lora.lab.study.time_left import TimeLeft
from dual_lora.lab.train import plan as train_plan
from tests.support.places import ROOT
from tests.support.small_runs import SMALL, SPEC, TINY


def label(*words: str) -> list[str]:
    """Return the labels of a command's runs."""
    jobs = parse_overrides(drop_replaced_overrides([*TINY, *words]))
    return [run.label for run in prepare_runs([load_settings(job) for job in jobs])]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=3"], ["dual_lora"]),
        (["seed=0,1"], ["dual_lora seed=0", "dual_lora seed=1"]),
        (["method.magnitude_ratio=0.25,0.5"], ["dual_lora magnitude_ratio=0.25", "dual_lora magnitude_ratio=0.5"]),
        (["method=lora,dora"], ["lora", "dora"]),
        (["method=lora,dora", "seed=0,1"], ["lora seed=0", "lora seed=1", "dora seed=0", "dora seed=1"]),
        (["method.rank=4,8"], ["dual_lora rank=4", "dual_lora rank=8"]),  # method.peft.r, too, which says no more
        (["method=lora", "train.lr=1e-3,2e-3"], ["lora lr=0.001", "lora lr=0.002"]),
        (["+method.peft.ste=clip,identity"], ["dual_lora ste=clip", "dual_lora ste=identity"]),
        (["model=tiny-roberta,tiny-deberta"], ["tiny-roberta dual_lora", "tiny-deberta dual_lora"]),
    ],
)
def test_a_run_is_named_by_what_varies(words, expected, runs_folder):
    assert label(*words) == expected


def test_what_tells_runs_apart_does():
    jobs = [
        load_settings(job) for job in parse_overrides([*TINY, "method=lora,dual_lora", "seed=0,1", "train.epochs=1,2"])
    ]
    found = [tuple(values.items()) for values in find_differences(jobs)]
    assert len(set(found)) == len(jobs) == 8


def test_a_command_of_several_runs_ends_in_their_table(runs_folder, tmp_path, monkeypatch, capfd):
    """From a folder of its own, into which nothing is written."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train_command(["-m", *TINY, "method=lora,dual_lora"]) == EXIT_OK
    shown = capfd.readouterr().out
    assert re.findall(r"\[\d/\d\] (\S+),", shown) == ["lora", "dual_lora"]
    assert "tiny-roberta  demo/sentiment  lora  seed 0" in shown
    head, line, *rows = shown.rpartition("\n\n")[2].splitlines()
    assert head.split() == ["run", "before", "accuracy", "%", "trained", "seconds"] and set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["lora", "dual_lora"]
    assert all(re.fullmatch(r"\S+ +- +\d+\.\d +[\d,]+ +\d+\.\d", row) for row in rows)
    assert not list((tmp_path / "here").iterdir())
    code = "import sys, runpy; sys.argv = ['train.py', *sys.argv[1:]]\n"
    code += "try: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: print('heavy:', sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    words = [sys.executable, "-c", code, "-m", *TINY, "method=lora,dual_lora"]
    again = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert again.stdout.count("finished: ") == 2 and again.stdout.endswith("heavy: []\n"), again.stderr


def test_a_finished_run_whose_files_were_changed_is_not_called_finished(runs_folder, capfd):
    run = Run.prepare(load_settings(TINY))
    assert execute_run(run) is None and execute_run(run) is None
    (run.record.folder / "predictions.jsonl").write_text("{}\n")
    execute_run(run)
    assert report_failures([run]) == EXIT_USER
    assert "predictions.jsonl: changed since the run; run its command again with force=true" in capfd.readouterr().err


def test_a_run_without_a_result_is_a_row_of_dashes(runs_folder):
    runs = prepare_runs([load_settings([*TINY, f"seed={seed}"]) for seed in (0, 1)])
    assert execute_run(runs[0]) is None
    rows = format_results(runs).splitlines()[2:]
    assert rows[1].split()[2:] == ["-"] * 4 and "-" not in rows[0].split()[3:] and len(rows) == 2


def test_runs_that_differ_in_their_seed_end_in_their_mean(runs_folder, monkeypatch):
    """Two methods with two seeds each. SD is that of a sample."""
    jobs = parse_overrides([*TINY, "method=lora,dual_lora", "seed=0,1"])
    runs = prepare_runs([load_settings(job) for job in jobs])
    for run, accuracy in zip(runs, (0.5, 0.6, 0.25, 0.75), strict=True):
        facts = {"trainable_parameters": 9, "train_seconds": 1.0, "data": {}, "identity": run.identity}
        names = {"model": "tiny-roberta", "task": "demo/sentiment", "method": run.settings.method.name}
        scores = {"metric": "accuracy", "metrics": {"accuracy": accuracy}, "seed": run.settings.seed}
        run.record.folder.mkdir(parents=True)
        run.record.write_result({**facts, **names, **scores})
    head, *_, lora, dual = format_results(runs).splitlines()
    assert [row.split("  ")[0] for row in (lora, dual)] == [f"{m}, mean ± SD of 2 seeds" for m in ("lora", "dual_lora")]
    assert "55.0 ± 7.1" in lora and "50.0 ± 35.4" in dual and "accuracy %" in head
    monkeypatch.setattr(type(load_task(runs[0].settings)), "unscaled", ("accuracy",))
    head, *_, lora, dual = format_results(runs).splitlines()
    assert "0.55 ± 0.07" in lora and "0.50 ± 0.35" in dual and "accuracy  " in head


def test_a_launcher_that_does_one_run_at_a_time_does_them_all(runs_folder, monkeypatch, capfd):
    """joblib then works in a thread of this process. The runs' folder may have any name."""
    monkeypatch.setattr(paths, "RUNS", runs_folder / "of ${y}, it's")
    words = ["hydra/launcher=workstation", "hydra.launcher.n_jobs=1", "seed=1,2"]
    assert train_command(["-m", *TINY, *words]) == EXIT_OK
    assert "2 of 2 runs finished" in capfd.readouterr().err


def test_a_sweep_computes_each_identity_once_or_twice(runs_folder, monkeypatch, capsys):
    """Nine runs and nine to choose rates by. The table's runs are named twice: before and after the choice."""
    spec = SPEC | {
        "cells": {name: [f"method={name}"] for name in ("lora", "dora", "dual_lora")},
        "baselines": [],
        "smoke": SPEC["smoke"] | {"seeds": [0, 1, 2]},
        "tune": {"holdout": 9, "grid": {name: [1e-3, 2e-3, 3e-3] for name in ("lora", "dora", "dual_lora")}},
    }
    calls, compute = [], record_run.compute_identity
    monkeypatch.setattr(record_run, "compute_identity", lambda settings: calls.append(settings) or compute(settings))
    monkeypatch.setattr("dual_lora.lab.study.schedule.execute_run", lambda run: None)
    monkeypatch.setattr("dual_lora.lab.study.schedule.choose_learning_rate", lambda cell, records: cell)
    run_cells(Experiment.from_content("small", spec).compose_cells(SMALL), "small", [])
    times = [calls.count(settings) for settings in calls]
    assert len(calls) == 27 and max(times) == 2 and times.count(1) == 9


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (41, "41 s"), (119, "119 s"), (180, "3 min"), (7199, "120 min"), (9000, "2.5 h")],
)
def test_a_time_is_said_in_a_unit_that_shows_it(seconds, said):
    assert format_seconds(seconds) == said


def test_one_failing_plan_stops_no_other(runs_folder, monkeypatch, capsys):
    """Neither one that does not fit nor one that cannot be drawn; all are rows of the table."""
    words = ["model=llama3-8b", "task=e2e", "method=full,lora,dual_lora", "plan=true"]
    runs = prepare_runs([load_settings(job) for job in parse_overrides(words)])
    draw = train_plan.compute_plan

    def compute(settings):
        if settings.method.name == runs[1].settings.method.name:
            raise RuntimeError("a kernel is missing")
        return draw(settings)

    monkeypatch.setattr(train_plan, "compute_plan", compute)
    assert plan_runs(runs) == EXIT_FAILED
    shown = capsys.readouterr()
    rows = [row.split() for row in shown.out.splitlines()[-3:]]
    assert [(row[0], row[-1]) for row in rows] == [("full", "no"), ("lora", "no"), ("dual_lora", "yes")]
    assert rows[1][1:5] == ["-"] * 4 and rows[2][1] == "28,311,552"
    said = [line for line in shown.err.splitlines() if line.startswith("no plan: ")]
    assert said[0].startswith("no plan: full: plan: llama3-8b with full needs") and "would fit: " in said[0]
    assert said[1] == "no plan: lora: RuntimeError: a kernel is missing; internal error, please report it"


@pytest.mark.parametrize(
    ("model", "task"), [("tiny-llama", "demo/sentiment"), ("tiny-gpt2", "glue/stsb"), ("llama3-8b", "glue/rte")]
)
def test_a_causal_model_with_a_head_is_planned(model, task):
    """Its batch needs a padding token, which a plan has no tokenizer to ask for."""
    found = train_plan.compute_plan(load_settings([f"model={model}", f"task={task}", "plan=true"]))
    assert found["trainable_parameters"] > found["adapter_parameters"] > 0 and found["flops"]["backward"] > 0


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
@pytest.mark.parametrize("hardware", ["single", "qlora"])
def test_an_initialiser_that_needs_the_base_weights_is_planned_without_them(start, hardware):
    words = ["model=tiny-llama", "task=demo/restaurants", "method=lora", "plan=true", f"hardware={hardware}"]
    plain = train_plan.compute_plan(load_settings(words))
    other = train_plan.compute_plan(load_settings([*words, f"+method.peft.init_lora_weights={start}"]))
    assert other["trainable_parameters"] == plain["trainable_parameters"]
    assert other["flops"] == plain["flops"] and other["memory"]["peak"] == plain["memory"]["peak"]


def test_a_plan_of_more_layers_than_any_model_has_is_refused():
    words = ["model=llama3-8b", "task=e2e", "plan=true", "model.architecture.num_hidden_layers=10000000"]
    with pytest.raises(Exception, match="num_hidden_layers=10000000: must be a whole number from 1 to 1,000"):
        load_settings(words)


def test_a_log_file_has_lines_instead_of_a_bar(runs_folder, capfd):
    """At most some twenty, with the loss, the speed and the time left."""
    words = [word for word in TINY if not word.startswith("train.max_steps")]
    assert train_command([*words, "train.max_steps=60", "train.log_steps=1", "train.batch_size=2"]) == EXIT_OK
    said = capfd.readouterr().err
    lines = re.findall(r"(?m)^step (\d+)/60, loss \d+\.\d{4}, [\d,]+ tokens/s, \d+ s left$", said)
    assert 15 <= len(lines) <= 20 and lines[-1] == "60" and "it/s" not in said


@pytest.mark.parametrize(("error", "times"), [("UserError", 1), ("RuntimeError", 0), ("RunHeldElsewhere", 0)])
def test_a_failure_is_told_before_the_next_run_starts(error, times, runs_folder, monkeypatch, capfd):
    """Once: what is no UserError is printed where it is caught, with its traceback."""
    runs = prepare_runs([load_settings([*TINY, f"seed={seed}"]) for seed in (0, 1)])
    failures = iter([{"error": error, "message": "no such thing; take another"}, None])
    monkeypatch.setattr(schedule, "execute_run", lambda run: print("started") or next(failures))
    schedule.run_in_process(runs, TimeLeft())
    shown = capfd.readouterr()
    assert shown.out.count("started") == 2
    told = f"failed: {runs[0].record.format_path()}: no such thing; take another"
    assert shown.err.splitlines() == [told] * times
