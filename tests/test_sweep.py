"""Experiments: every one composes; missing runs are done once; the report is the same twice and shows gaps."""

import pytest

from dual_lora.lab import cli, grid
from dual_lora.lab.settings import UserError

SMALL = ["train.max_steps=2", "eval.max_examples=4", "wandb.mode=disabled"]


@pytest.fixture
def experiment(monkeypatch):
    """A small experiment of 2 methods x 2 seeds; its name."""
    run = ["model=tiny-roberta", "task=demo/sentiment", "seed=0,1"]
    small = grid.Experiment("small", run, [["method=lora,dual_lora"]], rows="method.name", columns="train.lr")
    monkeypatch.setattr(grid.Experiment, "load", lambda name: small)
    return small.name


@pytest.mark.parametrize("name", cli.choices("experiment"))
def test_every_experiment_composes(name):
    known = grid.Experiment.load(name)
    found = [cli.load(job) for cell in known.cells for job in cli.parse([*known.run, *cell])]
    assert len(found) == len({grid.asked(settings) for settings in found}) > 1
    for settings in found:
        assert grid.setting(settings, known.rows) and grid.setting(settings, known.columns)


def test_missing_runs_are_done_and_the_report_is_the_same_from_the_records(experiment, runs_folder, capsys):
    assert grid.sweep([f"experiment={experiment}", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "4 runs, 0 finished, 4 to do" in shown and "| lora" in shown
    assert "Main score (accuracy) in percent" in shown
    assert shown.count("Data: train tasks/demo.py v") == 1
    report = runs_folder / experiment / "report"
    first = {p.name: p.read_bytes() for p in report.iterdir()}
    assert set(first) == {"table.md", "table.csv", "figure.png"}
    assert grid.sweep([f"experiment={experiment}", *SMALL]) == 0
    assert "4 runs, 4 finished, 0 to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in report.iterdir()} == first


def test_a_deleted_run_is_counted_and_an_empty_cell_is_a_dash(experiment, runs_folder):
    grid.sweep([f"experiment={experiment}", *SMALL])
    table = runs_folder / experiment / "report" / "table.md"
    assert table.read_text().count("(2)") == 2
    gone = sorted((runs_folder / experiment).glob("*_dual_lora_s*/result.json"))
    gone[0].unlink()
    grid.sweep([f"experiment={experiment}", "run=false", *SMALL])
    assert table.read_text().count("(1)") == 1
    gone[1].unlink()
    grid.sweep([f"experiment={experiment}", "run=false", *SMALL])
    (line,) = (line for line in table.read_text().splitlines() if "| dual_lora" in line)
    assert "–" in [c.strip() for c in line.split("|")]


def test_a_failing_run_is_told_and_the_others_are_reported(experiment, runs_folder, capsys):
    assert grid.sweep([f"experiment={experiment}", *SMALL, "method.rank=1"]) == 2
    shown = capsys.readouterr()
    assert "2 of 4 runs finished" in shown.err and "| lora" in shown.out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiment=demmo", "no such experiment. Did you mean demo?"),
        ("run=false", "experiment=NAME is needed"),
        ("experiment=demo run=maybe", "run=maybe: true or false"),
        ("experiment=demo train.lrr=3", "train.lrr: no such setting"),
    ],
)
def test_mistakes(argument, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("?", r"\?")):
        grid.sweep(argument.split())
