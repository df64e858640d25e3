"""Records and checkpoints: whose they are, that they are complete, and that writing one harms no other file."""

import json
import os
import shutil
import stat
from types import SimpleNamespace

import pytest

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.sweep import run_experiment
from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import load_recorded_settings, replace_settings
from dual_lora.lab.errors import EXIT_ELSEWHERE, EXIT_OK, RunHeldElsewhere, UserError
from dual_lora.lab.record.record import TRAINED_FILE, Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.report.analyses.kinds import is_up_to_date, list_redone_runs
from dual_lora.lab.report.write import FIGURES_FILE, remove_stale_figures
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_damaged_records
from dual_lora.lab.system.files import append_text, remove_path, remove_temporary_files, write_text
from dual_lora.lab.system.lock import LOCK_NAME, STALE_SECONDS, hold_lock
from dual_lora.lab.system.sealed import find_newest_checkpoint, read_seal, seal_folder
from dual_lora.lab.train.run import train_run
from tests.support.finished_runs import RUN, edit
from tests.support.reports import GLUE, finish


def test_a_finished_run_is_whole(record):
    assert train_run(Run.prepare(load_settings(RUN)))["identity"] == record.name
    assert evaluate_command([f"run={record.folder}"]) == 0


def test_a_record_under_another_runs_name_is_refused(record):
    other = Run.prepare(load_settings([*RUN, "seed=1"])).record
    shutil.copytree(record.folder, other.folder)
    for use in (
        lambda: train_run(Run.prepare(load_settings([*RUN, "seed=1"]))),
        lambda: check_command([*RUN, "seed=1"]),
        lambda: evaluate_command([f"run={other.folder}"]),
        lambda: Run.prepare(load_settings([*RUN, f"init_from={other.folder}"])),
    ):
        with pytest.raises(UserError, match=f"{other.folder}/result.json: the result of run {record.name}; remove it"):
            use()
    assert find_damaged_records("adhoc")[0].startswith(other.name)


@pytest.mark.parametrize("lost", [("digest",), ("digest", "sha256")])
def test_a_result_that_lost_its_seal_is_refused(record, lost):
    edit(record.folder / "result.json", metrics={"accuracy": 0.99}, **dict.fromkeys(lost))
    with pytest.raises(UserError, match="result.json: changed since the run"):
        train_run(Run.prepare(load_settings(RUN)))


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "predictions.jsonl", "metrics.jsonl"])
def test_a_run_with_damaged_files_is_not_called_finished(record, name):
    with (record.folder / name).open("ab") as stream:
        stream.write(b" ")
    for use in (lambda: check_command(RUN), lambda: train_run(Run.prepare(load_settings(RUN)))):
        with pytest.raises(UserError, match=f"{name}: changed since the run"):
            use()


@pytest.mark.parametrize("name", ["model.safetensors", "sub/generation_config.json", ".hidden"])
def test_a_file_added_to_weights_is_refused(record, name, tmp_path):
    path = record.folder / "adapter" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    for use in (
        lambda: evaluate_command([f"run={record.folder}"]),
        lambda: evaluate_command([f"run={record.folder}", "analyse=true"]),
        lambda: train_run(Run.prepare(load_settings(RUN))),
    ):
        with pytest.raises(UserError, match=f"{path}: added after the run; remove it"):
            use()


def test_the_seal_of_a_folder_knows_all_its_files_and_whose_they_are(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_text("1")
    seal_folder(folder, identity="mine")
    assert find_newest_checkpoint(tmp_path, "mine") == folder
    with pytest.raises(UserError, match=f"{folder}: belongs to run mine, not to other; remove it"):
        find_newest_checkpoint(tmp_path, "other")
    (folder / "added").write_text("2")
    assert read_seal(folder) is None and find_newest_checkpoint(tmp_path, "mine") is None and not folder.exists()


def test_what_another_run_trained_is_refused(record):
    other = Record(record.folder.with_name("other"))
    shutil.copytree(record.folder / "adapter", other.folder / "adapter")
    seal_folder(other.folder / "adapter", other.folder / TRAINED_FILE, identity=record.name, logged=[])
    with pytest.raises(UserError, match=f"{TRAINED_FILE}: belongs to run {record.name}"):
        other.read_training()


def test_a_copy_under_a_users_own_name_can_be_evaluated(record, tmp_path):
    shutil.copytree(record.folder, tmp_path / "best")
    assert evaluate_command([f"run={tmp_path / 'best'}"]) == 0


def test_only_numbered_folders_are_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-", "checkpoint-1a", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
    assert find_newest_checkpoint(tmp_path, "mine") is None and len(list(tmp_path.iterdir())) == 4


def test_an_analysis_is_sealed_since_version_2(record):
    record.write_sealed("analysis.json", {"rows": [{1: 2.5}], "labels": ("a",)})
    assert record.read_sealed("analysis.json", "rows")["labels"] == ["a"]
    edit(record.folder / "analysis.json", rows=[])
    with pytest.raises(UserError, match="analysis.json: changed since it was written; remove it"):
        record.read_sealed("analysis.json")
    edit(record.folder / "analysis.json", digest=None)
    with pytest.raises(UserError, match="analysis.json: changed since it was written"):
        record.read_sealed("analysis.json")
    edit(record.folder / "environment.json", record_version=None)
    assert record.read_sealed("analysis.json")["rows"] == []
    edit(record.folder / "analysis.json", identity="other")
    with pytest.raises(UserError, match="analysis.json: belongs to run other"):
        record.read_sealed("analysis.json")


def test_an_analysis_knows_which_runs_were_done_again_since(record):
    other = Record(shutil.copytree(record.folder, record.folder.with_name("best")))
    content = {"digests": {"best": other.read_digest(), "elsewhere": "0", "older": None}}
    assert not list_redone_runs(record, content) and not list_redone_runs(record, {})
    result = {key: value for key, value in other.read_result().items() if key != "digest"}
    other.write_result(result | {"train_seconds": 9.0})
    assert list_redone_runs(record, content) == ["best"]
    record.write_sealed("analysis.json", {"rows": [], "labels": {}, **content})
    assert not is_up_to_date(SimpleNamespace(analyse="ranks"), SimpleNamespace(record=record), [])


def test_committed_records_still_read():
    found = [path.parent for path in (paths.ROOT / "runs").glob("*/*/result.json")]
    for folder in found:
        assert Record(folder).read_result()["identity"] == folder.name
        Record(folder).verify_files("config.yaml", "environment.json", "predictions.jsonl")


def test_a_writer_follows_no_link_and_the_umask_decides(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "soft").symlink_to(victim)
    os.link(victim, tmp_path / "hard")
    for name in ("soft", "hard"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        append_text(tmp_path / "log", "more")
    assert victim.read_text() == "precious"
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
        folder = tmp_path / "weights"
        folder.mkdir()
        (folder / "private").touch(0o600)
        seal_folder(folder, tmp_path / "manifest")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "file", folder / "private")} == {0o640}


def test_removing_a_link_to_a_folder_leaves_the_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove_path(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "folder/file").is_file()


def test_a_run_replaces_links_where_it_writes(runs_folder, tmp_path):
    """Whoever may write in a shared runs/ cannot lead the run's owner to overwrite other files."""
    folder, victims = Run.prepare(load_settings(RUN)).record.folder, tmp_path / "victims"
    folder.mkdir(parents=True)
    victims.mkdir()
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "predictions.jsonl",
        LOCK_NAME,
        ".result.json.partial",
    ):
        (victims / name).write_text("precious")
        (folder / name).symlink_to(victims / name)
    (victims / "adapter").mkdir()
    (victims / "adapter/file").write_text("precious")
    (folder / "adapter").symlink_to(victims / "adapter")
    train_run(Run.prepare(load_settings(RUN)))
    assert {p.read_text() for p in victims.rglob("*") if p.is_file()} == {"precious"}
    assert not [p for p in folder.rglob("*") if p.is_symlink()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_only_what_this_program_left_is_removed(tmp_path):
    for name in (".result.json.partial", ".result.json.12-0123abcd.partial", ".mine.partial", ".result.json.x.partial"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path, "result.json")
    assert {path.name for path in tmp_path.iterdir()} == {".mine.partial", ".result.json.x.partial"}


def test_a_report_removes_only_figures_that_a_report_wrote(tmp_path):
    for name in ("figure.png", "old.png", "changed.png"):
        (tmp_path / name).write_text("drawn")
    remove_stale_figures(tmp_path, {"figure", "old", "changed"})
    (tmp_path / "changed.png").write_text("a user's own since")
    (tmp_path / "mine.pdf").write_text("mine")
    remove_stale_figures(tmp_path, {"figure"})
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "changed.png", "mine.pdf", FIGURES_FILE}
    (tmp_path / FIGURES_FILE).write_text("{damaged")
    remove_stale_figures(tmp_path, set())
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.parametrize("damage", ["config.yaml", "environment.json", "result.json", "config.yaml gone"])
def test_a_damaged_record_is_named_by_the_report_and_its_exit_code(damage, runs_folder, capsys):
    experiment = Experiment.from_content("made", GLUE)
    cells = experiment.compose_cells([])
    for cell in cells:
        found = finish(cell.settings, 80)
        result = json.loads((found.folder / "result.json").read_text())
        found.write_result({key: value for key, value in result.items() if key != "digest"})
    name, gone = damage.partition(" ")[::2]
    if gone:
        (found.folder / name).unlink()
    else:
        (found.folder / name).write_bytes(b"\0damaged")
    assert run_experiment(experiment, cells, None) == 2
    shown = capsys.readouterr()
    assert f"not read: {found.name}: {found.folder / name}" in shown.err
    assert found.name in (runs_folder / "made/report/table.md").read_text()


@pytest.mark.parametrize("content", ["[" * 100_000, "\udcff", "null", "x" * 10_000])
def test_a_damaged_lock_of_a_dead_process_holds_nobody_up(content, tmp_path):
    (tmp_path / LOCK_NAME).write_text(content, errors="surrogateescape")
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_that_is_a_link_is_replaced(link, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link(victim, tmp_path / LOCK_NAME)
    with hold_lock(tmp_path):
        assert victim.read_text() == "precious"
    assert not os.path.lexists(tmp_path / LOCK_NAME)


def test_a_lock_from_the_future_becomes_stale_too(tmp_path):
    path = tmp_path / LOCK_NAME
    for seconds, held in ((STALE_SECONDS // 2, True), (10 * STALE_SECONDS, False)):
        path.write_text('{"pid": 1, "host": "elsewhere", "since": "x"}')
        later = path.stat().st_mtime + seconds
        os.utime(path, (later, later))
        if held:
            with pytest.raises(RunHeldElsewhere, match="try again in 3 minutes"), hold_lock(tmp_path):
                pass
        else:
            with hold_lock(tmp_path):
                pass


def test_a_record_that_cannot_be_written_is_found_finished_and_evaluated(record, monkeypatch, capsys):
    """As on a read-only disk. Root may write anywhere, so the calls that ask and write are told that they may not."""

    def refuse(*args, **kwargs):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("dual_lora.lab.config.paths.os.access", lambda *args: False)
    monkeypatch.setattr("dual_lora.lab.record.record.write_text", refuse)
    (record.folder / "checkpoints").mkdir()
    assert train_run(Run.prepare(load_settings(RUN)))["identity"] == record.name
    assert evaluate_command([f"run={record.folder}"]) == 0
    assert "not kept: " in capsys.readouterr().err and not (record.folder / "evaluation.json").exists()


def test_the_first_reason_of_an_attempt_is_kept(tmp_path):
    """Of several processes the others only find that the first one that failed is gone."""
    record, settings = Record(tmp_path), load_settings(RUN)
    record.prepare_folder(settings)
    record.write_failure(UserError("a follower's own reason"))
    assert record.read_failure()["message"] == "a follower's own reason"
    record.write_failure(RuntimeError("connection reset by peer"))
    assert record.read_failure() == {"error": "UserError", "message": "a follower's own reason"}
    record.prepare_folder(settings)  # the next attempt
    assert record.read_failure() is None


def test_details_of_a_failure_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:hunter2secret@mirror:9")
    Record(tmp_path).write_failure(UserError("no http://user:hunter2secret@mirror:9", examples=["hunter2secret", 3]))
    found = Record(tmp_path).read_failure()
    assert found["message"] == "no http://***@mirror:9" and found["examples"] == ["***", 3]


@pytest.mark.parametrize(("force", "code"), [(True, EXIT_ELSEWHERE), (False, EXIT_OK)])
def test_a_forced_run_that_another_process_holds_is_not_done(force, code, record):
    settings = replace_settings(load_recorded_settings(record.folder), {"force": force})
    run = Run.prepare(settings)
    before = run.record.read_result()
    with hold_lock(run.record.folder):
        execute_run(run)
        assert report_failures([run]) == code
    assert run.record.read_result() == before
