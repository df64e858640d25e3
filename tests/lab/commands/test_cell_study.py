"""Studies of many small cells as experiments: run, reported, resumed, run again, refused."""

import pytest

from dual_lora.analysis import fit
from dual_lora.analysis.cells.rows import append_row, hash_package, hash_row, read_rows
from dual_lora.lab.commands.cell_study import RERUN_FILE, CellStudy
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.errors import UserError
from dual_lora.lab.study import experiment

FIT = ["experiment=fit", "scale=smoke"]


def results(path):
    return [(row["cell"], row["result"]) for row in read_rows(path)]


def test_a_study_of_cells_runs_resumes_and_reports_from_its_rows(runs_folder, capsys):
    assert sweep_command([*FIT, "wandb.mode=disabled"]) == 0
    rows, report = runs_folder / "fit_smoke/rows.jsonl", runs_folder / "fit_smoke/report"
    shown = capsys.readouterr().out
    assert len(read_rows(rows)) == len(fit.plan_cells("smoke")) and "# Fitting a known update" in shown
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    assert set(first) == {"table.md", "figure.png"}
    (report / "table.md").unlink()
    assert sweep_command([*FIT, "run=false"]) == 0
    assert {path.name: path.read_bytes() for path in report.iterdir()} == first
    whole = rows.read_bytes()
    rows.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 9])  # the last cell was cut short
    with pytest.raises(UserError, match="^experiment=fit: .*rows.jsonl: 1 of 60 cells have not run; run them first"):
        sweep_command([*FIT, "run=false"])
    capsys.readouterr()
    assert sweep_command(FIT) == 0 and "1 of 60 cells to run" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in report.iterdir()} == first


@pytest.mark.parametrize("word", ["force=True", "force=1", "++force=true", "force='true'"])
def test_force_is_true_however_it_is_written(word, runs_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(CellStudy, "run", lambda self, missing, force: asked.append(force) or 0)
    for words in ([word], [word, "wandb.mode=disabled"], ["force=false"], []):
        assert sweep_command([*FIT, *words]) == 0
    assert asked == [True, True, False, False]


def test_force_runs_all_cells_again_and_keeps_those_of_another_size(runs_folder, capsys):
    assert sweep_command(FIT) == 0
    rows = runs_folder / "fit_smoke/rows.jsonl"
    before = results(rows)
    other = read_rows(rows)[0]
    other["cell"]["n"] = 77
    append_row(rows, other | {"digest": hash_row(other)})
    assert sweep_command([*FIT, "force=true"]) == 0
    assert "60 of 60 cells to run" in capsys.readouterr().out
    assert results(rows) == [*before, (other["cell"], other["result"])]  # the same cell gives the same bits
    assert [path.name for path in rows.parent.iterdir() if path.is_file()] == ["rows.jsonl"]


@pytest.mark.parametrize(("code", "left"), [(None, 58), ("of another day", 60)])
def test_a_forced_study_resumes_the_rows_of_its_own_code_only(code, left, runs_folder, capsys):
    assert sweep_command(FIT) == 0
    rows = runs_folder / "fit_smoke/rows.jsonl"
    for row in read_rows(rows)[:2]:
        row |= {"code": code or row["code"]}
        append_row(rows.with_name(RERUN_FILE), row | {"digest": hash_row(row)})
    capsys.readouterr()
    assert sweep_command([*FIT, "force=true"]) == 0
    assert f"{left} of 60 cells to run" in capsys.readouterr().out
    assert {row["code"] for row in read_rows(rows)} == {hash_package()}
    assert f"code {hash_package()[:10]}." in (rows.parent / "report/table.md").read_text()


def test_a_study_leaves_the_number_of_threads_to_the_runs_after_it(runs_folder):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert sweep_command(FIT) == 0 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=fit", "seed=0"], "experiment=fit: has no model, task or method; drop seed=0"),
        (
            ["experiment=cost,fit", "scale=smoke", "model=x"],
            "experiment=fit: has no model, task or method; drop model=x",
        ),
        (
            ["experiment=fit", "hydra/launcher=slurm"],
            "experiment=fit: its cells run in this process; drop hydra/launcher",
        ),
        (["experiment=fit", "scale=full"], "scale=full: experiment fit has small, smoke"),
        (["experiment=fit", "plan=true"], "experiment=fit: has no model, task or method; drop plan=true"),
        ([*FIT, "force=maybe"], "force=maybe: must be true or false"),
        ([*FIT, "force="], "force=: must be true or false"),
        ([*FIT, "force=true,false"], "force=true,false: a study of cells runs once; give single values"),
        ([*FIT, "force=true", "++force=false"], "force: given twice; drop one"),
        ([*FIT, "forced=true"], "experiment=fit: has no model, task or method; drop forced=true"),
        ([*FIT, "wandb.mdoe=x"], "wandb.mdoe: no such setting. Did you mean wandb.mode"),
        ([*FIT, "wandb.mode=x"], "wandb.mode=x: not one of online, offline, disabled"),
        (["experiment=fit", "scale=smoke", "run=false"], "experiment=fit: .* 60 of 60 cells have not run"),
    ],
)
def test_what_a_study_of_cells_cannot_do_is_refused(words, said, runs_folder):
    with pytest.raises(UserError, match=f"^{said}"):
        sweep_command(words)
    assert not list(runs_folder.glob("*/*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "runs"}, "kind: runs: cells is the only kind"),
        ({"smoke": {"sizes": "smoke"}}, "smoke: .* of dual_lora/analysis/fit.py is needed"),
        ({"smoke": None}, "smoke: .* is needed"),
    ],
)
def test_mistakes_in_a_file(changes, said, monkeypatch):
    content = {"title": "x", "kind": "cells", "smoke": {"size": "smoke"}} | changes
    monkeypatch.setattr("dual_lora.lab.commands.cell_study.load_experiment_file", lambda name: content)
    with pytest.raises(UserError, match=f"^conf/experiment/fit.yaml: {said}"):
        CellStudy.find("fit", "smoke")


def test_a_study_of_cells_needs_its_module(monkeypatch):
    content = {"title": "x", "kind": "cells", "smoke": {"size": "smoke"}}
    monkeypatch.setattr("dual_lora.lab.commands.cell_study.load_experiment_file", lambda name: content)
    with pytest.raises(UserError, match="kind: cells: there is no dual_lora/analysis/cost.py"):
        CellStudy.find("cost", "smoke")


def test_an_experiment_of_runs_is_no_study_of_cells():
    assert CellStudy.find("cost", "smoke") is None and "kind" not in experiment.load_experiment_file("cost")
