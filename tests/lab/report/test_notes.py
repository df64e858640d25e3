"""Notes below a table and its checklist: training data that are not whole, the run that each row starts from."""

from types import SimpleNamespace

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.report.protocol import iterate_checklist
from dual_lora.lab.report.table import describe_missing_rows, iterate_start_notes
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes

GLUE = ["model=tiny-roberta", "task=glue/mnli", "method=lora"]


def make_outcome(*words: str, rows: int = 15_130, origin: str = "MNLI/train.sample.tsv", start: str | None = None):
    settings = load_settings([*GLUE, *words])
    settings = SimpleNamespace(task=settings.task, train=settings.train, eval=settings.eval, init_from=start)
    result = {"data": {"train": {"rows": rows, "origin": origin}}}
    return SimpleNamespace(settings=settings, result=result, label="LoRA")


def test_a_part_of_the_training_file_is_told():
    assert describe_missing_rows(make_outcome()) == "training data: glue/mnli has 15,130 of the protocol's 392,702 rows"


@pytest.mark.parametrize(
    ("option", "rows", "note"),
    [
        ("task.options.train=15k", 15_000, None),
        ("task.options.train=15k", 9_000, "training data: commonsense has 9,000 of the protocol's 15,000 rows"),
        ("+task.options.scored=held_out", 168_000, None),  # of which copies of the rows held out are left out, too
    ],
)
def test_a_protocol_has_the_rows_that_its_options_give(option, rows, note):
    outcome = make_outcome("model=tiny-llama", "task=commonsense", option, rows=rows, origin="commonsense.json")
    assert describe_missing_rows(outcome) == note


@pytest.mark.parametrize(
    ("words", "rows", "origin"),
    [
        ([], 392_702, "MNLI/train.tsv"),
        (["eval.holdout=500", "eval.holdout_skip=202"], 392_000, "MNLI/train.tsv"),
        (["train.max_examples=64"], 64, "MNLI/train.tsv"),
        ([], 130_515, "train.json (130515 rows, not the official file; without HellaSwag)"),
    ],
)
def test_whole_data_rows_set_apart_and_what_is_told_already_are_not(words, rows, origin):
    assert describe_missing_rows(make_outcome(*words, rows=rows, origin=origin)) is None


def test_the_run_that_a_row_starts_from_is_named():
    experiment = SimpleNamespace(starts={"glue/mnli": "glue/qnli"})
    outcomes = [
        make_outcome(start="runs/nlu/best_s3"),
        make_outcome(start="runs/nlu/best_s3"),
        make_outcome(start=None),
    ]
    (note,) = iterate_start_notes(experiment, outcomes)
    assert note == "start: glue/mnli from the row's own best run of glue/qnli, without its head (LoRA best_s3)"
    (note,) = iterate_start_notes(experiment, [make_outcome()])
    assert note.endswith("without its head")


def test_no_scores_are_told_before_a_run_has_finished(runs_folder):
    experiment = Experiment.load("learning_rates", "smoke")
    cells = experiment.compose_cells([])
    lines = list(iterate_checklist(experiment, find_outcomes(cells, cells[0].settings.study)))
    assert f"runs: 0 of {len(cells)} finished; seeds 0" in lines
    assert not any(line.startswith("scores:") for line in lines)
