"""One run from settings to its record: load, evaluate, train, evaluate again, write down."""

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from dual_lora.lab import data, evaluation, methods, models
from dual_lora.lab.memory import PeakMemory
from dual_lora.lab.mirror import Mirror, open_mirror
from dual_lora.lab.runs import Record, task_of
from dual_lora.lab.settings import Settings, UserError
from dual_lora.lab.summary import summary


class Progress(ProgressCallback):
    """The Trainer's progress bar with the newest loss and the speed beside it, instead of a line for every log step."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.started, self.seen = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            speed = (state.num_input_tokens_seen - self.seen) / (time.perf_counter() - self.started)
            self.training_bar.set_postfix({"loss": f"{float(logs['loss']):.4f}", "tokens/s": f"{speed:,.0f}"})


class Log(TrainerCallback):
    """Every logged row into metrics.jsonl and from there to the mirror; a loss that is no number ends the run."""

    NAMES = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}

    def __init__(self, record: Record, mirror: Mirror) -> None:
        self.record, self.mirror = record, mirror

    def write(self, step: int, row: dict[str, Any]) -> None:
        row = {"step": step, **row}
        self.record.log(row)
        self.mirror.log(row)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.write(step, {f"eval/{name}": value for name, value in scores.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        row = {self.NAMES[k]: float(v) for k, v in logs.items() if k in self.NAMES}
        self.write(state.global_step, {"epoch": round(state.epoch, 4), **row})
        if not isfinite(row["train/loss"]):
            raise UserError(
                f"the loss is {row['train/loss']} at step {state.global_step}; "
                f"take a lower train.lr (it was {args.learning_rate:g}) or model.dtype=float32"
            )


class ScaledTrainer(Trainer):
    """A Trainer whose backward sees the loss times `scale`; gradients reach the weights divided by it."""

    def __init__(self, *, scale: float, model: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.scale = scale
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(lambda gradient: gradient / scale)

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * self.scale

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs) / self.scale


def trainer(settings: Settings, **kwargs: Any) -> Trainer:
    """Return the Trainer of a run."""
    scale = settings.train.loss_scale
    return Trainer(**kwargs) if scale is None else ScaledTrainer(scale=scale, **kwargs)


class BestEpoch(TrainerCallback):
    """Scores every epoch and keeps the trained weights of the best one, for tasks whose protocol says so."""

    def __init__(self, measure: Callable[[str], tuple[dict, list]], metric: str, log: Log) -> None:
        self.measure, self.metric, self.log = measure, metric, log
        self.best, self.epoch, self.weights, self.last = -float("inf"), None, {}, None

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        scores, _ = self.measure("epoch")
        self.last = scores
        self.log.scores(state.global_step, scores)
        if scores[self.metric] > self.best:
            self.best, self.epoch = scores[self.metric], round(state.epoch, 4)
            self.weights = {name: value.to("cpu", copy=True) for name, value in trained_state(model).items()}

    def restore(self, model: torch.nn.Module) -> None:
        model.load_state_dict(self.weights, strict=False)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return everything training may change: trained weights and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value.detach() for name, value in model.state_dict().items() if name not in frozen}


def run(settings: Settings) -> dict[str, Any]:
    """Train and evaluate one run, or find it finished; print what it came to and return its result.

    Raises:
        UserError: something the user can mend. `failure.json` keeps the reason of any failed run.
    """
    record = Record.of(settings)
    result = None if settings.force else record.result()
    if result:
        print(f"finished: {record.shown()} (force=true runs it anew)")
    else:
        quiet()
        record.start(settings)
        mirror = mirror_of(settings, record)
        try:
            result = work(settings, record, mirror)
            mirror.summary({name: value for name, value in result.items() if name != "data"})
            mirror.finish(0)
        except BaseException as error:
            record.fail(error)
            mirror.finish(1)
            raise
    print(summary(result, record))
    return result


def quiet() -> None:
    """Keep the libraries' chatter off the screen; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def mirror_of(settings: Settings, record: Record) -> Mirror:
    names = (settings.model.name, settings.task.name, settings.method.name)
    return open_mirror(
        settings.wandb.mode,
        project=settings.wandb.project,
        entity=settings.wandb.entity,
        run_id=record.name.rsplit("_", 1)[1],
        name=record.name,
        group=settings.study,
        job_type="train",
        tags=["/".join(names), *names],
        config=asdict(settings),
        folder=record.folder,
    )


def work(settings: Settings, record: Record, mirror: Mirror) -> dict[str, Any]:
    """Do the run: everything between an empty record and its result."""
    task = task_of(settings)
    train = evaluation.load_split(task, "train", settings)
    held_out = evaluation.load_scored(task, settings)
    set_seed(settings.seed)
    base, tokenizer = models.load(settings, task)
    set_seed(settings.seed)  # so that the adapter's draw does not depend on what loading drew
    model = methods.attach(base, settings, task.form)
    examples = data.encode(train.rows, task, tokenizer, settings)
    data.check_room(base, max(map(len, examples["input_ids"])), settings)
    log = Log(record, mirror)

    def measure(title: str) -> tuple[dict, list]:
        return evaluation.evaluate(model, tokenizer, task, held_out, settings, title)

    best = BestEpoch(measure, task.metric, log) if settings.task.checkpoint == "best" else None
    loop = trainer(
        settings,
        model=model,
        args=arguments(settings, record),
        train_dataset=examples,
        data_collator=data.collator(task, tokenizer),
        processing_class=tokenizer,
        optimizers=(methods.optimizer(model, settings), None),
        callbacks=[log, best] if best else [log],
    )
    loop.remove_callback(PrinterCallback)
    progress = Progress()
    loop.add_callback(progress)
    before = scores_before(record)
    if before is None and settings.eval.before:
        before = measure("before")[0]
        log.scores(0, before)
    checkpoint = record.checkpoint()
    started = time.perf_counter()
    with PeakMemory() as memory:
        trained = loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    if best:
        best.restore(model)
    model.save_pretrained(record.folder / ("model" if settings.method.peft is None else "adapter"))
    merged = methods.merge(model)
    metrics, predictions = measure("after")
    log.scores(trained.global_step, metrics)
    record.write_lines("predictions.jsonl", predictions)
    result = {
        "identity": record.name,
        "model": settings.model.name,
        "task": task.name,
        "task_version": task.version,
        "method": settings.method.name,
        "seed": settings.seed,
        "metric": task.metric,
        "metrics": metrics,
        "merged": merged,
        "metrics_before": before,
        "best_epoch": best.epoch if best else None,
        "metrics_last_epoch": best.last if best else metrics,
        **methods.parameters(model),
        "kernels": methods.kernels(model),
        "steps": trained.global_step,
        "train_loss": trained.training_loss,
        "train_seconds": seconds,
        "tokens_per_second": (loop.state.num_input_tokens_seen - progress.seen) / seconds,
        "peak_memory_bytes": memory.peak,
        "data": {name: split.facts() for name, split in {"train": train, **held_out}.items()},
    }
    record.write("result.json", result)
    shutil.rmtree(loop.args.output_dir, ignore_errors=True)
    return result


def scores_before(record: Record) -> dict[str, float] | None:
    """Return the scores before training that an earlier try of this run has logged."""
    for row in record.logged():
        scores = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        if row["step"] == 0 and scores:
            return scores
    return None


def arguments(settings: Settings, record: Record) -> TrainingArguments:
    """Return the Trainer's arguments: the task's protocol and the run's settings."""
    train, task, cuda = settings.train, settings.task, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(record.folder / "checkpoints"),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=task.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        label_smoothing_factor=task.label_smoothing,
        optim="adamw_torch",
        bf16=settings.model.dtype == "bfloat16",
        fp16=settings.model.dtype == "float16" and cuda,
        use_cpu=not cuda,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        seed=settings.seed,
        full_determinism=settings.deterministic,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,  # for `Progress`
    )
