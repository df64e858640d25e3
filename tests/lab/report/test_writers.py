"""Reports: several writers at once, a write that fails, and damaged logs."""

import json
import threading

import pytest
from matplotlib.figure import Figure

from dual_lora.analysis.cells.report import write_dot_report
from dual_lora.analysis.cells.rows import StudyError, read_rows, run_missing
from dual_lora.analysis.fit import plan_cells
from dual_lora.lab.commands.sweep import run_experiment
from dual_lora.lab.errors import EXIT_OK, EXIT_USER
from dual_lora.lab.present.drawing import save_figure
from dual_lora.lab.report.write import write_report
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from dual_lora.lab.system.lock import LOCK_NAME, hold_lock
from tests.support.reports import GLUE, finish

SPEC = {**GLUE, "baselines": [], "published": [], "columns": "task.name"}


def fail(path, *args, **kwargs):
    """Write a part, as on a disk that fills up."""
    with open(path, "w") as stream:
        stream.write("half")
    raise OSError(28, "No space left on device")


def test_a_report_waits_for_another_writer_and_then_knows_its_runs(runs_folder, capsys):
    experiment = Experiment.from_content("made", SPEC)
    cells = experiment.compose_cells(["seed=0"])
    for cell in cells[1:]:
        finish(cell.settings, 80)
    folder, codes = runs_folder / "made/report", []
    writer = threading.Thread(target=lambda: codes.append(run_experiment(experiment, cells, None)))
    with hold_lock(folder):
        writer.start()
        writer.join(2)
        assert writer.is_alive() and not (folder / "table.md").exists()
        finish(cells[0].settings, 65)
        (folder / ".table.md.12-0123abcd.partial").write_text("left by a kill")
        (folder / ".mine.partial").write_text("a user's own")
    writer.join(60)
    assert codes == [EXIT_OK] and "65.0" in (folder / "table.md").read_text()
    shown = capsys.readouterr().err
    assert shown.count(f"{folder}: waiting: process ") == 1
    assert {path.name for path in folder.glob(".*")} == {".mine.partial", ".figures.json"}


def write_whole_report(folder):
    """Write what a report of all of SPEC's runs is known by, as another process would."""
    experiment = Experiment.from_content("made", SPEC)
    cells = experiment.compose_cells([])
    for cell in cells:
        finish(cell.settings, 80)
    write_report(experiment, find_outcomes(cells, "made"), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_NAME}


def test_where_a_report_is_written_is_chosen_after_the_one_it_waits_for(runs_folder, capsys):
    experiment, folder, codes = Experiment.from_content("made", SPEC), runs_folder / "made/report", []
    selected = experiment.compose_cells(["method=lora"])
    writer = threading.Thread(target=lambda: codes.append(run_experiment(experiment, selected, None)))
    with hold_lock(folder):
        writer.start()
        writer.join(1)
        whole = write_whole_report(folder)
    writer.join(60)
    assert codes == [EXIT_OK] and {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert capsys.readouterr().out.endswith(f"report: {folder}_selection\n")


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "figure.png").symlink_to(victim)
    before = {path: path.read_bytes() for path in save_figure(Figure(), tmp_path, "figure")}
    assert victim.read_text() == "precious" and len(before) == 2
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **more: fail(path))
    with pytest.raises(OSError, match="No space"):
        save_figure(Figure(), tmp_path, "figure")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != victim} == before


def test_a_report_of_cells_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    values = {"panel": {"Dual": {"mean": 0.5, "low": None, "high": None, "values": [0.5]}}}
    made = write_dot_report(tmp_path, "text", values, ["Dual"], "unit", 1)
    before = {path: path.read_bytes() for path in made}
    assert made == [tmp_path / "table.md", tmp_path / "figure.png"] and before[made[0]] == b"text"
    monkeypatch.setattr("dual_lora.analysis.cells.report.draw_dots", lambda *args: fail(args[3]))
    with pytest.raises(OSError, match="No space"):
        write_dot_report(tmp_path, "other", values, ["Dual"], "unit", 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"step": "x", "train/loss": null}', '{"step": 1, "train/loss": 9}'], ids=str.__len__
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_log_costs_the_report_its_curve_alone(content, sealed, runs_folder, capsys):
    experiment = Experiment.from_content("made", SPEC)
    cells = experiment.compose_cells([])
    for cell in cells:
        found = finish(cell.settings, 80)
        found.write_lines("metrics.jsonl", [{"step": step, "train/loss": 0.5} for step in range(1, 5)])
        result = json.loads((found.folder / "result.json").read_text())
        if sealed:
            found.write_result({key: value for key, value in result.items() if key != "digest"})
    (found.folder / "metrics.jsonl").write_text(content + "\n")
    assert run_experiment(experiment, cells, None) == (EXIT_USER if sealed else EXIT_OK)
    assert (f"not read: {found.folder}/metrics.jsonl: changed" in capsys.readouterr().err) == sealed
    assert (runs_folder / "made/report/curves.png").is_file()


def test_an_edited_row_of_a_study_of_cells_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    cells = plan_cells("smoke")[:2]
    rows = list(run_missing(cells, lambda cell: {"error": 0.5, "by": {2: 1.0, 10: 2.0}}, file))
    assert [row["digest"] for row in read_rows(file)] == [row["digest"] for row in rows]
    whole = file.read_text()
    file.write_text(whole.replace('"error": 0.5', '"error": 0.1', 1))
    with pytest.raises(StudyError, match="rows.jsonl, line 1: changed since it was written; remove the line, its cell"):
        read_rows(file)
    file.write_text(whole + "[" * 100_000 + "\n")
    with pytest.raises(StudyError, match="rows.jsonl, line 3: damaged"):
        read_rows(file)
    edited = {key: value for key, value in rows[1].items() if key != "digest"} | {"result": {"error": 0.1}}
    file.write_text(whole.splitlines()[0] + "\n" + json.dumps(edited) + "\n")
    with pytest.raises(StudyError, match="rows.jsonl, line 2: its digest is missing; remove the line, its cell runs"):
        read_rows(file)


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
