"""Notes below a table: training data that are not whole, and the run that each row starts from."""

from types import SimpleNamespace

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.report.analyses.ranks import read_analyses
from dual_lora.lab.report.table import describe_missing_rows, iterate_start_notes

GLUE = ["model=tiny-roberta", "task=glue/mnli", "method=lora"]


def make_outcome(*words: str, rows: int = 15_130, origin: str = "MNLI/train.sample.tsv", start: str | None = None):
    settings = load_settings([*GLUE, *words])
    settings = SimpleNamespace(task=settings.task, train=settings.train, eval=settings.eval, init_from=start)
    result = {"data": {"train": {"rows": rows, "origin": origin}}}
    return SimpleNamespace(settings=settings, result=result, label="LoRA")


def test_a_part_of_the_training_file_is_told():
    assert describe_missing_rows(make_outcome()) == "training data: glue/mnli has 15,130 of the protocol's 392,702 rows"


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


# Analyses of several models and tasks


def analyse(model: str, task: str, seed: int = 0, label: str = "LoRA", name: str = "run"):
    """Return an analysed run whose analysis says which one it is."""
    settings = SimpleNamespace(model=SimpleNamespace(name=model), task=SimpleNamespace(name=task), seed=seed)
    record = SimpleNamespace(name=name, read_sealed=lambda *_: {"of": (model, task, seed, name)})
    return SimpleNamespace(label=label, settings=settings, record=record)


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([("a", "t"), ("b", "t")], ["LoRA, a", "LoRA, b"]),
        ([("a", "t"), ("a", "u")], ["LoRA, t", "LoRA, u"]),
        ([("a", "t", 0), ("b", "t", 1)], ["LoRA, a, seed 0", "LoRA, b, seed 1"]),
        ([("a", "t", 0), ("a", "t", 0, "DoRA")], ["LoRA", "DoRA"]),
        ([("a", "t", 0, "LoRA", "r4"), ("a", "t", 0, "LoRA", "r8")], ["LoRA, r4", "LoRA, r8"]),
    ],
    ids=str,
)
def test_no_analysis_stands_in_the_place_of_another(runs, names):
    outcomes = [analyse(*run) for run in runs]
    found = read_analyses(outcomes)
    assert list(found) == names
    assert [content["of"] for content in found.values()] == [outcome.record.read_sealed()["of"] for outcome in outcomes]
