"""Callbacks of the Trainer: the progress bar, the log, and the scores of every epoch."""

import sys
import time
from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from dual_lora.lab.errors import Stopped
from dual_lora.lab.record.mirror import Mirrors
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.summary import format_seconds
from dual_lora.lab.system.distributed import has_several_processes, is_first_process, is_true_in_any_process
from dual_lora.lab.system.environment import hides_bars
from dual_lora.lab.system.signals import STOP
from dual_lora.tuner.warmup import list_factors

LOSS_COLUMN, ZEROS_COLUMN = "validation/loss", "train/zeros"  # of the log
# Files of a checkpoint in addition to the Trainer's own and to those of `optimizer_state`, which replace its pickles.
STATE_FILE, BEST_FILE, SCALER_FILE = "run.json", "best.safetensors", "scaler.json"


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar with the latest loss and the speed, instead of a line for every log step. If stderr is
    not a terminal, such as a log file, a few lines are printed instead: a bar would become one endless line.

    name: the run's, put before each line where several runs share the file.
    """

    LINES = 20  # the most that a run prints

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        shares_screen = hides_bars()
        self.prints, self.label = not sys.stderr.isatty(), f"{self.name}: " if shares_screen else ""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=self.prints or shares_screen)
        self.current_step = self.first_step = self.printed = state.global_step
        self.started, self.seen = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        seconds, loss = time.perf_counter() - self.started, f"{float(logs['loss']):.4f}"
        speed = f"{(state.num_input_tokens_seen - self.seen) / seconds:,.0f}"
        self.training_bar.set_postfix({"loss": loss, "tokens/s": speed})
        due = state.global_step - self.printed >= state.max_steps / self.LINES
        if self.prints and due:
            step, end = state.global_step, state.max_steps
            left = format_seconds(seconds / (step - self.first_step) * (end - step))
            print(
                f"{self.label}step {step}/{end}, loss {loss}, {speed} tokens/s, {left} left",
                file=sys.stderr,
                flush=True,
            )
            self.printed = step

    def close(self) -> None:
        """End the bar's line, also after a failure, so that the next message starts on a new line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


@torch.no_grad()
def measure_zero_share(model: torch.nn.Module) -> float | None:
    """Return the share of exact zeros in the updates of all weights: dW of Dual LoRA, B A of LoRA. None: no update."""
    zeros = entries = 0
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    products = [factors.delta_weight for factors in list_factors(model)]
    products += [partial(layer.get_delta_weight, name) for layer in layers for name in layer.r]
    for compute in products:  # one at a time: together they would be as large as the model
        dW = compute()
        zeros, entries = zeros + int((dW == 0).sum()), entries + dW.numel()
    return zeros / entries if entries else None


class LogCallback(TrainerCallback):
    """Writes every logged row to metrics.jsonl and copies it to the mirrors. zeros: also the share of exact zeros in
    the update.

    A value that is NaN or Inf is left out of its row, because JSON has none: float16 provokes infinite gradient norms,
    and skips these steps. Where such a value ends the run, the error names it.
    """

    NAMES = {name: f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "clipped_share")}

    def __init__(self, record: Record, mirror: Mirrors, zeros: bool = False) -> None:
        self.record, self.mirror, self.zeros = record, mirror, zeros

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        """Write one row to the log and its copies; in the first process only."""
        if not is_first_process():
            return
        row = {"step": step, **row}
        self.record.append_log(row)
        self.mirror.log(row)

    def write_scores(self, step: int, scores: dict[str, float], rows: str = "eval") -> None:
        """Write scores of the reported rows ("eval") or of those that epochs are compared on ("development")."""
        self.write_row(step, {f"{rows}/{name}": value for name, value in scores.items()})

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        row = {self.NAMES[k]: float(v) for k, v in logs.items() if k in self.NAMES and isfinite(v)}
        if self.zeros and (share := measure_zero_share(model)) is not None:
            row[ZEROS_COLUMN] = share
        self.write_row(state.global_step, {"epoch": round(state.epoch, 4), **row})


def get_trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return everything training may change: trained weights and buffers.

    bitsandbytes stores the constants of a frozen 4-bit weight under the weight's name and a dot; these are left out.
    """
    frozen = tuple(f"{name}." for name, p in model.named_parameters() if not p.requires_grad)
    return {name: value.detach() for name, value in model.state_dict().items() if not f"{name}.".startswith(frozen)}


class BestWeights(TrainerCallback):
    """Keeps the trained weights of the best score so far, and the scores of the last step to report next to it.

    measure: returns scores and predictions. log: where scores are written. lower: whether the lowest score is the best.
    rows: see `LogCallback.write_scores`. `scores_last` says whether the last step is to be scored after training.
    """

    scores_last = False

    def __init__(
        self, measure: Callable[[str], tuple[dict, list]], log: LogCallback, lower: bool, rows: str = "eval"
    ) -> None:
        self.measure, self.log, self.lower, self.rows = measure, log, lower, rows
        self.best, self.epoch, self.weights, self.last = None, None, {}, None
        self.scored = 0  # the step of the newest scores
        self.stale = 0  # scores since the best one
        self.seconds = 0.0  # spent on scoring by this process

    def keep_if_best(self, score: float, state: Any, model: torch.nn.Module) -> None:
        """Keep the weights if their score is the best so far."""
        self.stale += 1
        if self.best is None or (score < self.best if self.lower else score > self.best):
            self.best, self.epoch, self.stale = score, round(state.epoch, 4), 0
            self.weights = {name: value.to("cpu", copy=True) for name, value in get_trained_state(model).items()}

    def score_last(self) -> None:
        """Score the weights of the last step."""
        began = time.perf_counter()
        self.last = self.measure("last step")[0]
        self.seconds += time.perf_counter() - began

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Write the best weights so far into a checkpoint and return the rest of the state."""
        if not self.weights:
            return {}
        save_file({name: value.contiguous() for name, value in self.weights.items()}, folder / BEST_FILE)
        return {"best": self.best, "epoch": self.epoch, "last": self.last, "scored": self.scored, "stale": self.stale}

    def load_state(self, folder: Path, kept: dict[str, Any]) -> None:
        """Restore from a checkpoint what `save_state` wrote there; `kept` is the dictionary that it returned."""
        if kept:
            self.best, self.epoch, self.last, self.scored = (kept[k] for k in ("best", "epoch", "last", "scored"))
            self.stale = kept.get("stale", 0)  # missing from checkpoints of earlier versions
            self.weights = load_file(folder / BEST_FILE)

    def restore_best(self, model: torch.nn.Module) -> None:
        """Give the model the best weights, if any were kept."""
        model.load_state_dict(self.weights, strict=False)


class BestEpoch(BestWeights):
    """Scores every epoch and keeps the trained weights of the best one.

    metric: the score that decides. patience: training stops after this many epochs without a better one; None: never.
    """

    def __init__(
        self,
        measure: Callable[[str], tuple[dict, list]],
        metric: str,
        log: LogCallback,
        lower: bool = False,
        patience: int | None = None,
        rows: str = "eval",
    ) -> None:
        super().__init__(measure, log, lower, rows)
        self.metric, self.patience = metric, patience

    def on_train_begin(self, args, state, control, **kwargs):
        """After resuming, score an epoch whose last step was checkpointed before it was scored."""
        self.on_epoch_end(args, state, control, **kwargs)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Score the epoch, unless it was scored, and end training if it is to stop early. If a stop was requested, stop
        here instead: once the next epoch has begun, this one cannot be scored any more."""
        ended = state.global_step >= state.max_steps or float(state.epoch or 0.5).is_integer()
        if ended and self.scored != state.global_step:
            if is_true_in_any_process(bool(STOP.asked)):
                control.should_save = control.should_training_stop = True
            else:
                self.score_epoch(state, control, model)
        if self.patience is not None and self.stale >= self.patience:
            control.should_training_stop = True

    def score_epoch(self, state: Any, control: Any, model: torch.nn.Module) -> None:
        """Score an epoch and keep the weights if they are the best."""
        began = time.perf_counter()
        try:
            with STOP.defer(has_several_processes()):  # the others would wait for a process that stopped at once
                scores, _ = self.measure("epoch")
        except Stopped:
            control.should_save = control.should_training_stop = True
            return
        finally:
            self.seconds += time.perf_counter() - began
        self.last, self.scored = scores, state.global_step
        self.log.write_scores(state.global_step, scores, self.rows)
        self.keep_if_best(scores[self.metric], state, model)


class BestLoss(BestWeights):
    """Logs the loss on the validation rows every `every` steps and after the last. With `keeps`, keeps the weights of
    the lowest one (`checkpoint: best_loss`) and scores the last step, whose weights they may replace.

    measure_loss: returns the mean loss on the validation rows.
    """

    def __init__(
        self,
        measure: Callable[[str], tuple[dict, list]],
        measure_loss: Callable[[], float],
        every: int,
        keeps: bool,
        log: LogCallback,
    ) -> None:
        super().__init__(measure, log, lower=True)
        self.measure_loss, self.every, self.scores_last = measure_loss, every, keeps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure the loss if it is due, before a checkpoint of this step is written."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        began = time.perf_counter()
        loss = self.measure_loss()
        self.seconds += time.perf_counter() - began
        self.scored = state.global_step
        self.log.write_row(state.global_step, {LOSS_COLUMN: loss})
        if self.scores_last:
            self.keep_if_best(loss, state, model)
