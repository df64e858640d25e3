"""Early stopping: judged on rows that are neither trained on nor reported, and safe to stop and resume."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import evaluate_splits
from dual_lora.lab.inputs.splits import load_development_split, load_scored_splits, load_split
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.signals import STOP
from dual_lora.lab.train.callbacks import BestEpoch
from dual_lora.lab.train.run import train_run
from tests.support.killed_runs import Killed, at_step, chosen, kept, kill, stopped

BASE = ["model=tiny-roberta", "task=demo/sentiment"]
EARLY = ["train.early_stopping=2", "eval.development_rows=30", "train.max_steps=null", "train.epochs=9"]


@pytest.fixture
def falling(monkeypatch):
    """Scores of epochs 1, 2, 3, ... that rise to the second and then fall; by the steps taken, so that a second
    measuring gives them again. Returns the titles and row ids of every scoring."""
    seen, real, epochs = [], evaluate_splits, {3: 0.5, 6: 0.8, 9: 0.8, 12: 0.7}

    def evaluate(model, tokenizer, task, splits, settings, title):
        _, predictions = real(model, tokenizer, task, splits, settings, title)
        seen.append((title, frozenset(row["id"] for row in predictions)))
        steps = {int(f.step) for f in model.modules() if hasattr(f, "update_scale")}.pop() - 1  # it begins with one
        return {"accuracy": epochs.get(steps, 0.1)}, predictions

    monkeypatch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)
    return seen


def count_up(*overrides: str):
    """A run of three steps an epoch, whose ramp counts them to the end."""
    return chosen(*EARLY, "method.ramp_share=0.9", *overrides)


def test_training_ends_when_epochs_stop_improving_and_keeps_the_best(runs_folder, falling, capsys):
    settings = count_up("task.checkpoint=last", "eval.before=false")
    result = train_run(Run.prepare(settings))
    assert (result["steps"], result["best_epoch"]) == (12, 2.0)
    assert "\nkept     epoch 2 of 4 (9 planned), by 8 development rows\n" in capsys.readouterr().out
    folder = runs_folder / "adhoc" / result["identity"]
    steps = {int(t) for name, t in load_file(folder / "adapter/adapter_model.safetensors").items() if "step" in name}
    assert steps == {7}  # the ramp of the best epoch, not of the last
    rows = [row for row in Record(folder).read_log() if "development/accuracy" in row]
    assert [(row["step"], row["development/accuracy"]) for row in rows] == [(3, 0.5), (6, 0.8), (9, 0.8), (12, 0.7)]
    titles, ids = zip(*falling, strict=True)
    assert titles == ("epoch",) * 4 + ("after",) and len(set(ids[:4])) == 1 and not ids[0] & ids[4]
    assert result["development"]["rows"] == 8 and result["metrics_last_epoch"] is None
    assert load_recorded_settings(folder) == settings


def test_rows_to_judge_by_are_neither_trained_on_nor_reported():
    task, words = tasks.load("demo/sentiment"), [*BASE, *EARLY]
    for reported in ([], ["eval.holdout=50", "eval.holdout_skip=20"]):
        settings = load_settings([*words, *reported])
        trained = set(load_split(task, "train", settings).rows["id"])
        (scored,), (judged,) = (
            load_scored_splits(task, settings).values(),
            load_development_split(task, settings).values(),
        )
        scored, judged = set(scored.rows["id"]), set(judged.rows["id"])
        assert len(judged) == 30 and not judged & (trained | scored) and not trained & scored
        assert len(trained) == 2000 - settings.eval.reserved_rows == (1900 if reported else 1970)
    assert load_development_split(task, load_settings(BASE)) is None


def test_it_resumes_to_the_same_bytes_wherever_it_was_stopped(runs_folder, reference, falling):
    settings = count_up("train.save_steps=2")
    whole = reference(settings)
    record = stopped(settings, 6)  # the end of an epoch, before it is scored
    with at_step(11, kill), pytest.raises(Killed):  # after one epoch without a better score
        train_run(Run.prepare(settings))
    stopped(settings, 12)  # before the score that ends training
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole and whole["result"]["steps"] == 12


def test_a_stop_between_the_last_step_of_an_epoch_and_its_score_ends_the_run_there(monkeypatch):
    """The step's own look at the signal came too early. After resuming the epoch is scored, as without the stop."""
    log = type("Log", (), {"write_scores": lambda *_: None})()
    best = BestEpoch(lambda title: ({"accuracy": 0.5}, []), "accuracy", log)
    state = type("State", (), {"global_step": 3, "max_steps": 9, "epoch": 1.0})()
    control, model = TrainerControl(), torch.nn.Linear(1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(STOP, "asked", "SIGTERM")
        best.on_epoch_end(None, state, control, model=model)
    assert control.should_save and control.should_training_stop and best.scored == 0
    resumed = TrainerControl()
    best.on_train_begin(None, state, resumed, model=model)
    assert (best.best, best.epoch, best.scored) == (0.5, 1.0, 3)
    monkeypatch.setattr(STOP, "asked", "SIGTERM")
    best.on_epoch_end(None, state, resumed, model=model)  # scored: nothing is lost, the next step stops
    assert not resumed.should_save and not resumed.should_training_stop


def test_of_scores_that_should_be_low_the_lowest_is_kept(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    log = type("Log", (), {"write_scores": lambda *_: None})()
    best = BestEpoch(lambda title: ({"loss": next(scores)}, []), "loss", log, lower=True, patience=1)
    control, model = type("Control", (), {"should_training_stop": False})(), torch.nn.Linear(1, 1)
    for epoch in (1, 2, 3):
        assert not control.should_training_stop
        state = type("State", (), {"global_step": epoch, "max_steps": 9, "epoch": float(epoch)})()
        best.on_epoch_end(None, state, control, model=model)
    assert (best.best, best.epoch, control.should_training_stop) == (1.0, 2.0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.early_stopping=2"], "train.early_stopping=2: needs eval.development_rows=N"),
        (["train.early_stopping=0", "eval.development_rows=5"], "train.early_stopping=0: must be positive"),
        (["eval.development_rows=5"], "eval.development_rows=5: nothing compares epochs; set train.early_stopping"),
        (["eval.development_rows=5", "task.checkpoint=best_loss"], "eval.development_rows=5: nothing compares epochs"),
        ([*EARLY, "task.validation_rows=5"], "train.early_stopping=2: not with task.validation_rows"),
        ([*EARLY, "task.checkpoint=best_loss"], "train.early_stopping=2: not with task.checkpoint=best_loss"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_settings([*BASE, *words])


def test_too_many_rows_are_refused():
    settings = load_settings([*BASE, *EARLY, "eval.development_rows=2000", "eval.holdout=9"])
    with pytest.raises(
        UserError, match="^eval.holdout=9 eval.development_rows=2000: .* has 2000 rows; set fewer apart"
    ):
        load_split(tasks.load("demo/sentiment"), "train", settings)
