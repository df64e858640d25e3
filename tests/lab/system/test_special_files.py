"""Pipes and devices in place of files are named in one line, and nobody waits for them."""

import os

import pytest

from dual_lora.analysis.cells.rows import StudyError, read_rows
from dual_lora.lab.config.outside.models import read_config_json
from dual_lora.lab.config.outside.plugins import import_plugin
from dual_lora.lab.config.paths import load_yaml, read_json_object
from dual_lora.lab.errors import UserError
from dual_lora.lab.system.lock import LOCK_NAME, hold_lock
from tasks.base import TaskError, read_text

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
