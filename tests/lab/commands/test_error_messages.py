"""Faults of the machine and of the program, as the last thing a user sees of a command."""

import errno
import re
import sys

import pytest
import torch

from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import EXIT_USER, UserError, describe_machine_error, translate_machine_errors
from dual_lora.lab.record import record as record_record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.train import trainer as train_trainer


def raised(error: Exception):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "a/b: Permission denied; check that you may read",
        ),
        (OSError(errno.EIO, "Input/output error", "a/b"), 2, "a/b: Input/output error; check the disk"),
        (ConnectionError("no route\nto host"), 2, "no route; check the disk or the network"),
        (MemoryError(), 2, "out of memory (MemoryError); close other programs"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "out of memory (CUDA out of memory. Tried)"),
        (KeyError("weights"), 1, "KeyError: KeyError('weights'); internal error"),
    ],
)
def test_whatever_ends_a_command_is_told_in_its_last_line(error, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as end:
        run_command(raised(error))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code and lines[-1].startswith(f"eval.py: {said}")
    assert (len(lines) == 1) == (code == EXIT_USER)  # the program's own faults keep their traceback


def test_only_faults_of_the_machine_are_taken_for_them():
    for error in (ValueError("another"), UserError("a process ran out of memory"), RuntimeError("size mismatch")):
        assert describe_machine_error(error) is None
        with pytest.raises(type(error), match=str(error)), translate_machine_errors():
            raise error


@pytest.mark.parametrize("where", ["no user's home", "a name too long"])
def test_runs_that_can_be_nowhere_are_told(where, monkeypatch, capsys):
    place = {"no user's home": "~nosuchuser/runs", "a name too long": "a" * 300}[where]
    monkeypatch.setattr(paths, "RUNS", record_record.Path(place))
    with pytest.raises(SystemExit) as end:
        run_command(raised(AssertionError("not come to")))
    assert end.value.code == EXIT_USER and "DUAL_LORA_RUNS=" in capsys.readouterr().err


def test_the_progress_bar_ends_before_a_failure_is_told(runs_folder, monkeypatch, capfd):
    def step(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(train_trainer.Trainer, "training_step", step)
    settings = load_settings(["model=tiny-roberta", "task=demo/sentiment", "wandb.mode=disabled", "eval.before=false"])
    run = Run.prepare(settings)
    execute_run(run)
    report_failures([run])
    said = capfd.readouterr().err
    assert re.search(r"(?m)^failed: ", said) and not re.search(r"s/it|it/s", said.splitlines()[-1])
