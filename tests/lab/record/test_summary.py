"""What a run says of itself: the rows it saw, and its global batch beside what it consists of."""

import pytest

from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import describe_data, format_summary
from dual_lora.lab.train.run import train_run
from tests.support.small_runs import settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.batch_size=8"], "8 examples"),
        (["train.batch_size=8", "train.accumulation=4"], "32 examples (8 a batch x 4 accumulated)"),
        (["train.batch_size=8", "hardware=ddp"], "16 examples (8 a batch x 1 accumulated x 2 devices)"),
    ],
)
def test_accumulation_and_global_batch_are_named(words, said):
    chosen = load_settings(words + (["hardware.devices=2"] if "hardware=ddp" in words else []))
    assert chosen.describe_batch() == said
    assert chosen.examples_per_step == int(said.split()[0]) and chosen.count_steps(64) == 3 * 64 // int(said.split()[0])


def test_a_run_and_a_plan_print_them(runs_folder, capsys):
    run = Run.prepare(settings("tiny-llama", "train.batch_size=4", "train.accumulation=2"))
    result = train_run(run)
    said = "4 steps of 8 examples (4 a batch x 2 accumulated), "
    assert said in capsys.readouterr().out and said in format_summary(result, run)
    older = {key: value for key, value in result.items() if key != "batch"}
    assert " for 4 steps, " in format_summary(older, run)
    assert train_command(["train.batch_size=4", "train.accumulation=2", "plan=true"]) == 0
    assert "\nstep     8 examples (4 a batch x 2 accumulated); 1,024 tokens and " in capsys.readouterr().out


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
