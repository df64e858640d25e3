"""The Trainer, and the writing of checkpoints (`_save_checkpoint`): it resumes exactly where it stopped, leaves no
partial checkpoint, and names the batch at which training diverged."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from dual_lora.functional import CLIPPED
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, get_first_line
from dual_lora.lab.model.adapt import split_by_rate, start_ramp
from dual_lora.lab.model.load import is_sharded, switch_mode
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.distributed import gather_items, share_from_first, wait_for_everyone
from dual_lora.lab.system.files import remove_path, translate_save_errors
from dual_lora.lab.system.memory import read_peak
from dual_lora.lab.system.sealed import parse_checkpoint_step, seal_folder
from dual_lora.lab.system.signals import STOP
from dual_lora.lab.train.callbacks import SCALER_FILE, STATE_FILE, BestWeights
from dual_lora.lab.train.optimizer_state import load_optimizer, load_random_state, save_optimizer, save_random_state
from dual_lora.lab.train.packing import unmask_packed_batch

LOSS_BATCH = 8  # validation rows at a time, as the Trainer by default
ROW_COLUMN = "row"  # the column with a training example's number
MAX_NAMED_EXAMPLES = 5  # examples of a batch that a message names


@contextmanager
def translate_compile_errors(settings: Settings) -> Iterator[None]:
    """With `train.compile`, turn what torch.compile raises into one line.

    Raises:
        UserError: with the reason. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not settings.train.compile or not compiling:
            raise
        reason = get_first_line(error)
        raise UserError(f"train.compile=true: torch cannot compile this model here ({reason}); drop it") from error


class LengthSampler(Sampler[int]):
    """Puts rows of similar length together, as transformers' LengthGroupedSampler does, in an order that follows from
    only the seed and the epoch: a resumed run and every process know it, whatever random numbers they have drawn.

    lengths: tokens of each row. step_rows: rows of one optimizer step, of all processes. seed: the run's, not negative.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int) -> None:
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # not seed + epoch, by which the second epoch of one seed would have the order of the first of the next
        (state,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        return iter(get_length_grouped_indices(self.lengths, self.step_rows, generator=generator))


class RunTrainer(Trainer):
    """A Trainer for one run.

    record, settings: the run's. example_ids: ids of the training examples, by row. best: the callback whose state is
    saved with every checkpoint. `can_save` is False for a sharded, fully trained model, which has no checkpoints.
    """

    def __init__(
        self,
        record: Record,
        settings: Settings,
        example_ids: list[str],
        best: BestWeights | None,
        **kwargs: Any,
    ) -> None:
        examples = kwargs.pop("train_dataset")
        examples = examples.add_column(ROW_COLUMN, list(range(len(examples))))
        callbacks = [StopAndResume(self), *kwargs.pop("callbacks")]  # first: the others read what it restores
        args, part = kwargs["args"], is_sharded(kwargs["model"])
        args.save_only_model = part  # else the Trainer refuses every sharded model, although an adapter is not sharded
        super().__init__(train_dataset=examples, callbacks=callbacks, **kwargs)
        args.save_only_model = False
        # The Trainer assumes that every model divides its loss by the number of tokens in a whole step. Only the loss
        # of a causal language model does so; other losses, and label smoothing, average over one micro-batch.
        self.model_accepts_loss_kwargs &= self._loss_shifts_labels and not args.label_smoothing_factor
        self.can_save = not part or isinstance(self.model, PeftModel)
        self.record, self.settings, self.example_ids, self.best = record, settings, example_ids, best
        self.scale = scale = settings.train.loss_scale or 1.0
        for weight in self.model.parameters() if scale != 1 else ():
            if weight.requires_grad:
                weight.register_hook(lambda gradient: gradient / scale)
        # (what, step, rows, value) since the last check; values stay on the device until then
        self.unchecked: list[tuple[str, int, list[torch.Tensor], Any]] = []
        self.earlier_seconds, self.earlier_peak, self.began = 0.0, 0, time.perf_counter()
        self.save_minutes, self.saved_at, self.saved_step = settings.train.save_minutes, self.began, 0

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a group of weights for each learning rate."""
        optimizer = super().create_optimizer(model)
        split_by_rate(optimizer, self.model, self.settings)
        return optimizer

    @property
    def train_seconds(self) -> float:
        """Seconds of training without the scoring of epochs; earlier attempts count up to the checkpoint they left."""
        return self.earlier_seconds + time.perf_counter() - self.began - (self.best.seconds if self.best else 0)

    def fit_run(self, checkpoint: Path | None) -> Any:
        """Train, from a checkpoint if there is one, and return the Trainer's figures.

        Raises:
            UserError: a loss or a gradient is NaN or Inf, or a checkpoint cannot be written.
            Stopped: a stop was requested; a checkpoint has just been written (if `can_save`).
        """
        self.began = self.saved_at = time.perf_counter()
        CLIPPED.pop_share()  # counts left by a run that failed before this one
        with STOP.defer(can_resume=self.can_save), translate_compile_errors(self.settings):
            done = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            STOP.raise_if_asked()
        self.check_losses()
        return done._replace(training_loss=self.average_over_processes(done.training_loss))

    def is_checkpoint_due(self) -> bool:
        """Return whether the newest checkpoint is older than `train.save_minutes`, or whether this is the last step and
        it is to be scored before the trained weights are saved, which may take hours or fail."""
        if self.best and self.best.scores_last and self.state.global_step >= self.state.max_steps:
            return True
        return self.save_minutes is not None and time.perf_counter() - self.saved_at > 60 * self.save_minutes

    @torch.no_grad()
    def measure_loss(self, examples: Dataset) -> float:
        """Return the loss of these examples, without dropout: as the Trainer's, that of each batch of LOSS_BATCH (of
        tokens, a mean over them), averaged by its examples. Draws no random numbers: training continues as if it had
        not been measured.

        Raises:
            UserError: it is NaN or Inf.
        """
        found = 0.0
        with switch_mode(self.model, training=False):
            for start in range(0, len(examples), LOSS_BATCH):
                rows = [examples[i] for i in range(start, min(start + LOSS_BATCH, len(examples)))]
                inputs = self._prepare_inputs(self.data_collator(rows))
                if self.settings.train.packing:
                    unmask_packed_batch(inputs)
                with self.compute_loss_context_manager():
                    loss = super().compute_loss(self.model, inputs)
                found += float(loss) * len(rows)
        loss = found / len(examples)
        self.unchecked.append(("validation loss", self.state.global_step, [], loss))
        self.check_losses()
        return loss

    def load_weights(self, folder: Path) -> None:
        """Give the model the weights saved in a folder."""
        self._load_from_checkpoint(str(folder))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """As the Trainer's, but rows grouped by length come in the order of a `LengthSampler`, in groups that count the
        rows of all processes: several of them see the batches of one with their summed batch size."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return LengthSampler(sampler.lengths, sampler.batch_size * self.args.world_size, self.args.seed)
        return sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        """As the Trainer's, except that nothing is trained after resuming from a checkpoint of the last step."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            # In a resumed run the Trainer sets the epoch of a loader that skips batches. With several processes this
            # loader only passes it on to samplers of accelerate's own class.
            kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
            super()._run_epoch(**kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW_COLUMN not in self._signature_columns:
            self._signature_columns.append(ROW_COLUMN)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, times `train.loss_scale`: dL/dSign is clipped inside backward, so its scale matters."""
        loss = super().compute_loss(*args, **kwargs)
        return loss if self.scale == 1 else loss * self.scale

    def training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the Trainer's; returns the loss without `train.loss_scale`, for the log and the check.

        Clipped entries are counted only in steps that are logged, because counting takes another pass over dL/dSign.
        """
        inputs = dict(inputs)  # the Trainer counts tokens by the mask of its own afterwards
        rows = inputs.pop(ROW_COLUMN)
        if self.settings.train.packing:
            unmask_packed_batch(inputs)
        CLIPPED.enabled = (self.state.global_step + 1) % self.args.logging_steps == 0
        try:
            loss = super().training_step(model, inputs, num_items_in_batch) / self.scale
        finally:
            CLIPPED.enabled = False
        self.unchecked.append(("loss", self.state.global_step + 1, [rows], loss))
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm, step = super()._get_grad_norm(model, grad_norm=grad_norm), self.state.global_step + 1
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self.args.fp16:  # its loss scaling provokes infinite gradients, and skips them
            rows = [rows for _, s, given, _ in self.unchecked if s == step for rows in given]
            self.unchecked.append(("gradient norm", step, rows, norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the clipped fraction of Sign's gradient; then check the losses since the last log."""
        share = CLIPPED.pop_share()
        super().log(logs if share is None else {**logs, "clipped_share": share}, start_time)
        self.check_losses()

    def check_losses(self) -> None:
        """Check the losses and gradient norms since the last check, all at once, since reading one waits for the
        device.

        Raises:
            UserError: one is NaN or Inf.
        """
        unchecked, self.unchecked = self.unchecked, []
        values = [torch.as_tensor(value, dtype=torch.float32, device=self.args.device) for *_, value in unchecked]
        for (what, step, rows, _), value in zip(unchecked, torch.stack(values).tolist() if values else (), strict=True):
            if not isfinite(value):
                ids = [self.example_ids[i] for part in rows for i in part.tolist()]
                raise self.describe_divergence(what, value, step, ids)

    def describe_divergence(self, what: str, value: float, step: int, ids: list[str]) -> UserError:
        """Return the error for a loss or gradient norm (`what`) that is NaN or Inf, with the training examples of its
        step, of which a validation loss has none."""
        good = self.name_last_checkpoint()
        more = f" and {len(ids) - MAX_NAMED_EXAMPLES} more" if len(ids) > MAX_NAMED_EXAMPLES else ""
        named = f"examples of that step: {', '.join(map(str, ids[:MAX_NAMED_EXAMPLES]))}{more}; " if ids else ""
        return UserError(
            f"the {what} is {value} at step {step}; take a lower train.lr (it was {self.args.learning_rate:g}) or "
            f"model.dtype=float32; {named}last good checkpoint: {good or 'none'}",
            step=step,
            examples=ids,
            last_good_checkpoint=good,
            diverged=True,
        )

    def name_last_checkpoint(self) -> str | None:
        """Return the folder name of the newest complete checkpoint, such as checkpoint-500; None if there is none."""
        kept = self.record.find_checkpoint()
        return f"checkpoint-{parse_checkpoint_step(kept)}" if kept else None

    def check_weights(self) -> None:
        """Check the trained weights before they are saved.

        Raises:
            UserError: one holds NaN or Inf.
        """
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        mine = [weight.to_local() if isinstance(weight, DTensor) else weight for _, weight in trained]
        bad = [name for (name, _), weight in zip(trained, mine, strict=True) if not weight.isfinite().all()]
        bad, step = list(dict.fromkeys(gather_items(bad))), self.state.global_step
        if bad:
            good = self.name_last_checkpoint()
            raise UserError(
                f"{bad[0]} and {len(bad) - 1} more of {len(trained)} trained weights contain NaN or Inf "
                f"at step {step}; take a lower train.lr (it was {self.args.learning_rate:g}) or train.weight_decay; "
                f"last good checkpoint: {good or 'none'}",
                step=step,
                last_good_checkpoint=good,
                diverged=True,
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint as the Trainer does, then the state that it leaves out, and the manifest as the last file.
        Do nothing if this step has its checkpoint, or if the model cannot have one."""
        if not self.can_save or self.saved_step == self.state.global_step:
            return
        self.check_losses()
        self.check_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            with translate_save_errors(folder):
                super()._save_checkpoint(model, trial)
                state = {
                    "logged_at": self._globalstep_last_logged,
                    "loss_sum": self._total_loss_scalar,  # the same in all processes
                    "seconds": self.train_seconds,
                    "peak_memory_bytes": max(self.earlier_peak, read_peak()),
                }
                wait_for_everyone()  # until the others have saved their part
                share_from_first(lambda: self.complete_checkpoint(folder, state))
                self.saved_step = self.state.global_step
        except UserError:
            remove_path(folder)
            raise

    def _save(self, output_dir: str, state_dict: dict | None = None) -> None:
        """As the Trainer's, without the tokenizer and the Trainer's own settings, which nobody reads."""
        if self.args.should_save or is_sharded(self.model):  # gathering a sharded model takes all processes
            self.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler and self.args.should_save:
            (Path(output_dir) / SCALER_FILE).write_text(json.dumps(scaler.state_dict()), "utf-8")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(json.loads((Path(checkpoint) / SCALER_FILE).read_text("utf-8")))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(exist_ok=True)  # the first process may not have made it yet
        save_random_state(Path(output_dir) / self.random_file, loss_since_log=self._tr_loss.item())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_random_state(Path(checkpoint) / self.random_file)

    @property
    def random_file(self) -> str:
        """The name of the file in a checkpoint with this process's random state and its losses since the last log."""
        return f"random_{self.args.process_index}.json"

    def complete_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        """Add the state that the Trainer does not save to a checkpoint, and seal it."""
        state["best"] = self.best.save_state(folder) if self.best else {}
        (folder / STATE_FILE).write_text(json.dumps(state), "utf-8")
        shutil.copyfile(self.record.folder / "metrics.jsonl", folder / "metrics.jsonl")
        seal_folder(folder, identity=self.record.name, name=folder.name)

    @staticmethod
    def average_over_processes(value: float) -> float:
        """Return the mean over all processes: each knows the losses of its own examples only."""
        found = gather_items([value])
        return sum(found) / len(found)


class StopAndResume(TrainerCallback):
    """Stops after a step, with a checkpoint, when a stop was requested. When resuming, restores what the Trainer does
    not: the losses since its last log and the sum of all earlier ones. In a new run, starts the adapter's ramp."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the ramp of a new run, or restore a resumed one from the checkpoint the Trainer has just loaded."""
        if not state.global_step:
            start_ramp(self.trainer.model)
            return
        trainer, folder = self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = json.loads((folder / STATE_FILE).read_text("utf-8"))
        # earlier versions: one mean loss for all
        kept = json.loads((folder / trainer.random_file).read_text("utf-8")) | kept
        state.compute_steps(args, state.max_steps)  # train.save_steps may have changed
        trainer._tr_loss += kept["loss_since_log"]
        trainer._globalstep_last_logged, trainer._total_loss_scalar = kept["logged_at"], kept["loss_sum"]
        trainer._initial_global_step, trainer.earlier_seconds = 0, kept["seconds"]
        trainer.earlier_peak = kept.get("peak_memory_bytes", 0)  # missing from checkpoints of earlier versions
        if trainer.best:
            trainer.best.load_state(folder, kept["best"])

    def on_step_end(self, args, state, control, **kwargs):
        """Save if a stop was requested or a checkpoint is due in any process: all of them must decide the same."""
        flags = gather_items([(bool(STOP.asked), self.trainer.is_checkpoint_due())])
        stop, due = (any(values) for values in zip(*flags, strict=True))
        control.should_save = control.should_save or stop or due
        control.should_training_stop = control.should_training_stop or stop

    def on_epoch_end(self, args, state, control, **kwargs):
        """Check what was trained before `BestEpoch`, a later callback, scores it and keeps its weights."""
        if self.trainer.best:
            self.trainer.check_losses()
            self.trainer.check_weights()

    def on_save(self, args, state, control, **kwargs):
        """Start the clock of `train.save_minutes` again."""
        self.trainer.saved_at = time.perf_counter()
