"""Runs that are stopped, killed or broken anywhere: the same command again ends with the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from dual_lora.lab.commands import guard as commands_guard
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.guard import run_command, run_guarded
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import list_choices
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import (
    EXIT_ELSEWHERE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER,
    RunHeldElsewhere,
    Stopped,
    UserError,
    translate_memory_errors,
)
from dual_lora.lab.evaluate.evaluate import evaluate_splits, find_warnings
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.record import RERUN_FOLDER, TRAINED_FILE, Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.system import lock
from dual_lora.lab.system.files import translate_save_errors
from dual_lora.lab.system.lock import LOCK_NAME, STALE_SECONDS, acquire_lock, hold_lock
from dual_lora.lab.system.memory import suggest_smaller_batch
from dual_lora.lab.system.sealed import MANIFEST, parse_checkpoint_step, read_seal, seal_folder
from dual_lora.lab.system.signals import STOP
from dual_lora.lab.train import trainer as train_trainer
from dual_lora.lab.train.callbacks import STATE_FILE, BestEpoch, LogCallback
from dual_lora.lab.train.optimizer_state import OPTIMIZER_FILE, load_random_state, save_random_state
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import LengthSampler, RunTrainer, StopAndResume
from tests.support.killed_runs import Killed, at_step, chosen, kept, kill, stopped, terminate


@pytest.mark.parametrize(
    ("method", "steps"),
    [("full", [2]), ("lora", [3]), ("lora_plus", [2]), ("dora", [5]), ("dual_lora", [1, 3, 5, 7])],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(method, steps, runs_folder, reference):
    settings = chosen(f"method={method}", *([] if method == "full" else ["method.dropout=0.1"]))
    whole = reference(settings)
    for step in steps:
        record = stopped(settings, step)
        assert parse_checkpoint_step(record.find_checkpoint()) == step
        assert record.read_result() is None and record.read_failure() is None
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole
    assert not (record.folder / "checkpoints").exists() and not (record.folder / TRAINED_FILE).exists()


@pytest.mark.parametrize(("processes", "steps"), [(1, [4, 5, 6]), (2, [3, 4, 5])])
def test_batches_of_like_length_go_on_to_the_same_bytes(processes, steps, runs_folder, reference, monkeypatch):
    """Stopped in the middle of the second epoch and at its end; also with the batches that the first of two has."""
    real = RunTrainer.get_train_dataloader

    def share(self):
        return prepare_data_loader(real(self).base_dataloader, num_processes=processes, process_index=0)

    monkeypatch.setattr(RunTrainer, "get_train_dataloader", share)
    settings = chosen("method=lora", "method.dropout=0.1", "train.group_by_length=true", "train.max_steps=8")
    whole = reference(settings)
    for step in steps:
        record = stopped(settings, step)
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole


def test_batches_of_like_length_hold_every_row_once_an_epoch(runs_folder, monkeypatch):
    seen, real = [], RunTrainer.training_step

    def training_step(self, model, inputs, *args):
        seen.append(inputs["row"].tolist())
        return real(self, model, inputs, *args)

    monkeypatch.setattr(RunTrainer, "training_step", training_step)
    train_run(Run.prepare(chosen("train.group_by_length=true", "train.max_steps=null", "train.epochs=3")))
    epochs = [[row for batch in seen[start : start + 5] for row in batch] for start in (0, 5, 10)]
    assert len(seen) == 15 and all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_of_like_length_follow_from_seed_and_epoch_alone(processes):
    """Whatever was drawn before, in each process, and after batches that are skipped."""

    def list_batches(seed: int, epoch: int, process: int, skipped: int = 0) -> list[list[int]]:
        torch.rand(1 + 7 * process + epoch)
        sampler = LengthSampler([1 + i * i % 13 for i in range(40)], 8, seed)
        loader = DataLoader(list(range(40)), batch_size=4, sampler=sampler, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process)
        loader.set_epoch(epoch)
        return list(skip_first_batches(loader, skipped) if skipped else loader)

    whole = [list_batches(3, 1, process) for process in range(processes)]
    assert sorted(row for batches in whole for batch in batches for row in batch) == list(range(40))
    for process, batches in enumerate(whole):
        assert list_batches(3, 1, process) == batches
        assert list_batches(3, 1, process, skipped=2) == batches[2:]
        assert batches not in (list_batches(3, 2, process), list_batches(4, 1, process), list_batches(4, 0, process))


@pytest.mark.parametrize("method", ["dual_lora", "full"])
def test_checkpoints_that_fall_due_by_time_change_no_digit(method, runs_folder, reference):
    whole = reference(chosen(f"method={method}", "train.save_minutes=null"))
    settings = chosen(f"method={method}", "train.save_minutes=1e-9")  # due at the end of every step
    kept_at = []
    with at_step(6, kill), pytest.raises(Killed):
        train_run(Run.prepare(settings))
    record = Run.prepare(settings).record
    assert parse_checkpoint_step(record.find_checkpoint()) == 5
    with at_step(7, lambda: kept_at.append(parse_checkpoint_step(record.find_checkpoint()))):
        train_run(Run.prepare(settings))
    assert kept_at == [6] and kept(record.folder) == whole


def test_a_checkpoint_falls_due_after_the_newest_one(runs_folder, monkeypatch):
    """By default, and by a clock that goes on by four minutes a step."""
    clock, found = [0.0], []
    monkeypatch.setattr(train_trainer.time, "perf_counter", lambda: clock[0])
    real = StopAndResume.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        clock[0] += 240
        real(self, args, state, control, **kwargs)
        found.append(control.should_save)

    monkeypatch.setattr(StopAndResume, "on_step_end", on_step_end)
    train_run(Run.prepare(chosen()))
    assert found == [False, False, True, False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama", "tiny-roberta", "tiny-deberta"])
@pytest.mark.parametrize("method", list_choices("method"))
def test_every_method_on_every_family_goes_on_to_the_same_bytes(model, method, runs_folder, reference):
    task = {"tiny-gpt2": "demo/choice", "tiny-llama": "demo/restaurants"}.get(model, "demo/sentiment")
    dropout = ["method.dropout=0.1"] if chosen(f"method={method}").method.dropout is not None else []
    settings = chosen(f"model={model}", f"task={task}", f"method={method}", *dropout)
    whole = reference(settings)
    if not whole["result"]["trainable_parameters"]:
        pytest.skip("takes no step")
    for step in (2, 3, 6):
        record = stopped(settings, step)
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole


def test_a_signal_stops_at_once_outside_training(runs_folder, monkeypatch, capsys):
    settings, steps = chosen(), []
    monkeypatch.setattr("dual_lora.lab.train.run.evaluate_splits", lambda *args: terminate())
    with STOP.listen(), at_step(1, lambda: steps.append(1)), pytest.raises(Stopped):
        train_run(Run.prepare(settings))
    assert not steps and Run.prepare(settings).record.read_failure() is None
    monkeypatch.setattr(commands_guard.sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: terminate() or EXIT_OK)
    assert ended.value.code == EXIT_STOPPED
    assert "train.py: stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


BEST = ["task.checkpoint=best", "train.max_steps=null", "train.epochs=4"]


@pytest.fixture
def uneven(monkeypatch):
    """Scores by epoch that rise and fall, from the weights alone, so that a second measuring gives them again."""
    real = evaluate_splits

    def evaluate(model, *args):
        _, predictions = real(model, *args)
        total = sum(p.detach().double().sum() for p in model.parameters() if p.requires_grad)
        return {"accuracy": float(torch.sin(1e4 * total))}, predictions

    monkeypatch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)


@pytest.mark.parametrize("method", ["dual_lora", "full"])
def test_a_run_that_keeps_its_best_epoch_remembers_it(method, runs_folder, reference, uneven, monkeypatch):
    settings = chosen(f"method={method}", *BEST, "train.save_steps=2")
    whole = reference(settings)
    assert whole["result"]["best_epoch"]
    record = stopped(settings, 5)
    stopped(settings, 6)  # the end of an epoch, before it is scored
    with monkeypatch.context() as patch:  # in the next epoch's scoring
        real = BestEpoch.on_epoch_end

        def on_epoch_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                self.measure = lambda title: terminate()
            return real(self, args, state, control, **kwargs)

        patch.setattr(BestEpoch, "on_epoch_end", on_epoch_end)
        with STOP.listen(), pytest.raises(Stopped):
            train_run(Run.prepare(settings))
    assert parse_checkpoint_step(record.find_checkpoint()) == 9
    with at_step(11, kill), pytest.raises(Killed):
        train_run(Run.prepare(settings))
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text('{"files": {'),
    "a flipped bit": lambda folder: flip(folder / OPTIMIZER_FILE),
    "cut short": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"half"),
    "a file gone": lambda folder: (folder / "random_0.json").unlink(),
}


EDITS = {
    "steps": lambda held: held | {"steps": 6},
    "train_loss": lambda held: held | {"train_loss": 9.79},
    "a key": lambda held: {("logfed" if key == "logged" else key): value for key, value in held.items()},
    "no digest": lambda held: {key: value for key, value in held.items() if key != "digest"},
}


def edited(path: Path, edit) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=1))


def test_an_edited_manifest_counts_for_nothing(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    for what, edit in EDITS.items():
        seal_folder(tmp_path / "checkpoint-4", None, steps=4, train_loss=0.79, logged=[{"step": 1}])
        assert read_seal(tmp_path / "checkpoint-4")["steps"] == 4
        edited(tmp_path / "checkpoint-4" / MANIFEST, edit)
        assert read_seal(tmp_path / "checkpoint-4") is None, what


def test_every_file_a_finished_run_leaves_is_sealed(runs_folder, capsys):
    settings = chosen()
    train_run(Run.prepare(settings))
    record = Run.prepare(settings).record
    record.verify_files()
    assert evaluate_command([f"run={record.folder}"]) == 0
    left = [p for p in record.folder.rglob("*") if p.is_file() and p.name not in ("evaluation.json", "README.md")]
    assert {p.name for p in left} > {"config.yaml", "environment.json", "adapter_config.json", "predictions.jsonl"}
    for path in left:
        before = path.read_bytes()
        path.write_bytes(before.replace(b"0", b"1", 1))
        with pytest.raises(UserError, match=f"{path}: changed since the run; run its command again with force=true"):
            record.verify_files()
        path.write_bytes(before)
    flip(weights := record.folder / "adapter/adapter_model.safetensors")
    for use in (
        lambda: evaluate_command([f"run={record.folder}"]),
        lambda: evaluate_command([f"run={record.folder}", f"export={runs_folder / 'out'}"]),
        lambda: Run.prepare(chosen(f"init_from={record.folder}")).record,
    ):
        with pytest.raises(UserError, match=f"{weights}: changed since the run"):
            use()
    assert not (runs_folder / "out").exists()


def test_records_of_earlier_versions_have_no_seals(runs_folder, capsys):
    settings = chosen()
    train_run(Run.prepare(settings))
    record = Run.prepare(settings).record
    edited(record.folder / "result.json", lambda held: {k: held[k] for k in held if k not in ("sha256", "digest")})
    with pytest.raises(UserError, match="changed since the run"):
        record.read_result()
    edited(record.folder / "environment.json", lambda held: {k: held[k] for k in held if k != "code"})
    record.verify_files()
    assert evaluate_command([f"run={record.folder}"]) == 0


def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_used(runs_folder, reference, capsys):
    settings = chosen("train.save_steps=2")
    whole = reference(settings)
    for damage in DAMAGE.values():
        with at_step(7, kill), pytest.raises(Killed):
            train_run(Run.prepare(settings))
        record = Run.prepare(settings).record
        assert [p.name for p in sorted(record.folder.glob("checkpoints/*"))] == ["checkpoint-4", "checkpoint-6"]
        damage(record.folder / "checkpoints/checkpoint-6")
        assert parse_checkpoint_step(record.find_checkpoint()) == 4
        assert "checkpoint-6 is damaged or incomplete: removed" in capsys.readouterr().out
    train_run(Run.prepare(settings))
    assert kept(record.folder) == whole


@pytest.mark.parametrize("method", ["dual_lora", "full"])
def test_what_is_trained_is_not_trained_again(method, runs_folder, reference, monkeypatch):
    settings = chosen(f"method={method}")
    whole = reference(settings)
    real, calls = evaluate_splits, []

    def evaluate(*args):
        calls.append(1)
        return real(*args) if len(calls) == 1 else kill()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)
        train_run(Run.prepare(settings))
    record = Run.prepare(settings).record
    assert record.read_training()["steps"] == 7
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "fit_run", kill)
        train_run(Run.prepare(settings))
    assert kept(record.folder) == whole
    (record.folder / "result.json").unlink()
    assert record.read_training() is None


@pytest.mark.parametrize("method", ["full", "lora_plus", "dual_lora"])
def test_checkpoints_hold_no_pickle(method, runs_folder, monkeypatch):
    def pickled(*args, **kwargs):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", pickled)
    monkeypatch.setattr(torch, "load", pickled)
    record = stopped(chosen(f"method={method}"), 2)
    kinds = {path.suffix for path in record.folder.glob("checkpoints/*/*")}
    assert kinds - {".md"} == {".json", ".jsonl", ".safetensors"}
    train_run(Run.prepare(chosen(f"method={method}")))


def test_random_numbers_go_on_after_a_draw_of_any_kind(tmp_path):
    def draw() -> list:
        return [random.gauss(0, 1), random.random(), *np.random.normal(size=3), *torch.randn(3).tolist()]

    draw()  # leaves a spare number of a pair
    save_random_state(tmp_path / "random.json")
    first = draw()
    draw()
    load_random_state(tmp_path / "random.json")
    assert draw() == first


@pytest.mark.parametrize(("version", "expected"), [("now", [0.5, 0.7]), ("earlier", [0.6, 0.6])])
def test_each_process_goes_on_from_its_own_losses_since_the_last_log(version, expected, tmp_path):
    """An earlier version kept their mean instead, and no peak memory."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    kept = {"logged_at": 2, "loss_sum": 1.5, "seconds": 9.0, "best": {}}
    kept |= {"peak_memory_bytes": 5} if version == "now" else {"loss_since_log": 0.6}
    (folder / STATE_FILE).write_text(json.dumps(kept))
    state = SimpleNamespace(global_step=3, max_steps=7, compute_steps=lambda *args: None)
    for number, loss in enumerate([0.5, 0.7]):
        save_random_state(folder / f"random_{number}.json", **({"loss_since_log": loss} if version == "now" else {}))
        process = SimpleNamespace(random_file=f"random_{number}.json", best=None, _tr_loss=0.0)
        StopAndResume(process).on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None)
        found = (process._tr_loss, process._total_loss_scalar, process.earlier_seconds, process.earlier_peak)
        assert found == (expected[number], 1.5, 9.0, 5 if version == "now" else 0)


def test_no_checkpoint_is_written_twice_or_of_a_model_that_has_none(monkeypatch):
    """A stop may ask for one at the end of a step and again at the end of its epoch."""
    monkeypatch.setattr(RunTrainer, "check_losses", lambda self: pytest.fail("saves"))
    trainer = object.__new__(RunTrainer)
    trainer.state = SimpleNamespace(global_step=3)
    for trainer.can_save, trainer.saved_step in ((True, 3), (False, 0)):
        trainer._save_checkpoint(None, None)


def test_a_logged_value_that_json_has_not_is_left_out(tmp_path):
    """float16 scales the loss until gradients overflow, and skips these steps."""
    log = LogCallback(Record(tmp_path), SimpleNamespace(log=lambda row: None))
    for step, norm in ((1, float("inf")), (2, float("nan")), (3, 2.0)):
        state = SimpleNamespace(global_step=step, epoch=step / 4)
        log.on_log(None, state, None, logs={"loss": 0.5, "grad_norm": norm, "learning_rate": 1e-3})
    rows = Record(tmp_path).read_log()
    assert [row.get("train/grad_norm") for row in rows] == [None, None, 2.0]
    assert [row["train/loss"] for row in rows] == [0.5] * 3
    seal_folder(tmp_path, logged=rows)


def test_a_run_is_done_by_one_process_at_a_time(runs_folder, capsys):
    settings = chosen()
    folder = Run.prepare(settings).record.folder
    folder.mkdir(parents=True)
    with hold_lock(folder):
        with pytest.raises(RunHeldElsewhere, match=f"process {os.getpid()} on .* has held the lock since"):
            train_run(Run.prepare(settings))
        execute_run(Run.prepare(settings))
        assert report_failures([Run.prepare(settings)]) == EXIT_ELSEWHERE
    assert "skipped: " in capsys.readouterr().err
    assert not (folder / LOCK_NAME).exists() and list(folder.iterdir()) == []


def test_a_dead_process_leaves_no_lock(tmp_path):
    child = os.fork()
    if not child:
        try:
            acquire_lock(tmp_path / LOCK_NAME)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    path = tmp_path / LOCK_NAME
    assert json.loads(path.read_text())["pid"] == child
    with hold_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text("{")
    with hold_lock(tmp_path):
        pass


def test_another_machines_lock_holds_as_long_as_it_is_touched(tmp_path, monkeypatch):
    path = tmp_path / LOCK_NAME
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with hold_lock(tmp_path):
        os.utime(path, (0, 0))
        while not path.stat().st_mtime:  # for ever, if nothing touches it
            time.sleep(0.01)
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    with (
        pytest.raises(RunHeldElsewhere, match=f"process 1 on elsewhere .* try again in 3 minutes or remove {path}"),
        hold_lock(tmp_path),
    ):
        pass
    before = path.stat().st_mtime - STALE_SECONDS
    os.utime(path, (before, before))
    with hold_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_want_a_lock_one_has_it(tmp_path):
    """Each takes and leaves it many times; a file that only the holder may make shows two at a time."""
    alone, children = tmp_path / "alone", []
    for _ in range(4):
        child = os.fork()
        children.append(child)
        if not child:
            taken = 0
            try:
                while taken < 200:
                    with suppress(RunHeldElsewhere), hold_lock(tmp_path):
                        alone.touch(exist_ok=False)
                        alone.unlink()
                        taken += 1
            finally:
                os._exit(taken < 200)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4


def test_a_forced_run_keeps_the_old_result_until_the_new_one_is_whole(runs_folder, monkeypatch):
    settings, forced = chosen(), chosen("force=true")
    train_run(Run.prepare(settings))
    record = Run.prepare(settings).record
    old = kept(record.folder)
    (record.folder / "evaluation.json").write_text("{}")
    with at_step(3, kill), pytest.raises(Killed):
        train_run(Run.prepare(forced))
    assert kept(record.folder) | old == kept(record.folder)
    record.read_json("result.json")
    before = record.folder.joinpath("result.json").stat().st_mtime_ns
    real, moved = Path.replace, []

    def replace(self, target):
        if self.parent.name == RERUN_FOLDER and not self.name.startswith("."):
            moved.append(self.name)
            if len(moved) == 3:
                raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        train_run(Run.prepare(forced))
    train_run(Run.prepare(settings))
    assert kept(record.folder) == old
    assert record.folder.joinpath("result.json").stat().st_mtime_ns > before
    assert not (record.folder / RERUN_FOLDER).exists() and not (record.folder / "evaluation.json").exists()


def test_a_loss_that_is_no_number_names_its_examples_and_the_last_good_checkpoint(runs_folder, monkeypatch):
    settings = chosen("train.save_steps=2", "train.log_steps=5")
    real, seen = RunTrainer.compute_loss, []

    def compute_loss(self, model, inputs, **kwargs):
        seen.append(inputs["input_ids"])
        return real(self, model, inputs, **kwargs) * (float("nan") if len(seen) == 6 else 1.0)

    monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="the loss is nan at step 4; .* last good checkpoint: checkpoint-2") as caught:
        train_run(Run.prepare(settings))
    failure = Run.prepare(settings).record.read_failure()
    assert (failure["step"], failure["last_good_checkpoint"]) == (4, "checkpoint-2")
    rows = {row["id"]: row for row in load_task(settings).split("train").rows}
    tokenizer = load_tokenizer(settings)
    texts = tokenizer([rows[i]["text"] for i in failure["examples"]], truncation=True, max_length=64, padding=True)
    assert texts["input_ids"] == seen[5].tolist()
    assert ", ".join(failure["examples"][:5]) + " and 3 more" in str(caught.value)


def test_a_loss_that_is_no_number_is_told_before_its_epoch_is_scored(runs_folder, monkeypatch):
    settings = chosen("task.checkpoint=best", "train.max_steps=null", "train.epochs=2", "train.log_steps=99")
    real = RunTrainer.compute_loss
    monkeypatch.setattr(RunTrainer, "compute_loss", lambda self, *args, **kw: real(self, *args, **kw) * float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 1; "):
        train_run(Run.prepare(settings))
    assert Run.prepare(settings).record.read_failure()["diverged"]


def test_a_gradient_that_is_no_number_ends_the_run_too(runs_folder, monkeypatch):
    real = train_trainer.Trainer._get_grad_norm

    def norm(self, model, grad_norm=None):
        found = real(self, model, grad_norm=grad_norm)
        return found * float("nan") if self.state.global_step == 2 else found

    monkeypatch.setattr(train_trainer.Trainer, "_get_grad_norm", norm)
    with pytest.raises(UserError, match="the gradient norm is nan at step 3; .* last good checkpoint: none"):
        train_run(Run.prepare(chosen()))
    assert len(Run.prepare(chosen()).record.read_failure()["examples"]) == 8


def test_texts_without_answers_are_flagged(runs_folder, monkeypatch, capsys):
    monkeypatch.setattr("dual_lora.lab.evaluate.evaluate.generate_texts", lambda *args: [" "] * len(args[3]))
    result = train_run(Run.prepare(chosen("model=tiny-llama", "task=demo/restaurants", "train.max_steps=1")))
    assert result["warnings"] == ["validation: 8 of 8 outputs are empty"]
    assert "8 of 8 outputs are empty" in capsys.readouterr().out
    task = load_task(chosen("model=tiny-llama", "task=commonsense"))
    rows = [{"split": "test", "output": "x", "answer": a} for a in (None, None, "", "true", None)]
    assert find_warnings(task, rows) == ["test: 4 of 5 outputs have no answer in them"]
    assert find_warnings(task, rows[2:4]) == []
    assert find_warnings(task, [row | {"answer": 0} for row in rows] + [row | {"answer": False} for row in rows]) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "check that you may"), (errno.EACCES, "check that you may")],
)
def test_what_cannot_be_written_is_told_in_one_line(number, remedy, runs_folder, monkeypatch, capsys):
    settings = chosen("train.save_steps=2")
    finished = chosen("seed=1")
    train_run(Run.prepare(finished))
    before = kept(Run.prepare(finished).record.folder)

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for where in ("shutil.copyfile", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            execute_run(Run.prepare(settings))
        assert report_failures(list(map(Run.prepare, (finished, settings)))) == EXIT_USER
        said = capsys.readouterr().err
        assert f"cannot be written ({os.strerror(number)}); {remedy}" in said and "Traceback" not in said
    assert not list(Run.prepare(settings).record.folder.glob("checkpoints/*"))
    assert kept(Run.prepare(finished).record.folder) == before
    train_run(Run.prepare(settings))


def test_errors_of_safetensors_and_torch_on_a_full_disk_are_told(tmp_path, monkeypatch):
    for error, said in (
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), "No space left on device"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            with pytest.raises(UserError, match=f"cannot be written \\({said}\\)"), translate_save_errors(tmp_path):
                raise error


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_other_error_of_saving_is_taken_for_the_disks(error, tmp_path):
    with pytest.raises(type(error), match=str(error)), translate_save_errors(tmp_path / "not-there"):
        raise error


def test_out_of_memory_tells_the_settings_that_need_less(runs_folder, monkeypatch):
    def step(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore")

    monkeypatch.setattr(train_trainer.Trainer, "training_step", step)
    with pytest.raises(UserError, match="out of memory .*; train.batch_size=4 train.accumulation=4 takes less"):
        train_run(Run.prepare(chosen()))
    with pytest.raises(UserError, match="out of memory .*; remedy"), translate_memory_errors("remedy"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), translate_memory_errors("remedy"):
        raise RuntimeError("another")
    assert suggest_smaller_batch(chosen("train.batch_size=9")).startswith("train.batch_size=3 train.accum")
    assert "task.max_length" in suggest_smaller_batch(chosen("train.batch_size=1"))


@pytest.mark.parametrize(
    ("can_resume", "kept", "then"),
    [(True, "with a checkpoint", "resumes from here"), (False, "without a checkpoint", "starts this run again")],
)
def test_a_stop_says_what_is_kept_and_what_the_same_command_does_next(can_resume, kept, then, capfd):
    def work() -> int:
        with STOP.defer(can_resume=can_resume):
            os.kill(os.getpid(), signal.SIGTERM)
            STOP.raise_if_asked()
        return 0

    with pytest.raises(SystemExit) as ended:
        run_command(work)
    said = capfd.readouterr().err
    assert ended.value.code == EXIT_STOPPED
    assert f"SIGTERM: stopping after this step, {kept};" in said and f"the same command {then}" in said


@pytest.mark.parametrize(
    ("command", "words", "then"),
    [
        (train_command, ["force=true"], "resumes from here"),
        (train_command, ["-m", "seed=0,1"], "resumes from here"),
        (train_command, ["-m", "seed=0,1", "force=True"], "starts with the first run again"),
        (sweep_command, ["experiment=cost", "scale=smoke", "force=1"], "starts with the first run again"),
    ],
)
def test_a_stop_of_forced_runs_says_that_finished_ones_are_done_again(
    command, words, then, runs_folder, monkeypatch, capsys
):
    def stop(*_):
        raise Stopped("SIGTERM")

    for name in ("train.execute_run", "train.run_in_process", "sweep.run_cells"):
        monkeypatch.setattr(f"dual_lora.lab.commands.{name}", stop)
    assert run_guarded("command", command, [*words, "wandb.mode=disabled"]) == EXIT_STOPPED
    assert f"command: stopped by SIGTERM; the same command {then}" in capsys.readouterr().err


def test_a_stop_while_weights_are_kept_costs_no_training(runs_folder, monkeypatch):
    asked, real = chosen("method=lora"), RunTrainer.check_weights

    def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    with monkeypatch.context() as patch, STOP.listen(), pytest.raises(Stopped):
        patch.setattr(RunTrainer, "check_weights", stopped)
        train_run(Run.prepare(asked))
    monkeypatch.setattr(RunTrainer, "fit_run", lambda *a: pytest.fail("trained again"))
    assert train_run(Run.prepare(asked))["steps"] == 7
