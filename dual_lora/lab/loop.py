"""The Trainer, which goes on exactly where it stopped, keeps no half checkpoint and names the batch that broke it."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from dual_lora.functional import CLIPPED
from dual_lora.lab import checkpoints, processes, states
from dual_lora.lab.disk import remove, writing
from dual_lora.lab.faults import out_of_memory
from dual_lora.lab.models import sharded
from dual_lora.lab.runs import Record
from dual_lora.lab.settings import UserError
from dual_lora.lab.stopping import ANEW, GOES_ON, STOP, Stopped

ROW = "row"  # the column with a training example's number
# What a checkpoint holds beside the Trainer's own files and those of `states`, which takes the place of its pickles.
STATE, BEST, SCALER = "run.json", "best.safetensors", "scaler.json"
UNWRITTEN = ("PytorchStreamWriter", "unexpected pos")  # what torch says of a file that it cannot write
SPARE = 2**20  # bytes; a disk with less is full
SHOWN = 5  # examples of a batch that a message names


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a failure to save weights into the user's one line."""
    with writing(folder), disk_errors(folder):
        yield


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that safetensors, tokenizers and torch have of their own for a disk that fails into OSErrors."""
    try:
        yield
    except Exception as error:
        said = re.search(r"os error (\d+)", str(error))
        if out_of_memory(error) or not (said or any(words in str(error) for words in UNWRITTEN)):
            raise
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        full = shutil.disk_usage(there).free < SPARE
        number = int(said[1]) if said else errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number)) from error


class BestEpoch(TrainerCallback):
    """Scores every epoch and keeps the trained weights of the best one, for tasks whose protocol says so."""

    def __init__(self, measure: Callable[[str], tuple[dict, list]], metric: str, log: Any) -> None:
        self.measure, self.metric, self.log = measure, metric, log
        self.best, self.epoch, self.weights, self.last = -float("inf"), None, {}, None
        self.scored = 0  # the step of the newest scores
        self.seconds = 0.0  # that scoring took here

    def on_train_begin(self, args, state, control, **kwargs):
        """A checkpoint of an epoch's last step is older than that epoch's scores."""
        self.on_epoch_end(args, state, control, **kwargs)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        ended = state.global_step >= state.max_steps or float(state.epoch or 0.5).is_integer()
        if not ended or self.scored == state.global_step or processes.any_of(bool(STOP.asked)):
            return
        began = time.perf_counter()
        try:
            with STOP.waiting(processes.several()):  # of several none may leave the others alone
                scores, _ = self.measure("epoch")
        except Stopped:
            control.should_save = control.should_training_stop = True
            return
        finally:
            self.seconds += time.perf_counter() - began
        self.last, self.scored = scores, state.global_step
        self.log.scores(state.global_step, scores)
        if scores[self.metric] > self.best:
            self.best, self.epoch = scores[self.metric], round(state.epoch, 4)
            self.weights = {name: value.to("cpu", copy=True) for name, value in trained_state(model).items()}

    def keep(self, folder: Path) -> dict[str, Any]:
        """Write the best weights so far into a checkpoint and return what else is to be remembered."""
        if not self.weights:
            return {}
        save_file({name: value.contiguous() for name, value in self.weights.items()}, folder / BEST)
        return {"best": self.best, "epoch": self.epoch, "last": self.last, "scored": self.scored}

    def go_on(self, folder: Path, kept: dict[str, Any]) -> None:
        if kept:
            self.best, self.epoch, self.last, self.scored = (kept[k] for k in ("best", "epoch", "last", "scored"))
            self.weights = load_file(folder / BEST)

    def restore(self, model: torch.nn.Module) -> None:
        model.load_state_dict(self.weights, strict=False)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return everything training may change: trained weights and buffers. What a frozen weight in 4 bits keeps beside
    it goes by its name and a dot."""
    frozen = tuple(f"{name}." for name, p in model.named_parameters() if not p.requires_grad)
    return {name: value.detach() for name, value in model.state_dict().items() if not f"{name}.".startswith(frozen)}


class Loop(Trainer):
    """A Trainer for one run.

    record: the run's; ids: the names of the training examples, by row; best: the callback whose state checkpoints keep;
    scale: by what backward sees the loss multiplied, while gradients reach the weights divided by it;
    minutes: how long after the newest checkpoint the next one is due. `keeps` tells whether it can write checkpoints:
    not of a model that is sharded and trained in full.
    """

    def __init__(
        self,
        record: Record,
        ids: list[str],
        best: BestEpoch | None,
        scale: float | None,
        minutes: float | None,
        **kwargs: Any,
    ) -> None:
        examples = kwargs.pop("train_dataset")
        examples = examples.add_column(ROW, list(range(len(examples))))
        callbacks = [GoOn(self), *kwargs.pop("callbacks")]  # the first one: others look at what it brings back
        args, part = kwargs["args"], sharded(kwargs["model"])
        args.save_only_model = part  # else the Trainer refuses all sharded models, but an adapter on one is whole
        super().__init__(train_dataset=examples, callbacks=callbacks, **kwargs)
        args.save_only_model = False
        # The Trainer takes every model for one that divides its loss by the tokens of a whole step. Only the loss of a
        # causal language model does; others, and the smoothed one, are means of what they see at a time.
        self.model_accepts_loss_kwargs &= self._loss_shifts_labels and not args.label_smoothing_factor
        self.keeps = not part or isinstance(self.model, PeftModel)
        self.record, self.ids, self.best, self.scale = record, ids, best, scale or 1.0
        for weight in self.model.parameters() if scale else ():
            if weight.requires_grad:
                weight.register_hook(lambda gradient: gradient / scale)
        self.recent: list[tuple[str, int, list[torch.Tensor], Any]] = []  # since the last check, on the device
        self.earlier, self.began = 0.0, time.perf_counter()
        self.minutes, self.kept_at = minutes, self.began

    @property
    def seconds(self) -> float:
        """The time training has taken without the scoring of epochs, earlier tries up to their checkpoints included."""
        return self.earlier + time.perf_counter() - self.began - (self.best.seconds if self.best else 0)

    def fit(self, checkpoint: Path | None) -> Any:
        """Train, from a checkpoint if there is one, and return the Trainer's figures.

        Raises:
            UserError: a loss or a gradient that is no number, or a checkpoint that cannot be written.
            Stopped: a stop was asked for; the newest checkpoint is of this moment.
        """
        self.began = self.kept_at = time.perf_counter()
        CLIPPED.take()  # what a run that failed before this one left
        with STOP.waiting(then=GOES_ON if self.keeps else ANEW):
            done = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            STOP.check()
        self.check()
        return done._replace(training_loss=self.mean(done.training_loss))

    def due(self) -> bool:
        """Return whether the newest checkpoint is older than it may be."""
        return self.minutes is not None and time.perf_counter() - self.kept_at > 60 * self.minutes

    def load(self, folder: Path) -> None:
        """Give the model the weights saved in a folder."""
        self._load_from_checkpoint(str(folder))

    def _run_epoch(self, **kwargs: Any) -> None:
        """As the Trainer's, but a checkpoint of the very last step is not trained on."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss if self.scale == 1 else loss * self.scale

    def training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        rows = inputs.pop(ROW)
        CLIPPED.watching = (self.state.global_step + 1) % self.args.logging_steps == 0
        try:
            loss = super().training_step(model, inputs, num_items_in_batch) / self.scale
        finally:
            CLIPPED.watching = False
        self.recent.append(("loss", self.state.global_step + 1, [rows], loss))
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm, step = super()._get_grad_norm(model, grad_norm=grad_norm), self.state.global_step + 1
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self.args.fp16:  # its loss scaling provokes infinite gradients, and skips them
            rows = [rows for _, s, given, _ in self.recent if s == step for rows in given]
            self.recent.append(("gradient norm", step, rows, norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        share = CLIPPED.take()
        super().log(logs if share is None else {**logs, "clipped_share": share}, start_time)
        self.check()

    def check(self) -> None:
        """Look at the losses and gradient norms since the last check, all at once because every look waits for the
        device.

        Raises:
            UserError: one is no number.
        """
        recent, self.recent = self.recent, []
        values = [torch.as_tensor(value, dtype=torch.float32, device=self.args.device) for *_, value in recent]
        for (what, step, rows, _), value in zip(recent, torch.stack(values).tolist() if values else (), strict=True):
            if not isfinite(value):
                raise self.no_number(what, value, step, [self.ids[i] for part in rows for i in part.tolist()])

    def no_number(self, what: str, value: float, step: int, ids: list[str]) -> UserError:
        good = self.last_good()
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        return UserError(
            f"the {what} is {value} at step {step}; take a lower train.lr (it was {self.args.learning_rate:g}) or "
            f"model.dtype=float32; examples of that step: {', '.join(map(str, ids[:SHOWN]))}{more}; last good "
            f"checkpoint: {good or 'none'}",
            step=step,
            examples=ids,
            last_good_checkpoint=good,
            diverged=True,
        )

    def last_good(self) -> str | None:
        kept = self.record.checkpoint()
        return f"checkpoint-{checkpoints.step_of(kept)}" if kept else None

    def check_weights(self) -> None:
        """Look at what is trained before it is kept.

        Raises:
            UserError: a weight has a value that is no number.
        """
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        mine = [weight.to_local() if isinstance(weight, DTensor) else weight for _, weight in trained]
        bad = [name for (name, _), weight in zip(trained, mine, strict=True) if not weight.isfinite().all()]
        bad, step = list(dict.fromkeys(processes.collect(bad))), self.state.global_step
        if bad:
            good = self.last_good()
            raise UserError(
                f"{bad[0]} and {len(bad) - 1} more of {len(trained)} trained weights hold values that are no numbers "
                f"at step {step}; take a lower train.lr (it was {self.args.learning_rate:g}) or train.weight_decay; "
                f"last good checkpoint: {good or 'none'}",
                step=step,
                last_good_checkpoint=good,
                diverged=True,
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, then what it forgets, and the manifest as the last file."""
        self.check()
        self.check_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            with saving(folder):
                super()._save_checkpoint(model, trial)
                state = {
                    "loss_since_log": self.mean(self._tr_loss.item()),
                    "logged_at": self._globalstep_last_logged,
                    "loss_sum": self.mean(self._total_loss_scalar),
                    "seconds": self.seconds,
                }
                processes.wait()  # for what the others save
                processes.share(lambda: self.complete(folder, state))
        except UserError:
            remove(folder)
            raise

    def _save(self, output_dir: str, state_dict: dict | None = None) -> None:
        """As the Trainer's, without the tokenizer and its own settings, which nobody reads."""
        if self.args.should_save or sharded(self.model):  # all processes gather what is shared out
            self.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            states.save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            states.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler and self.args.should_save:
            (Path(output_dir) / SCALER).write_text(json.dumps(scaler.state_dict()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(json.loads((Path(checkpoint) / SCALER).read_text()))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(exist_ok=True)  # the first process may be slower
        states.save_random(Path(output_dir) / self.random_file)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            states.load_random(Path(checkpoint) / self.random_file)

    @property
    def random_file(self) -> str:
        return f"random_{self.args.process_index}.json"

    def complete(self, folder: Path, state: dict[str, Any]) -> None:
        """Add to a checkpoint what the Trainer does not know, and seal it."""
        state["best"] = self.best.keep(folder) if self.best else {}
        (folder / STATE).write_text(json.dumps(state))
        shutil.copyfile(self.record.folder / "metrics.jsonl", folder / "metrics.jsonl")
        checkpoints.seal(folder)

    @staticmethod
    def mean(value: float) -> float:
        """Return the mean over all processes, each of which knows the losses of its own examples."""
        found = processes.collect([value])
        return sum(found) / len(found)


class GoOn(TrainerCallback):
    """Stops at the end of a step, with a checkpoint, when that is asked for; and goes on from one as if never stopped:
    the Trainer forgets the losses since its last log and the sum of all before."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            return
        loop, folder = self.loop, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = json.loads((folder / STATE).read_text())
        state.compute_steps(args, state.max_steps)  # a checkpoint's own would outlive a changed train.save_steps
        loop._tr_loss += kept["loss_since_log"]
        loop._globalstep_last_logged, loop._total_loss_scalar = kept["logged_at"], kept["loss_sum"]
        loop._initial_global_step, loop.earlier = 0, kept["seconds"]
        if loop.best:
            loop.best.go_on(folder, kept["best"])

    def on_step_end(self, args, state, control, **kwargs):
        told = processes.collect([(bool(STOP.asked), self.loop.due())])
        stop, due = (any(words) for words in zip(*told, strict=True))
        control.should_save = self.loop.keeps if stop else control.should_save or (due and self.loop.keeps)
        control.should_training_stop = control.should_training_stop or stop

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.loop.best:  # before anything is scored
            self.loop.check()
            self.loop.check_weights()

    def on_save(self, args, state, control, **kwargs):
        self.loop.kept_at = time.perf_counter()
