"""Rows set apart: rates are chosen on some, scores are reported on others, and neither are trained on."""

from pathlib import Path

import pytest

import tasks
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import format_settings, parse_recorded_settings, replace_settings
from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.splits import load_development_split, load_scored_splits, load_split
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.study.experiment import Experiment

BASE = ["model=tiny-roberta", "task=demo/sentiment"]
TUNED = {
    "title": "Disjoint",
    "columns": "task.name",
    "cells": {"LoRA": ["method=lora"]},
    "tune": {"holdout": 30, "grid": {"LoRA": [1e-3, 2e-3]}},
    "full": {"seeds": [0], "run": [*BASE, "eval.holdout=50"]},
}


def read_ids(settings) -> tuple[set[str], set[str]]:
    """Return the ids of the rows a run trains on and those it is evaluated on."""
    task = tasks.load("demo/sentiment")
    scored = load_scored_splits(task, settings)["validation"]
    return set(load_split(task, "train", settings).rows["id"]), set(scored.rows["id"])


def test_rates_are_chosen_on_other_rows_than_scores_are_reported_on():
    (cell,) = Experiment.from_content("made", TUNED).compose_cells([])
    trained, reported = read_ids(cell.settings)
    assert (len(trained), len(reported)) == (1950, 50) and not trained & reported
    for trial in cell.tuning:
        trained, chosen_on = read_ids(trial)
        assert (len(trained), len(chosen_on)) == (1920, 30)
        assert not chosen_on & reported and not trained & (chosen_on | reported)


def test_trials_of_runs_that_report_their_tasks_own_rows_are_what_they_were():
    own = TUNED | {"full": {"seeds": [0], "run": BASE}}
    (cell,) = Experiment.from_content("made", own).compose_cells([])
    (first, _) = cell.tuning
    assert first.eval.holdout_skip is None and "holdout_skip" not in serialize_identity_settings(first)


def test_too_many_rows_set_apart_are_refused_and_rows_to_skip_need_rows_to_use():
    settings = load_settings([*BASE, "eval.holdout=1000", "eval.holdout_skip=1000"])
    with pytest.raises(UserError, match="eval.holdout=1000 eval.holdout_skip=1000: .* has 2000 rows; set fewer apart"):
        load_split(tasks.load("demo/sentiment"), "train", settings)
    with pytest.raises(UserError, match="eval.holdout_skip=9: needs eval.holdout"):
        load_settings([*BASE, "eval.holdout_skip=9"])


@pytest.mark.parametrize(
    ("name", "load"), [("holdout", load_scored_splits), ("development_rows", load_development_split)]
)
def test_rows_set_apart_that_stand_among_the_training_rows_are_counted(name, load, tmp_path, capfd):
    """Copies with another label are none; of a sample of the training rows, only those in it count."""
    rows = [f"text {n // 2},{n // 2 % 2}" for n in range(40)] + [f"lone {n},{n % 2}" for n in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows, "lone 1,0", ""]))
    (tmp_path / "test.csv").write_text("text,label\na,0\nb,1\n")
    words = ["model=tiny-roberta", "task=classification", f"data_dir={tmp_path}", f"eval.{name}=30"]
    words += ["train.early_stopping=3"] if name == "development_rows" else []

    def count(*more: str) -> int:
        settings = load_settings([*words, *more])
        task = load_task(settings)
        (apart,) = load(task, settings).values()
        train = [(row["text"], row["label"]) for row in load_split(task, "train", settings).rows]
        found = sum((row["text"], row["label"]) in train for row in apart.rows)
        said = f"train.csv (set apart): {found} of 30 rows set apart also occur among the training rows\n"
        assert apart.describe().get("in_training", 0) == found and (said in capfd.readouterr().err) == bool(found)
        return found

    assert 0 < count("train.max_examples=9") < count()


def test_rows_with_a_prompt_that_is_trained_on_are_counted(tmp_path, capfd):
    """The texts may differ: what is scored is what a model writes to the prompt."""
    rows = [f"question {n // 2},answer {n}" for n in range(40)] + [f"another {n},answer" for n in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["prompt,response", *rows, ""]))
    (tmp_path / "test.csv").write_text("prompt,response\na,0\nb,1\n")
    settings = load_settings(["model=tiny-llama", "task=instruction", f"data_dir={tmp_path}", "eval.holdout=30"])
    task = load_task(settings)
    (apart,) = load_scored_splits(task, settings).values()
    known = {row["prompt"] for row in load_split(task, "train", settings).rows}
    found = sum(row["prompt"] in known for row in apart.rows)
    assert 0 < found == apart.describe()["in_training"] and f"{found} of 30 rows set apart" in capfd.readouterr().err


def test_rows_that_are_all_different_give_no_warning(capfd):
    settings = load_settings([*BASE, "eval.holdout=50"])
    (apart,) = load_scored_splits(tasks.load("demo/sentiment"), settings).values()
    assert "in_training" not in apart.describe() and "set apart" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.holdout=60"], "eval.holdout=60: the training rows of commonsense are of several sets, which it scores"),
        (
            ["eval.holdout=60", "+task.options.scored=held_out"],
            r"eval.holdout=60: .* one by one; drop it \(\+task.options.scored=held_out scores training rows set by",
        ),
        (
            ["eval.development_rows=60", "task.checkpoint=best"],
            r"eval.development_rows=60: .* one by one; drop it \(task.checkpoint=best_loss keeps the best weights by",
        ),
    ],
)
def test_rows_of_several_sets_are_not_scored_as_one(words, said):
    with pytest.raises(UserError, match=said):
        load_settings(["model=tiny-llama", "task=commonsense", *words])


@pytest.mark.parametrize(
    ("name", "load"), [("holdout", load_scored_splits), ("development_rows", load_development_split)]
)
def test_a_run_whose_rows_of_several_sets_were_scored_as_one_can_be_read_and_not_be_done_again(name, load):
    settings = load_settings(["model=tiny-llama", "task=commonsense"])
    older = replace_settings(settings, {f"eval.{name}": 60, "task.checkpoint": "best"})
    assert parse_recorded_settings(Path("config.yaml"), format_settings(older), paths.CONF) == older
    with pytest.raises(UserError, match=f"^eval.{name}=60: the training rows of commonsense are of several sets"):
        load(load_task(older), older)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [("eval.holdout=60", "options.scored", "held_out"), ("eval.development_rows=60", "checkpoint", "best_loss")],
)
def test_what_there_is_instead_composes(word, key, value):
    words = ["model=tiny-llama", "task=commonsense"]
    with pytest.raises(UserError) as told:
        load_settings([*words, word, *(["task.checkpoint=best"] if "development" in word else [])])
    option = str(told.value).rpartition("(")[2].partition(" ")[0]
    assert get_setting(load_settings([*words, option]), f"task.{key}") == value


@pytest.mark.parametrize("form", ["tokenised", "official"])
def test_an_option_about_the_scored_rows_is_idle_beside_rows_held_out(form):
    words = ["model=tiny-gpt2", "task=e2e", f"task.options.references={form}", "task.options.scored=validation"]
    with pytest.raises(UserError, match="^task.options.scored=validation: eval.holdout=9 scores training rows instead"):
        load_settings([*words, "eval.holdout=9"])
    load_settings(words)


def test_options_of_own_files_that_are_idle_beside_rows_held_out(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(40)))
    words = ["model=tiny-roberta", "task=classification", f"data_dir={tmp_path}", "eval.holdout=9"]
    for option in ("held_out=0.3", "split_seed=1"):
        with pytest.raises(UserError, match=f"^task.options.{option}: eval.holdout=9 scores training rows instead"):
            load_settings([*words, f"task.options.{option}"])
    (tmp_path / "test.csv").write_text("text\nno labels\n")
    assert load_settings([*words, "task.options.scored=validation"]).eval.holdout == 9


def test_the_separator_is_a_part_of_prompts_that_are_no_messages():
    words = ["model=tiny-llama", "model.chat=true", "task.options.separator=' =>'"]
    assert load_settings([*words, "task=e2e"]).task.options["separator"] == " =>"
    with pytest.raises(UserError, match="^task.options.separator= =>: with model.chat=true the chat template"):
        load_settings([*words, "task=instruction"])
