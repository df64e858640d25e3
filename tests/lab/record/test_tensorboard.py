"""TensorBoard files: a copy of the log, also of a resumed run, which no failure of it can end."""

import importlib.util
import json

import pytest

from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.tensorboard import Board
from dual_lora.lab.train.run import train_run
from tests.support.killed_runs import SMALL, Killed, at_step, chosen, kill

ON = "tensorboard=true"


def read_board(folder) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run's TensorBoard files, with every point that they hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def list_points(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_the_files_hold_the_log_also_of_a_run_that_was_killed(runs_folder):
    pytest.importorskip("tensorboard")
    settings = chosen(ON, "train.save_steps=2", "train.log_steps=1")
    assert Run.prepare(settings).identity == Run.prepare(chosen("train.log_steps=1")).identity
    with at_step(6, kill), pytest.raises(Killed):
        train_run(Run.prepare(settings))
    result = train_run(Run.prepare(settings))
    folder = runs_folder / "adhoc" / result["identity"]
    rows = Record(folder).read_log()
    assert len(rows) == 9 and read_board(folder) == list_points(rows)


def test_without_the_package_it_is_refused_before_anything_is_loaded(runs_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    with pytest.raises(UserError, match=r"^tensorboard=true: not installed; pip install -e '.\[tensorboard\]'$"):
        train_command([*SMALL, ON])


def test_a_failing_board_ends_with_one_line_and_the_run_goes_on(capsys):
    class Writer:
        def add_scalar(self, *args):
            raise OSError("No space left on device\nmore")

    board = Board(Writer())
    for step in (1, 2):
        board.log({"step": step, "train/loss": 1.0})
    board.finish()
    assert capsys.readouterr().err == "TensorBoard files of this run end here (No space left on device)\n"


def test_it_is_off_by_default_and_distinguishes_no_runs(runs_folder):
    assert not load_settings(SMALL).tensorboard
    assert [run.differences for run in map(Run.prepare, [chosen(), chosen(ON)])] == [{}, {}]
    assert json.dumps(chosen(ON).tensorboard) == "true"
