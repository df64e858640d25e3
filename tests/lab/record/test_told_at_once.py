"""What a user is told of runs: which rows they saw, and why one fails, before the next starts."""

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import prepare_runs
from dual_lora.lab.record.summary import describe_data
from dual_lora.lab.study import schedule
from dual_lora.lab.study.time_left import TimeLeft
from tests.support.small_runs import TINY

HELD_OUT = "tickets.csv, 10 % set apart with seed 0"


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            {"train": {"origin": "t", "rows": 2700}, "validation": {"origin": HELD_OUT, "rows": 300}},
            f"2,700 rows to train on, 300 scored ({HELD_OUT})",
        ),
        (
            {
                "train": {"origin": "t", "rows": 9},
                "a": {"origin": "a.json", "rows": 3},
                "b": {"origin": "b", "rows": 4},
            },
            "9 rows to train on, 7 scored (2 sets)",
        ),
        ({"test": {"origin": "test.csv", "rows": 4}}, "4 scored (test.csv)"),  # the base model alone
    ],
)
def test_a_run_says_which_rows_it_saw(splits, said):
    assert describe_data(splits) == said


@pytest.mark.parametrize(("error", "times"), [("UserError", 1), ("RuntimeError", 0), ("RunHeldElsewhere", 0)])
def test_a_failure_is_told_before_the_next_run_starts(error, times, runs_folder, monkeypatch, capfd):
    """Once: what is no UserError is printed where it is caught, with its traceback."""
    runs = prepare_runs([load_settings([*TINY, f"seed={seed}"]) for seed in (0, 1)])
    failures = iter([{"error": error, "message": "no such thing; take another"}, None])
    monkeypatch.setattr(schedule, "execute_run", lambda run: print("started") or next(failures))
    schedule.run_in_process(runs, TimeLeft())
    shown = capfd.readouterr()
    assert shown.out.count("started") == 2
    told = f"failed: {runs[0].record.format_path()}: no such thing; take another"
    assert shown.err.splitlines() == [told] * times
