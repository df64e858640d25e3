"""One run from settings to its record: load, evaluate, train, evaluate again, write down."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from dual_lora.lab import checkpoints, data, evaluation, lock, memory, methods, models
from dual_lora.lab.disk import remove
from dual_lora.lab.loop import BestEpoch, Loop, saving
from dual_lora.lab.memory import PeakMemory
from dual_lora.lab.mirror import Mirror, open_mirror
from dual_lora.lab.runs import TRAINED, Record, task_of
from dual_lora.lab.settings import Settings, Train, UserError
from dual_lora.lab.stopping import STOP, Stopped
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
    """Every logged row into metrics.jsonl and from there to the mirror."""

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


def run(settings: Settings) -> dict[str, Any]:
    """Train and evaluate one run, or find it finished; print what it came to and return its result.

    Raises:
        UserError: something the user can mend. `failure.json` keeps the reason of any failed run.
        Elsewhere: another process does this run.
        Stopped: a stop was asked for; the next try goes on from the newest checkpoint.
    """
    STOP.check()
    record = Record.of(settings)
    record.clean()
    result = None if settings.force else record.result()
    if result:
        print(f"finished: {record.shown()} (force=true runs it anew)")
    else:
        quiet()
        with lock.held(record.folder):
            result = None if settings.force else record.result()  # another process may just have done it
            result = result or attempt(settings, record)
            record.settle()
            record.tidy()
    print(summary(result, record))
    return result


def attempt(settings: Settings, record: Record) -> dict[str, Any]:
    """Do a run that is not finished, keep the reason if it fails, and return its result."""
    tried = record.tried(settings)
    tried.start(settings)
    mirror = mirror_of(settings, record)
    try:
        with of_its_own():
            result = work(settings, tried, mirror)
        mirror.summary({name: value for name, value in result.items() if name != "data"})
        mirror.finish(0)
        return result
    except Stopped:
        mirror.finish(1)
        raise
    except BaseException as error:
        with suppress(UserError):  # a full disk takes no reason either
            tried.fail(error)
        mirror.finish(1)
        raise


@contextmanager
def of_its_own() -> Iterator[None]:
    """Keep what deterministic=true sets for the whole process from the runs after it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


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
        job_type=settings.wandb.job_type,
        tags=["/".join(names), *names, *settings.wandb.tags],
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
        with memory.told(f"eval.batch_size={max(1, settings.eval.batch_size // 2)} takes less"):
            return evaluation.evaluate(model, tokenizer, task, held_out, settings, title)

    best = BestEpoch(measure, task.metric, log) if settings.task.checkpoint == "best" else None
    loop = Loop(
        record,
        train.rows["id"],
        best,
        settings.train.loss_scale,
        model=model,
        args=arguments(settings, record),
        train_dataset=examples,
        data_collator=data.collator(task, tokenizer),
        processing_class=tokenizer,
        optimizers=(methods.optimizer(model, settings), None),
        callbacks=[log, best] if best else [log],
    )
    loop.remove_callback(PrinterCallback)
    loop.add_callback(Progress())
    before = scores_before(record)
    if before is None and settings.eval.before:
        before = measure("before")[0]
        log.scores(0, before)
    trained = record.trained()
    if trained:
        loop.load(record.weights(settings))
    else:
        with memory.told(smaller_batch(settings.train)):
            trained = train_and_keep(loop, best, record, settings)
    merged = methods.merge(model)
    metrics, predictions = measure("after")
    log.scores(trained["steps"], metrics)
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
        "best_epoch": trained["best_epoch"],
        "metrics_last_epoch": trained["metrics_last_epoch"] or metrics,
        **methods.parameters(model),
        "kernels": methods.kernels(model),
        "steps": trained["steps"],
        "train_loss": trained["train_loss"],
        "train_seconds": trained["train_seconds"],
        "tokens_per_second": trained["tokens"] / trained["train_seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "warnings": evaluation.warnings(task, predictions),
        "data": {name: split.facts() for name, split in {"train": train, **held_out}.items()},
    }
    record.write("result.json", result)
    return result


def train_and_keep(loop: Loop, best: BestEpoch | None, record: Record, settings: Settings) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one, and return what the result tells of it.

    The weights are kept, and then `trained.json`, so that no later kill costs the training.
    """
    with PeakMemory() as peak:
        done = loop.fit(record.checkpoint())
    if best:
        best.restore(loop.model)
    facts = {
        "steps": done.global_step,
        "train_loss": done.training_loss,
        "train_seconds": loop.seconds,
        "tokens": loop.state.num_input_tokens_seen,
        "peak_memory_bytes": peak.peak,
        "best_epoch": best.epoch if best else None,
        "metrics_last_epoch": best.last if best else None,
        "logged": record.logged(),
    }
    folder = record.weights(settings)
    with saving(record.folder):
        remove(folder)
        loop.model.save_pretrained(folder)
        checkpoints.seal(folder, record.folder / TRAINED, **facts)
    return facts


def smaller_batch(train: Train) -> str:
    """Return the settings that train on as many examples a step with fewer at a time."""
    size, parts = train.batch_size, next((n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0), 1)
    if parts == 1:
        return "a lower task.max_length or model.dtype=bfloat16 takes less"
    smaller = f"train.batch_size={size // parts} train.accumulation={train.accumulation * parts}"
    return f"{smaller} takes less with as many examples a step"


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
