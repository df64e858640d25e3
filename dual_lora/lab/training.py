"""One run from settings to its record: load, evaluate, train, evaluate again, write down."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    modeling_gguf_pytorch_utils,
    set_seed,
)
from transformers.trainer_utils import enable_full_determinism

from dual_lora.lab import checkpoints, data, evaluation, faults, lock, memory, methods, models, processes
from dual_lora.lab.disk import remove
from dual_lora.lab.loop import BestEpoch, Loop, saving
from dual_lora.lab.memory import PeakMemory
from dual_lora.lab.mirror import Mirror, open_mirror
from dual_lora.lab.runs import TRAINED, Record, task_of
from dual_lora.lab.settings import Settings, UserError, require
from dual_lora.lab.stopping import STOP, Stopped
from dual_lora.lab.summary import summary

# The share of entries of dL/dSign that were clipped at a logged step; in a result, the largest.
CLIPPED = "train/clipped_share"


class Progress(ProgressCallback):
    """The Trainer's progress bar with the newest loss and the speed beside it, instead of a line for every log step."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.started, self.seen = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            speed = (state.num_input_tokens_seen - self.seen) / (time.perf_counter() - self.started)
            self.training_bar.set_postfix({"loss": f"{float(logs['loss']):.4f}", "tokens/s": f"{speed:,.0f}"})

    def close(self) -> None:
        """End the bar's line, also where training has failed, so that what is said next has a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class Log(TrainerCallback):
    """Every logged row into metrics.jsonl and from there to the mirror."""

    NAMES = {name: f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "clipped_share")}

    def __init__(self, record: Record, mirror: Mirror) -> None:
        self.record, self.mirror = record, mirror

    def write(self, step: int, row: dict[str, Any]) -> None:
        if not processes.first():
            return
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


@faults.told()
def run(settings: Settings) -> dict[str, Any]:
    """Train and evaluate one run, or find it finished; print what it came to and return its result.

    Raises:
        UserError: something the user can mend. `failure.json` keeps the reason of any failed run.
        Elsewhere: another process does this run.
        Stopped: a stop was asked for; the next try goes on from the newest checkpoint.
    """
    STOP.check()
    processes.join()
    record = Record.of(settings)
    processes.share(record.clean)
    result = finished(settings, record)
    if result:
        print(f"finished: {record.shown()} (force=true runs it anew)")
    else:
        quiet()
        with ExitStack() as held:
            processes.share(lambda: held.enter_context(lock.held(record.folder)))
            result = finished(settings, record) or attempt(settings, record)  # another may just have done it
            processes.share(record.settle)
            processes.share(record.tidy)
    print(summary(result, record))
    return result


def finished(settings: Settings, record: Record) -> dict[str, Any] | None:
    """Return the result of a run that is done and not to be done again."""
    return None if settings.force else processes.share(record.result)


def attempt(settings: Settings, record: Record) -> dict[str, Any]:
    """Do a run that is not finished and return its result; what it sets for the process ends with it."""
    with of_its_own(settings):
        return do(settings, record)


def do(settings: Settings, record: Record) -> dict[str, Any]:
    """Do a run in its record and its mirror, and keep the reason if it fails."""
    tried = record.tried(settings)
    processes.share(lambda: tried.start(settings))
    mirror = mirror_of(settings, record)
    try:
        with faults.told(), memory.told(memory.smaller_model(settings)):
            result = work(settings, tried, mirror)
        mirror.summary({name: value for name, value in result.items() if name not in ("data", "sha256")})
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
def of_its_own(settings: Settings) -> Iterator[None]:
    """Set what deterministic=true asks for, before the record tells of it, and keep that from the runs after this one:
    it holds for the whole process."""
    cudnn, variables = torch.backends.cudnn, dict(os.environ)
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    try:
        if settings.deterministic:
            enable_full_determinism(settings.seed)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _, cudnn.deterministic, cudnn.benchmark = before
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


def quiet() -> None:
    """Keep the libraries' chatter off the screen; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # a bar with no switch of its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def mirror_of(settings: Settings, record: Record) -> Mirror:
    names = (settings.model.name, settings.task.name, settings.method.name)
    return open_mirror(
        settings.wandb.mode if processes.first() else "disabled",
        project=settings.wandb.project,
        entity=settings.wandb.entity,
        run_id=f"{settings.study}-{record.name.rsplit('_', 1)[1]}",
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
    able = settings.model.dtype != "float16" or torch.cuda.is_available()
    require(able, "model.dtype=float16: trains on a GPU only; take model.dtype=bfloat16 or float32")
    with processes.first_alone():
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
        with memory.told(memory.fewer_rows(settings, models.sharded(model))):
            return evaluation.evaluate(model, tokenizer, task, held_out, settings, title)

    best = BestEpoch(measure, task.metric, log) if settings.task.checkpoint == "best" else None
    loop = Loop(
        record,
        train.rows["id"],
        best,
        settings.train.loss_scale,
        settings.train.save_minutes,
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
    before = processes.share(lambda: scores_before(record))
    if before is None and settings.eval.before:
        before = measure("before")[0]
        log.scores(0, before)
    trained = processes.share(record.trained)
    if trained:
        loop.load(record.weights(settings))
    else:
        with closing(progress), memory.told(memory.smaller_batch(settings)):
            trained = train_and_keep(loop, best, record, settings)
    merged = methods.merge(model)
    metrics, predictions = measure("after")
    log.scores(trained["steps"], metrics)
    processes.share(lambda: record.write_lines("predictions.jsonl", predictions))
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
        "clipped_share": max((row[CLIPPED] for row in record.logged() if CLIPPED in row), default=None),
        "steps": trained["steps"],
        "train_loss": trained["train_loss"],
        "train_seconds": trained["train_seconds"],
        "tokens_per_second": trained["tokens"] / trained["train_seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "warnings": evaluation.warnings(task, predictions),
        "data": {name: split.facts() for name, split in {"train": train, **held_out}.items()},
    }
    return processes.share(lambda: record.finish(result))


def train_and_keep(loop: Loop, best: BestEpoch | None, record: Record, settings: Settings) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one, and return what the result tells of it.

    The weights are kept, and then `trained.json`, so that no later kill costs the training.
    """
    with PeakMemory() as peak:
        done = loop.fit(processes.share(record.checkpoint))
    with STOP.waiting():  # what is trained is kept first
        if best:
            best.restore(loop.model)
        loop.check_weights()
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
            processes.share(lambda: remove(folder))
            loop.model.save_pretrained(folder, is_main_process=processes.first())
            processes.share(lambda: checkpoints.seal(folder, record.folder / TRAINED, **facts))
    STOP.check()
    return facts


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
    found = TrainingArguments(
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
        ddp_find_unused_parameters=False,
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
    found._n_gpu = min(found.n_gpu, 1)  # else one process would share every batch among all GPUs it sees
    return found
