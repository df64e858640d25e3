"""Files of a finished run that are not as the run left them: who reads or counts the run says so, with exit code 2."""

import json
import shutil

import pytest

from dual_lora.analysis.cells import StudyError, append_row, hash_row, read_rows
from dual_lora.lab.commands.sweep import run_experiment
from dual_lora.lab.errors import EXIT_OK, EXIT_USER
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.schedule import run_cells
from tests.support.reports import GLUE, finish
from tests.support.small_runs import SPEC, TINY


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.jsonl"])
@pytest.mark.parametrize("content", ["{damaged", "5\n", None])
def test_a_report_names_a_damaged_file_that_only_a_figure_or_nothing_needs(name, content, runs_folder, capsys):
    """Nothing is compared here, so no table reads predictions."""
    experiment = Experiment.from_content("made", {**GLUE, "baselines": [], "published": [], "columns": "task.name"})
    cells = experiment.compose_cells([])
    for cell in cells:
        found = finish(cell.settings, 80)
        found.write_lines("metrics.jsonl", [{"step": 1, "loss": 0.5}])
        result = json.loads((found.folder / "result.json").read_text())
        found.write_result({key: value for key, value in result.items() if key != "digest"})
    assert run_experiment(experiment, cells, None) == EXIT_OK
    file = found.folder / name
    file.unlink() if content is None else file.write_text(content)
    assert run_experiment(experiment, cells, None) == EXIT_USER
    told = "removed" if content is None else "changed"
    assert f"not read: {file}: {told} since the run" in capsys.readouterr().err
    assert name in (runs_folder / "made/report/table.md").read_text()


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


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"cell": 1, "result": {}}', "{damaged"])
def test_a_damaged_line_of_a_study_of_cells_is_named(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"cell": {"seed": 0}, "result": {"error": 0.5}, "seconds": 1.0}
    append_row(file, row | {"digest": hash_row(row)})
    assert read_rows(file) == [row | {"digest": hash_row(row)}]
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(StudyError, match="rows.jsonl, line 2: damaged; remove the line"):
        read_rows(file)
