"""Pipes and devices in place of files, full disks, and what killed writers leave: named in one line, nobody waits."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest

from dual_lora.analysis.cells import StudyError, read_rows
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.outside.models import read_config_json
from dual_lora.lab.config.outside.plugins import import_plugin
from dual_lora.lab.config.paths import load_yaml, read_json_object
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate import export as evaluate_export
from dual_lora.lab.system.lock import LOCK_NAME, hold_lock
from dual_lora.lab.weights import save
from tasks.base import TaskError, read_text
from tests.support.finished_runs import export

READERS = {
    "settings.yaml": load_yaml,
    "config.json": lambda path: read_config_json(path.parent),
    "plugin.py": lambda path: import_plugin(str(path)),
    "result.json": lambda path: read_json_object(path, "remedy"),
    "rows.jsonl": read_rows,
    "train.tsv": read_text,
}


@pytest.mark.parametrize("device", [None, "/dev/zero"])
@pytest.mark.parametrize("name", READERS)
def test_nobody_reads_a_pipe_or_a_device(name, device, tmp_path):
    path = tmp_path / name
    if device:
        path.symlink_to(device)
    else:
        os.mkfifo(path)
    with pytest.raises((UserError, TaskError, StudyError), match=f"{name}: .*not a file"):
        READERS[name](path)


def test_a_lock_that_is_a_pipe_is_replaced(tmp_path):
    os.mkfifo(tmp_path / LOCK_NAME)
    with hold_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()
    assert not list(tmp_path.iterdir())


@contextmanager
def limit_file_size(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_updates_that_the_disk_does_not_hold_are_refused_in_one_line(trained, tmp_path):
    reason = os.strerror(errno.EFBIG)
    said = f"u.safetensors: cannot be written .{reason}.; free some space there, or give another file as save_updates="
    with pytest.raises(UserError, match=said), limit_file_size(4096):
        evaluate_command([f"run={trained}", f"save_updates={tmp_path / 'u.safetensors'}"])
    assert not list(tmp_path.iterdir())


def test_updates_do_not_replace_a_file_written_meanwhile(trained, tmp_path, monkeypatch):
    file, write = tmp_path / "u.safetensors", save.save_file

    def write_after_another(*args, **options):
        file.write_text("another's")
        write(*args, **options)

    monkeypatch.setattr(save, "save_file", write_after_another)
    with pytest.raises(UserError, match="another process wrote it"):
        evaluate_command([f"run={trained}", f"save_updates={file}"])
    assert file.read_text() == "another's" and list(tmp_path.iterdir()) == [file]


def test_an_export_names_what_a_killed_one_left(trained, tmp_path, monkeypatch, capsys):
    mine, other = tmp_path / "out[1]", tmp_path / "out1"
    with pytest.MonkeyPatch.context() as patch:  # killed before it removed anything
        patch.setattr(evaluate_export, "remove_path", lambda path: None)
        patch.setattr(evaluate_export, "check_weights", lambda *args: 1 / 0)
        for folder in (mine, other):
            with pytest.raises(ZeroDivisionError):
                export(trained, folder)
    (left,) = tmp_path.glob(".out[[]*")
    capsys.readouterr()
    export(trained, mine)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unfinished export" in line]
    assert lines == [f"{left}: an unfinished export; remove it, unless it is still being written"]
    assert left.is_dir()
