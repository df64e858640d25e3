"""The checkpoint of the lowest loss on training rows set apart: which rows, which weights, resuming, and its report."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.splits import load_scored_splits, load_split, read_split, read_training_split
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.callbacks import LOSS_COLUMN
from dual_lora.lab.train.run import evaluate_splits, train_run
from dual_lora.lab.train.trainer import RunTrainer

SHORT = ["model=tiny-roberta", "task=demo/sentiment", "train.max_steps=7", "train.batch_size=4", "train.log_steps=1"]
SHORT += ["train.max_examples=64", "eval.max_examples=8", "eval.before=false", "wandb.mode=disabled"]
BEST = ["task.checkpoint=best_loss", "task.validation_rows=12", "task.validation_steps=2"]


def choose(*words: str):
    return load_settings([*SHORT, *words])


def ids(split) -> list[str]:
    return list(split.rows["id"])


def test_the_rows_are_those_the_published_scripts_draw_and_nothing_else_uses_them():
    settings = choose(*BEST, "train.max_examples=null", "eval.holdout=8")
    task = load_task(settings)
    whole = read_split(task, "train", settings)
    expected = whole.rows.train_test_split(test_size=12, shuffle=True, seed=42)["test"]["id"]
    rest, apart = read_training_split(task, settings)
    trained, (scored,) = load_split(task, "train", settings), load_scored_splits(task, settings).values()
    assert ids(apart) == list(expected) and len(rest.rows) == len(whole.rows) - 12
    parts = [set(ids(part)) for part in (apart, trained, scored)]
    assert [len(part) for part in parts] == [12, len(whole.rows) - 20, 8] and len(set.union(*parts)) == len(whole.rows)


def test_the_defaults_are_the_published_ones_and_a_run_without_them_is_as_before():
    task = choose("task.checkpoint=best_loss").task
    assert (task.validation_size, task.validation_interval) == (120, 80) and choose().task.validation_size == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.checkpoint=best", "task.validation_rows=5"], "not with task.checkpoint=best"),
        (["task.validation_steps=5"], "no rows are set apart; give task.validation_rows"),
        (["task.checkpoint=best_los"], "not one of last, best, best_loss"),
        (["task.warmup_steps=5", "task.warmup_ratio=0.1"], "task.warmup_steps=5 is used instead"),
        (["task.warmup_steps=5", "train.schedule=constant"], "has no warm-up"),
        (["task.head_dropout=1"], r"must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_impossible_settings_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        choose(*words)
    assert "\n" not in str(caught.value)


def test_too_many_rows_set_apart_are_refused(runs_folder):
    with pytest.raises(UserError, match=r"^task.validation_rows=99999: .* has \d+ rows; set fewer apart"):
        train_run(Run.prepare(choose("task.validation_rows=99999")))


@pytest.fixture
def losses(monkeypatch):
    """The losses that are taken, by step: 2, 4, 6 and 7, the last."""
    found = {2: 0.9, 4: 0.2, 6: 0.5, 7: 0.7}
    monkeypatch.setattr(RunTrainer, "measure_loss", lambda self, _: found[self.state.global_step])
    return found


def trained_weights(record: Record, settings) -> dict[str, torch.Tensor]:
    (file,) = record.get_weights_folder(settings).glob("*.safetensors")
    return load_file(file)


def test_the_weights_of_the_lowest_loss_are_scored_and_the_last_step_beside_them(runs_folder, losses):
    settings = choose(*BEST)
    result = train_run(Run.prepare(settings))
    record = Record(runs_folder / "adhoc" / result["identity"])
    assert {row["step"]: row[LOSS_COLUMN] for row in record.read_log() if LOSS_COLUMN in row} == losses
    assert result["validation_loss"] == 0.2 and result["best_epoch"] == pytest.approx(4 / 16)
    assert result["metrics_last_epoch"].keys() == result["metrics"].keys()
    # a run whose lowest loss is that of step 4 has the weights that training had after it
    losses[4], losses[7] = 0.7, 0.2
    last = train_run(Run.prepare(choose(*BEST, "study=other")))
    other = Record(runs_folder / "other" / last["identity"])
    assert last["metrics_last_epoch"] == last["metrics"] == result["metrics_last_epoch"]
    mine, theirs = trained_weights(record, settings), trained_weights(other, settings)
    assert mine.keys() == theirs.keys() and any(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_failure_while_the_last_step_is_scored_costs_no_training(runs_folder, losses, monkeypatch):
    settings, real = choose(*BEST, "train.save_minutes=null"), evaluate_splits

    def evaluate(*args):
        assert args[-1] != "last step", "fails"
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="fails"):
        patch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)
        train_run(Run.prepare(settings))
    monkeypatch.setattr(RunTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    result = train_run(Run.prepare(settings))
    assert (result["steps"], result["validation_loss"], result["best_epoch"]) == (7, 0.2, pytest.approx(4 / 16))
    assert result["metrics_last_epoch"].keys() == result["metrics"].keys()


def test_a_loss_that_is_no_number_ends_the_run(runs_folder, monkeypatch):
    real = Trainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        return real(self, model, *args, **kwargs) * (1.0 if model.training else float("nan"))

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="^the validation loss is nan at step 2; .*float32; last good checkpoint: n"):
        train_run(Run.prepare(choose("task.validation_rows=4", "task.validation_steps=2")))


def test_taking_the_loss_changes_no_step_and_it_is_the_mean_over_the_rows(runs_folder):
    logged = {}
    for name, every in (("often", 1), ("seldom", 100)):
        words = ["task.validation_rows=12", f"task.validation_steps={every}", f"study={name}"]
        result = train_run(Run.prepare(choose(*words)))
        log = Record(runs_folder / name / result["identity"]).read_log()
        logged[name] = [row["train/loss"] for row in log if "train/loss" in row], log
        assert result["best_epoch"] is None and result["validation_loss"] > 0
    assert logged["often"][0] == logged["seldom"][0] and len(logged["often"][0]) == 7
    taken = [[row[LOSS_COLUMN] for row in log if LOSS_COLUMN in row] for _, log in logged.values()]
    assert len(taken[0]) == 7 and len(taken[1]) == 1 and taken[0][-1] == taken[1][0]


def test_the_plan_leaves_the_rows_out():
    from dual_lora.lab.train.plan import count_training_rows

    settings = load_settings(["model=llama3-8b", "task=commonsense", "task.checkpoint=best_loss"])
    assert count_training_rows(settings, load_task(settings)) == (170_300, "the task's configuration", "")


@pytest.mark.parametrize(("model", "module"), [("tiny-roberta", "classifier.dropout"), ("tiny-deberta", "dropout")])
def test_the_dropout_before_the_head_is_set(model, module):
    from dual_lora.lab.model.load import load_model

    for given, expected in (("null", 0.1), ("0.25", 0.25), ("0", 0.0)):
        settings = load_settings([f"model={model}", "task=demo/sentiment", f"task.head_dropout={given}"])
        found = load_model(settings, load_task(settings))[0]
        own = found.config.hidden_dropout_prob
        assert found.get_submodule(module).p == (own if given == "null" else expected)


def test_a_model_without_such_a_dropout_is_refused():
    from dual_lora.lab.model.load import load_model

    settings = load_settings(["model=tiny-llama", "task=demo/sentiment", "task.head_dropout=0.1"])
    with pytest.raises(UserError, match=r"^task.head_dropout=0.1: a llama has no dropout before its head; drop it$"):
        load_model(settings, load_task(settings))


def test_the_rate_rises_over_the_steps_given(runs_folder):
    result = train_run(Run.prepare(choose("task.warmup_steps=4", "train.lr=1e-3")))
    log = Record(runs_folder / "adhoc" / result["identity"]).read_log()
    rates = [row["train/learning_rate"] for row in log if "train/learning_rate" in row]
    assert rates.index(max(rates)) == 4 and max(rates) == pytest.approx(1e-3) and rates[1] == pytest.approx(2.5e-4)
