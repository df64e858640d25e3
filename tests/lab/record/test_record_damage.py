"""Records that were moved, mixed or cut short: nothing that is whole is lost, and nothing else is taken for it."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.sweep import run_experiment
from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import EXIT_USER, UserError
from dual_lora.lab.record.record import RERUN_FOLDER, TRAINED_FILE, Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_damaged_records, find_records
from dual_lora.lab.system.files import remove_path
from dual_lora.lab.system.sealed import find_newest_checkpoint, seal_folder
from dual_lora.lab.train.run import train_run
from tests.support.finished_runs import RUN, edit
from tests.support.killed_runs import Killed, at_step, kept, kill
from tests.support.reports import GLUE, finish

FORCED = [*RUN, "force=true"]


def read_all(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rerun_until_result(finished: Record) -> Record:
    """Make a run in `.again` as complete as a kill before its installation leaves it; return its record."""
    again = Record(finished.folder / RERUN_FOLDER)
    shutil.copytree(finished.folder, again.folder, ignore=shutil.ignore_patterns(RERUN_FOLDER))
    again.write_lines("metrics.jsonl", [{"step": 1, "train/loss": 0.25}])
    result = json.loads((again.folder / "result.json").read_text())
    again.write_result({key: value for key, value in result.items() if key != "digest"})
    return again


@pytest.mark.parametrize("damage", ["another run's", "", "{cut sho", "null", "edited"])
def test_checkpoints_beside_a_result_that_is_not_the_runs_stay(damage, record):
    path = record.folder / "result.json"
    if damage == "another run's":
        other = Run.prepare(load_settings([*RUN, "seed=1"])).record
        shutil.copytree(record.folder, other.folder)
        record, path = other, other.folder / "result.json"
    elif damage == "edited":
        edit(path, metrics={"accuracy": 0.99})
    else:
        path.write_text(damage)
    seed = 1 if damage == "another run's" else 0
    checkpoint = record.folder / "checkpoints/checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("all that is left")
    (record.folder / TRAINED_FILE).write_text("{}")
    with pytest.raises(UserError, match="result.json: "):
        train_run(Run.prepare(load_settings([*RUN, f"seed={seed}"])))
    assert (checkpoint / "weights").is_file() and (record.folder / TRAINED_FILE).is_file()


@pytest.mark.parametrize("moved", [0, 1, 3, 5])
def test_a_complete_rerun_is_installed_wherever_it_was_interrupted(moved, record):
    again = rerun_until_result(record)
    expected = read_all(again.folder)
    names = [path for path in sorted(again.folder.iterdir()) if path.name != "result.json"]
    for path in names[:moved]:
        if path.is_dir():
            shutil.rmtree(record.folder / path.name)
        path.replace(record.folder / path.name)
    record.finish_cleanup()
    assert read_all(record.folder) == expected and not again.folder.exists()
    assert train_run(Run.prepare(load_settings(RUN)))["identity"] == record.name


@pytest.mark.parametrize("name", ["result.json", "predictions.jsonl", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0damaged", None])
def test_a_rerun_that_is_damaged_costs_the_finished_run_nothing(name, content, record):
    before = read_all(record.folder)
    again = rerun_until_result(record)
    if content is None and name != "result.json":
        shutil.rmtree(record.folder / "adapter") if name.startswith("adapter") else (record.folder / name).unlink()
        (again.folder / name).unlink()
        with pytest.raises(UserError, match=f"{name.partition('/')[0]}.*: removed since the run"):
            train_run(Run.prepare(load_settings(RUN)))
        assert (again.folder / "result.json").is_file()
        return
    (again.folder / name).unlink() if content is None else (again.folder / name).write_bytes(content)
    assert train_run(Run.prepare(load_settings(RUN)))["identity"] == record.name
    assert {n: data for n, data in read_all(record.folder).items() if not n.startswith(RERUN_FOLDER)} == before


def test_a_forced_run_removes_a_damaged_result_of_the_one_before_it(record, monkeypatch):
    """Else a kill would leave files of two runs together under one result."""
    again = rerun_until_result(record)
    (again.folder / "result.json").write_text("")
    before = (record.folder / "result.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("dual_lora.lab.model.adapt.load_model", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_run(Run.prepare(load_settings(FORCED)))
    assert not (again.folder / "result.json").exists() and (record.folder / "result.json").read_bytes() == before
    result = train_run(Run.prepare(load_settings(FORCED)))
    assert record.read_finished() == result and not again.folder.exists()


def test_train_and_eval_install_a_complete_rerun_before_they_look_at_it(record, monkeypatch):
    again = rerun_until_result(record)
    (again.folder / "environment.json").replace(record.folder / "environment.json")
    monkeypatch.setattr("dual_lora.lab.evaluate.trained.reevaluate_run", lambda settings, record: 0)
    assert evaluate_command([f"run={record.folder}"]) == 0 and not again.folder.exists()
    again = rerun_until_result(record)
    (again.folder / "environment.json").replace(record.folder / "environment.json")
    (run,) = check_command(RUN)
    assert run.record.read_finished() and not again.folder.exists()


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    """A disk that fails for a moment would cost every checkpoint."""
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text(str(step))
        seal_folder(tmp_path / f"checkpoint-{step}", identity="x")
    with monkeypatch.context() as patched:
        patched.setattr(
            "dual_lora.lab.system.sealed.hash_file", lambda path: (_ for _ in ()).throw(OSError(116, "stale"))
        )
        with pytest.raises(UserError, match=r"checkpoint-2: cannot be read \(stale\)"):
            find_newest_checkpoint(tmp_path, "x")
    assert find_newest_checkpoint(tmp_path, "x").name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "weights").unlink()
    assert find_newest_checkpoint(tmp_path, "x").name == "checkpoint-1" and not (tmp_path / "checkpoint-2").exists()


def test_weights_that_cannot_be_compared_are_told(record, tmp_path, capsys):
    """A run on a commit of the hub names no files; a folder given in its place may hold other weights."""
    settings = load_settings(RUN)
    other = replace(settings, model=replace(settings.model, path=str(tmp_path)))
    said = (
        f"not checked: {record.folder} records no hashes of model={settings.model.name}, so model.path={tmp_path} may"
    )
    edit(record.folder / "environment.json", model_files={})
    record.verify_model_files(settings)
    assert capsys.readouterr().err == ""
    record.verify_model_files(other)
    assert capsys.readouterr().err.startswith(said)


def test_an_empty_folder_of_a_rerun_goes(record):
    (record.folder / RERUN_FOLDER).mkdir()
    record.finish_cleanup()
    assert not (record.folder / RERUN_FOLDER).exists()
    (record.folder / RERUN_FOLDER / "checkpoints").mkdir(parents=True)
    record.finish_cleanup()
    assert (record.folder / RERUN_FOLDER / "checkpoints").is_dir()


def test_a_rerun_without_tensorboard_leaves_no_curves_of_the_old_run(record):
    (record.folder / "tensorboard").mkdir()
    rerun_until_result(record)
    shutil.rmtree(record.folder / RERUN_FOLDER / "tensorboard")
    record.finish_cleanup()
    assert not (record.folder / "tensorboard").exists()


def test_what_was_made_of_an_earlier_training_goes_with_its_result(record):
    """As where the result is damaged, and the user removes it and runs the same command again, as told to."""
    assert evaluate_command([f"run={record.folder}", "analyse=true"]) == 0 == evaluate_command([f"run={record.folder}"])
    for name in ("truncation.json", "curvature.json", "similarity.json", "fit.json"):
        record.write_sealed(name, {"rows": []})
    (record.folder / "tensorboard").mkdir()
    (record.folder / "tensorboard/events").touch()
    run_files = {"adapter", "config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl", "result.json"}
    made = {path.name for path in record.folder.iterdir()} - run_files
    assert made >= {"analysis.json", "analysis.csv", "evaluation.json", "ranks.png", "stable_ranks.pdf"}
    (record.folder / "notes.txt").write_text("mine")
    (record.folder / "result.json").write_text("{cut sho")
    with pytest.raises(UserError, match="result.json: damaged .*; remove it and run the same command again"):
        train_run(Run.prepare(load_settings(RUN)))
    assert made <= {path.name for path in record.folder.iterdir()}
    (record.folder / "result.json").unlink()
    train_run(Run.prepare(load_settings(RUN)))
    assert {path.name for path in record.folder.iterdir()} == {*run_files, "notes.txt"}


def test_a_renamed_checkpoint_is_refused_and_not_removed(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_text("1")
    seal_folder(folder, identity="mine", name="checkpoint-2")
    assert find_newest_checkpoint(tmp_path, "mine") == folder
    renamed = folder.rename(tmp_path / "checkpoint-6")
    with pytest.raises(UserError, match=f"{renamed}: was written as checkpoint-2; remove it or give it that name"):
        find_newest_checkpoint(tmp_path, "mine")
    assert renamed.is_dir()
    seal_folder(renamed, identity="mine")  # as earlier versions did
    assert find_newest_checkpoint(tmp_path, "mine") == renamed


def test_checkpoints_say_which_they_are(runs_folder):
    words = [*RUN, "train.max_steps=4", "train.save_steps=2"]
    with at_step(3, kill), pytest.raises(Killed):
        train_run(Run.prepare(load_settings(words)))
    begun = Run.prepare(load_settings(words)).record
    begun.find_checkpoint().rename(begun.folder / "checkpoints/checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3: was written as checkpoint-2"):
        train_run(Run.prepare(load_settings(words)))


def test_what_a_killed_run_left_is_not_taken_for_another_runs(runs_folder):
    """Its scores before training are those of another head."""
    words = [word for word in RUN if not word.startswith("eval.before")]
    with at_step(1, kill), pytest.raises(Killed):
        train_run(Run.prepare(load_settings(words)))
    begun = Run.prepare(load_settings(words)).record.folder
    other = Run.prepare(load_settings([*words, "seed=1"])).record.folder
    assert '"step": 0' in (begun / "metrics.jsonl").read_text()
    begun.rename(other)
    with pytest.raises(UserError, match=f"environment.json: belongs to run {begun.name}, not to {other.name}; remove"):
        train_run(Run.prepare(load_settings([*words, "seed=1"])))


@pytest.mark.parametrize("damage", [None, b"", b"{damaged"])
@pytest.mark.parametrize("scored_only", [True, False])
def test_a_run_whose_environment_is_damaged_does_not_resume(scored_only, damage, runs_folder):
    """Nothing else says which run, and which model files, its checkpoint and its scores before training are of."""
    words = [word for word in RUN if not word.startswith("eval.before")]
    words += [] if scored_only else ["train.max_steps=4", "train.save_steps=2"]
    with at_step(1 if scored_only else 3, kill), pytest.raises(Killed):
        train_run(Run.prepare(load_settings(words)))
    begun = Run.prepare(load_settings(words)).record
    path = begun.folder / "environment.json"
    before = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage)
    said = f"{path}: (missing|damaged).*; put it back, or remove {begun.folder} to start the run again$"
    with pytest.raises(UserError, match=said):
        train_run(Run.prepare(load_settings(words)))
    path.write_bytes(before)
    train_run(Run.prepare(load_settings(words)))


@pytest.mark.parametrize("damage", [None, b"", b"{damaged"])
def test_a_result_without_seals_passes_only_if_its_environment_says_how_old_it_is(damage, record):
    edit(record.folder / "result.json", metrics={"accuracy": 0.99}, digest=None, sha256=None)
    record.write_file("analysis.json", {"rows": []})
    path = record.folder / "environment.json"
    path.unlink() if damage is None else path.write_bytes(damage)
    for use in (
        lambda: train_run(Run.prepare(load_settings(RUN))),
        lambda: evaluate_command([f"run={record.folder}"]),
        lambda: record.read_sealed("analysis.json"),
    ):
        with pytest.raises(UserError, match="environment.json: (missing|damaged)"):
            use()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "predictions.jsonl", "result.json", "trained.json", "failure.json", "config.yaml"]
)
def test_a_folder_in_place_of_a_file_is_named_before_anything_loads(name, runs_folder, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", lambda *_: pytest.fail("loaded"))
    folder = Run.prepare(load_settings(RUN)).record.folder
    (folder / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}: a folder, not a file; remove it"):
        train_run(Run.prepare(load_settings(RUN)))


def test_a_file_in_place_of_the_checkpoints_is_named_before_anything_loads(runs_folder, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", lambda *_: pytest.fail("loaded"))
    folder = Run.prepare(load_settings(RUN)).record.folder
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match="checkpoints: not a folder; remove it"):
        train_run(Run.prepare(load_settings(RUN)))
    assert (folder / "checkpoints").read_text() == "mine"


def replace_by(path: Path, kind: str) -> None:
    """Put something of another kind where a file or a folder is."""
    remove_path(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("")
    else:
        path.symlink_to(path if kind == "link to itself" else "/nowhere")


def keep_only(folder: Path, name: str) -> None:
    """Remove all files of a record but one, which is there then."""
    for path in [path for path in folder.iterdir() if path.name != name]:
        remove_path(path)
    if name == "adapter":
        (folder / name).mkdir()


LOST = r"no config.yaml and no result.json; put it back, or remove what is left and run its command again"
PLACE = r"not a folder; put it back, or remove what is left and run its command again"
DAMAGES = {
    "result.json: a folder": (lambda f: replace_by(f / "result.json", "folder"), "result.json: a folder, not a file"),
    "result.json: a pipe": (lambda f: replace_by(f / "result.json", "pipe"), "result.json: a link to nothing, a pipe"),
    "result.json: a link": (lambda f: replace_by(f / "result.json", "link"), "result.json: a link to nothing, a pipe"),
    "only environment": (lambda f: keep_only(f, "environment.json"), LOST),
    "only predictions": (lambda f: keep_only(f, "predictions.jsonl"), LOST),
    "only weights": (lambda f: keep_only(f, "adapter"), LOST),
    "only metrics": (lambda f: [(f / "metrics.jsonl").write_text("{}"), keep_only(f, "metrics.jsonl")], LOST),
    "a file": (lambda f: replace_by(f, "file"), PLACE),
    "a link to nothing": (lambda f: replace_by(f, "link"), PLACE),
    "a link to itself": (lambda f: replace_by(f, "link to itself"), PLACE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_left_of_a_run_is_named_by_a_report(damage, runs_folder, capsys):
    experiment = Experiment.from_content("made", GLUE)
    cells = experiment.compose_cells([])
    records = [finish(cell.settings, 80) for cell in cells]
    change, message = DAMAGES[damage]
    change(records[0].folder)
    assert run_experiment(experiment, cells, None) == EXIT_USER
    assert re.search(rf"not read: {records[0].name}: {records[0].folder}.*{message}", capsys.readouterr().err)
    assert len(find_damaged_records("made")) == 1


def test_links_to_records_and_what_is_no_runs_are_no_damage(runs_folder, tmp_path):
    experiment = Experiment.from_content("made", GLUE)
    records = [finish(cell.settings, 80) for cell in experiment.compose_cells([])]
    records[0].folder.rename(tmp_path / "elsewhere")
    records[0].folder.symlink_to(tmp_path / "elsewhere")
    study = records[0].folder.parent
    (study / "plan.csv").write_text("")
    (study / "notes").mkdir()
    (study / "notes/environment.json").write_text("{}")
    begun, failed = study / "x_0123456789", study / "y_0123456789"  # a run is here, or ended, before it wrote anything
    begun.mkdir()
    failed.mkdir()
    (begun / "metrics.jsonl").write_text("")
    (begun / ".lock").write_text("{}")
    (failed / "failure.json").write_text("{}")
    assert not find_damaged_records("made") and len(find_records("made")) == len(records)


def test_a_file_that_cannot_be_read_is_named_and_costs_the_report_nothing_else(runs_folder, capsys, monkeypatch):
    """Of another user's run, or on a failing disk. Root may read anything, so the call is told that it may not."""
    experiment = Experiment.from_content("made", GLUE)
    cells = experiment.compose_cells([])
    records = [finish(cell.settings, 80) for cell in cells]
    for found in records:
        result = json.loads((found.folder / "result.json").read_text())
        found.write_result({key: value for key, value in result.items() if key != "digest"})
    locked, hidden = records[0].folder / "config.yaml", records[-1].folder
    hash_file, is_file, access = (Record.write_result.__globals__["hash_file"], Path.is_file, os.access)

    def refuse(path: Path) -> None:
        if path == locked or path.parent == hidden:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dual_lora.lab.record.record.hash_file", lambda path: refuse(path) or hash_file(path))
    monkeypatch.setattr(Path, "is_file", lambda path: (path.parent == hidden and refuse(path)) or is_file(path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != hidden and access(path, mode))
    monkeypatch.setattr(os.path, "lexists", lambda path: Path(path).parent != hidden and os.path.exists(path))
    assert run_experiment(experiment, cells, None) == EXIT_USER
    shown = capsys.readouterr()
    for path in (locked, hidden / "result.json"):
        line = f"{path}: cannot be read (Permission denied); check that you may read and write there"
        assert f"not read: {path.parent.name}: {line}" in shown.err
    assert "Traceback" not in shown.err and len(find_damaged_records("made")) == 2
    assert (runs_folder / "made/report/table.md").is_file()


@pytest.mark.parametrize("damage", [None, b"", "model_files"])
def test_without_its_environment_nobody_knows_a_runs_model_files(damage, record, tmp_path):
    path = record.folder / "environment.json"
    if damage is None:
        path.unlink()
    elif damage == "model_files":
        edit(path, model_files={})
    else:
        path.write_bytes(damage)
    for words in ([], ["analyse=true"], [f"export={tmp_path / 'out'}"]):
        told = "removed" if damage is None else "changed"
        with pytest.raises(UserError, match=f"environment.json: {told} since the run"):
            evaluate_command([f"run={record.folder}", *words])
    assert not (tmp_path / "out").exists()


def test_an_export_may_have_a_long_name_in_any_script(record, tmp_path):
    folder = tmp_path / ("\N{SLICE OF PIZZA}" * 60)
    assert len(folder.name.encode()) == 240  # a system's limit is 255
    assert evaluate_command([f"run={record.folder}", f"export={folder}"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []
    assert (folder / "model.safetensors").is_file()


def test_a_run_that_cannot_be_written_is_not_analysed(record, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.config.paths.os.access", lambda *args: False)
    monkeypatch.setattr("dual_lora.lab.weights.analyse.load_updates", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"{record.folder} is not a writable folder; copy the record"):
        evaluate_command([f"run={record.folder}", "analyse=true"])


PACKED = ["model=tiny-llama", "task=demo/restaurants", "wandb.mode=disabled", "eval.max_examples=2"]
PACKED += ["task.max_new_tokens=4", "train.max_examples=40", "train.batch_size=8", "train.accumulation=2"]
PACKED += ["train.max_steps=5", "train.log_steps=2", "train.save_steps=2", "train.packing=true", "tensorboard=true"]


def test_a_packed_run_goes_on_to_the_same_bytes_and_its_curves_have_every_step_once(runs_folder, reference):
    settings = load_settings(PACKED)
    whole = reference(settings)
    for step in (1, 3, 4):
        with at_step(step, kill), pytest.raises(Killed):
            train_run(Run.prepare(settings))
    train_run(Run.prepare(settings))
    folder = Run.prepare(settings).record.folder
    assert kept(folder) == whole and len(list((folder / "tensorboard").iterdir())) == 1
