"""One run, from its settings to its record: load, evaluate, train, evaluate again, write the result."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments
from transformers.trainer_utils import enable_full_determinism

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import Stopped, UserError, require, translate_machine_errors, translate_memory_errors
from dual_lora.lab.evaluate.evaluate import check_scoring, collect_missing_scores, evaluate_splits, find_warnings
from dual_lora.lab.evaluate.predict import PROBE_ROWS, check_batches, describe_idle_stops, encode_scored_rows
from dual_lora.lab.inputs.splits import (
    load_development_split,
    load_scored_splits,
    load_split,
    read_training_split,
)
from dual_lora.lab.model.adapt import (
    check_method,
    check_named_modules,
    count_parameters,
    describe_adapter,
    describe_incomplete_ramp,
    describe_rounded_ratio,
    describe_untouched_experts,
    draw_initial_model,
    list_kernels,
    list_rates,
)
from dual_lora.lab.model.encode import build_collator, check_chats, check_examples, count_cut_rows, encode_rows
from dual_lora.lab.model.load import is_sharded, list_held_dropouts, unwrap_adapter
from dual_lora.lab.model.merge import merge_adapter
from dual_lora.lab.model.source import describe_other_architecture
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.init_from import check_base_weights, find_init_weights
from dual_lora.lab.record.mirror import Mirror, Mirrors, open_mirror
from dual_lora.lab.record.record import TRAINED_FILE, Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import format_finished, format_summary
from dual_lora.lab.record.tensorboard import Board, open_board
from dual_lora.lab.system.distributed import (
    collect_warnings,
    is_first_process,
    join_processes,
    run_first_process_first,
    share_from_first,
)
from dual_lora.lab.system.files import remove_path, translate_save_errors
from dual_lora.lab.system.libraries import keep_float32_products, silence_libraries
from dual_lora.lab.system.lock import hold_lock
from dual_lora.lab.system.memory import PeakMemory, suggest_fewer_rows, suggest_smaller_batch, suggest_smaller_model
from dual_lora.lab.system.sealed import hash_file, seal_folder
from dual_lora.lab.system.signals import STOP
from dual_lora.lab.train.activations import apply_gradient_checkpointing
from dual_lora.lab.train.callbacks import LOSS_COLUMN, BestEpoch, BestLoss, BestWeights, LogCallback, ProgressBar
from dual_lora.lab.train.packing import PackingCollator, check_packing
from dual_lora.lab.train.trainer import RunTrainer
from tasks import Split, Task

# Column with the fraction of entries of dL/dSign clipped at a logged step; a result holds the largest one.
CLIPPED_COLUMN = "train/clipped_share"
# The facts about training where nothing trains (method=none).
UNTRAINED = {"steps": 0, "train_loss": None, "train_seconds": 0.0, "tokens": 0, "peak_memory_bytes": 0}
UNTRAINED |= {"best_epoch": None, "metrics_last_epoch": None}


@translate_machine_errors()
def train_run(run: Run) -> dict[str, Any]:
    """Train and evaluate one run, or find it finished; print its scores and return its result.

    Raises:
        UserError: something the user can fix. `failure.json` keeps the reason of any failed run.
        RunHeldElsewhere: another process is doing this run.
        Stopped: a stop was requested; the next attempt resumes from the newest checkpoint.
    """
    STOP.raise_if_asked()
    join_processes()
    settings, record = run.settings, run.record
    share_from_first(record.finish_cleanup)
    result = find_result(settings, record)
    if result:
        print(format_finished(result, run))
    else:
        silence_libraries()
        with ExitStack() as stack:
            share_from_first(lambda: stack.enter_context(hold_lock(record.folder)))
            # Before this process held the lock, another one may have finished the run.
            result = find_result(settings, record) or attempt_run(settings, record)
            share_from_first(record.install_rerun)
            share_from_first(record.remove_leftovers)
        print(format_summary(result, run))
    return result


def find_result(settings: Settings, record: Record) -> dict[str, Any] | None:
    """Return the result of a finished run, unless it is forced to run again.

    Raises:
        UserError: the run is finished, but what it left is damaged.
    """
    return None if settings.force else share_from_first(record.read_finished)


def attempt_run(settings: Settings, record: Record) -> dict[str, Any]:
    """Do a run that is not finished and return its result; if it fails, the reason is kept in its record."""
    attempt = record.select_attempt_record(settings)
    with isolate_determinism(settings):
        share_from_first(lambda: attempt.prepare_folder(settings))
        board = open_board(settings, attempt) if is_first_process() else Board()
        mirror = Mirrors(open_run_mirror(settings, record), board)
        try:
            remedy = suggest_smaller_model(settings)
            with translate_machine_errors(), translate_memory_errors(remedy), collect_warnings() as warnings:
                result = train_and_evaluate(settings, attempt, mirror, warnings)
            mirror.set_summary({name: value for name, value in result.items() if name not in ("data", "sha256")})
            mirror.finish(0)
            return result
        except Stopped:
            mirror.finish(1)
            raise
        except BaseException as error:
            with suppress(UserError):  # on a full disk the reason cannot be written either
                attempt.write_failure(error)
            mirror.finish(1)
            raise


@contextmanager
def isolate_determinism(settings: Settings) -> Iterator[None]:
    """Enable determinism for this run, then restore global state: torch and transformers set it for the process."""
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


def open_run_mirror(settings: Settings, record: Record) -> Mirror:
    """Return the W&B run that mirrors a run; one that does nothing in all processes but the first."""
    names = (settings.model.name, settings.task.name, settings.method.name)
    return open_mirror(
        settings.wandb.mode if is_first_process() else "disabled",
        project=settings.wandb.project,
        entity=settings.wandb.entity,
        run_id=f"{settings.study}-{record.name.rsplit('_', 1)[1]}",
        name=record.name,
        group=settings.study,
        job_type=settings.wandb.job_type,
        tags=["/".join(names), *names, *settings.wandb.tags],
        config=list_mirrored_settings(settings),
        folder=record.folder,
    )


def list_mirrored_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as a mirror gets them: of what lies on this machine only the name, because where it lies says
    nothing about the run."""
    values = asdict(settings)
    for place, key in ((values, "data_dir"), (values, "init_from"), (values["model"], "path")):
        path = Path(place[key] or "").expanduser().absolute()
        if place[key] and path.exists():  # `init_from` may name an adapter of the hub
            place[key] = path.name
    return values


@dataclass(frozen=True)
class RunRows:
    """The rows of a run: those trained on; those scored, by split; those that epochs are compared on, under the name of
    a scored split; those whose loss is logged. The last two are None where nothing asks for them."""

    train: Split
    scored: dict[str, Split]
    development: dict[str, Split] | None
    validation: Split | None

    def list_development(self) -> list[Split]:
        """Return the rows that epochs are compared on, as a list of one split or none."""
        return list((self.development or {}).values())


def load_run_rows(task: Task, settings: Settings) -> RunRows:
    """Return the rows of a run. One process fetches and prepares them before the others read them.

    Raises:
        UserError: the data is missing, damaged, cannot be fetched, or has too few rows.
    """
    with run_first_process_first():
        return RunRows(
            load_split(task, "train", settings),
            load_scored_splits(task, settings),
            load_development_split(task, settings),
            read_training_split(task, settings)[1] if settings.task.validation_size else None,
        )


def train_and_evaluate(settings: Settings, record: Record, mirror: Mirrors, warnings: list[str]) -> dict[str, Any]:
    """Do everything between an empty record and its result, which is written last. warnings: of the result; takes in
    further ones.

    Raises:
        UserError: model.dtype=float16 without a GPU, an adapter of other base weights to start from, or data, model,
            method and training refuse what they are given.
        Stopped: a stop was requested.
    """
    task = load_task(settings)
    able = settings.model.dtype != "float16" or torch.cuda.is_available()
    require(able, "model.dtype=float16: trains on a GPU only; take model.dtype=bfloat16 or float32")
    check_base_weights(settings)
    check_method(settings, task.form)
    rows = load_run_rows(task, settings)
    if settings.model.chat:  # before the weights are loaded, and the rows to be scored before hours of training
        tokenizer = load_tokenizer(settings)
        for split in (rows.train, *rows.scored.values(), *rows.list_development()):
            check_chats(tokenizer, split.rows, settings)
    if not type(task).__module__.startswith("tasks."):  # those here are tested, and some start Java
        check_scoring(task, rows.scored)
    model, tokenizer = draw_initial_model(settings, task, len(rows.train.rows))
    check_named_modules(model, settings, task.form)
    apply_gradient_checkpointing(model, settings)
    warnings += describe_other_architecture(settings) + describe_rounded_ratio(model, settings)
    warnings += describe_untouched_experts(model, settings) + describe_idle_stops(tokenizer, settings)
    log = LogCallback(record, mirror, bool(settings.train.log_zeros))

    def score_model(title: str, splits: dict[str, Split] = rows.scored) -> tuple[dict, list]:
        with translate_memory_errors(suggest_fewer_rows(settings, is_sharded(model))):
            return evaluate_splits(model, tokenizer, task, splits, settings, title)

    trainer = build_trainer(model, tokenizer, task, rows, score_model, log, settings)
    encoded = {"train": trainer.train_dataset} | encode_scored_splits(rows, model, task, tokenizer, settings)
    cut = count_cut_splits(rows, encoded, task, tokenizer, settings)
    check_batches(model, tokenizer, task, list(islice(rows.train.rows, PROBE_ROWS)), settings)
    before = share_from_first(lambda: read_initial_scores(record))
    if before is None and settings.eval.before:
        before = score_model("before")[0]
        log.write_scores(0, before)
    trained = train_or_load(trainer, record, settings)
    merged = merge_adapter(model)
    with collect_missing_scores() as missing:
        metrics, predictions = score_model("after")
    log.write_scores(trained["steps"], metrics)
    share_from_first(lambda: record.write_lines("predictions.jsonl", predictions))
    scores = {"metrics": metrics, "merged": merged, "metrics_before": before}
    warnings += missing + find_warnings(task, predictions) + describe_incomplete_ramp(model)
    warnings += describe_incomplete_warmup(settings, trained["steps"], settings.count_steps(len(rows.train.rows)))
    result = collect_result(settings, record, task, model, rows, trained, scores, warnings)
    for name, count in cut.items():
        result["data"][name]["cut"] = count
    return share_from_first(lambda: record.write_result(result))


def describe_incomplete_warmup(settings: Settings, steps: int, planned: int) -> list[str]:
    """Return a warning if training ended before the learning rate had reached train.lr; none otherwise, or if nothing
    trained. steps: those done. planned: those of a run that does not stop early."""
    task = settings.task
    warmup = math.ceil(task.warmup_ratio * planned) if task.warmup_steps is None else task.warmup_steps
    if settings.train.schedule == "constant" or not 0 < steps < warmup:
        return []
    named = "task.warmup_ratio" if task.warmup_steps is None else "task.warmup_steps"
    return [f"the learning rate only rose for {steps} of {warmup} steps; train longer or lower {named}"]


def encode_scored_splits(
    rows: RunRows, model: torch.nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, Dataset]:
    """Refuse scored and development rows that the model cannot be scored on. Return the scored splits, encoded; splits
    that are scored by what the model generates, of which only the prompts are encoded, are left out.

    Raises:
        UserError: a row has no tokens, or more than the model has positions for.
    """
    for split in rows.list_development():
        encode_scored_rows(model, tokenizer, task, "the development rows", split.rows, settings)
    found = {
        name: encode_scored_rows(model, tokenizer, task, name, split.rows, settings)
        for name, split in rows.scored.items()
    }
    return {name: examples for name, examples in found.items() if examples is not None}


def count_cut_splits(
    rows: RunRows, encoded: dict[str, Dataset], task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, int]:
    """Return the number of rows cut at `task.max_length`, by split; splits without any are left out. Prints it for
    scored splits; the summary does for training. A scored prompt is never cut."""
    found = {}
    for name, split in {"train": rows.train, **rows.scored}.items():
        if name not in encoded or not (count := count_cut_rows(split.rows, encoded[name], task, tokenizer, settings)):
            continue
        found[name] = count
        if name != "train" and is_first_process():
            cut = f"{count:,} of {len(split.rows):,} rows are cut at task.max_length={settings.task.max_length}"
            print(f"{name}: {cut}", file=sys.stderr)
    return found


def build_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: RunRows,
    score_model: Callable[..., tuple[dict, list]],
    log: LogCallback,
    settings: Settings,
) -> RunTrainer:
    """Return the trainer of a run, with the callback that keeps the best weights if the protocol asks for one.

    Raises:
        UserError: the model cannot take the rows: they are too long, or packed.
    """
    examples = encode_rows(rows.train.rows, task, tokenizer, settings)
    check_examples(unwrap_adapter(model), "train", rows.train.rows, examples, settings)
    collate = build_collator(task, tokenizer)
    if settings.train.packing:
        check_packing(model)
        collate = PackingCollator(tokenizer.pad_token_id, settings.task.max_length)
    best: BestWeights | None = build_best_epoch(
        settings, task, log, partial(score_model, splits=rows.development or rows.scored)
    )
    if rows.validation:
        encoded, keeps = encode_rows(rows.validation.rows, task, tokenizer, settings), keeps_best_loss(settings)
        check_examples(unwrap_adapter(model), "the validation rows", rows.validation.rows, encoded, settings)
        every = settings.task.validation_interval
        best = BestLoss(score_model, lambda: trainer.measure_loss(encoded), every, keeps, log)
    with keep_float32_products():
        trainer = RunTrainer(
            log.record,
            settings,
            rows.train.rows["id"],
            best,
            model=model,
            args=build_training_arguments(settings, log.record),
            train_dataset=examples,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[log, best] if best else [log],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_or_load(trainer: RunTrainer, record: Record, settings: Settings) -> dict[str, Any]:
    """Give the model its trained weights, those of an earlier attempt if it finished training, and return the facts
    about the training.

    Raises:
        UserError: training runs out of memory or diverges, or the weights cannot be saved.
        Stopped: a stop was requested.
    """
    trained = share_from_first(record.read_training)
    if trained:
        trainer.load_weights(record.get_weights_folder(settings))
        return trained
    if not any(weight.requires_grad for weight in trainer.model.parameters()):
        return save_training(trainer, record, settings, UNTRAINED)
    progress = ProgressBar(record.name)
    trainer.add_callback(progress)
    with closing(progress), translate_memory_errors(suggest_smaller_batch(settings)):
        return train_and_save(trainer, record, settings)


def collect_result(
    settings: Settings,
    record: Record,
    task: Task,
    model: torch.nn.Module,
    rows: RunRows,
    trained: dict[str, Any],
    scores: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Return the content of result.json. trained: see `train_and_save`. scores: metrics, merged and metrics_before."""
    result = {
        "identity": record.name,
        "model": settings.model.name,
        "task": task.name,
        "task_version": task.version,
        "method": settings.method.name,
        "seed": settings.seed,
        "metric": task.metric,
        **scores,
        "best_epoch": trained["best_epoch"],
        "metrics_last_epoch": trained["metrics_last_epoch"] or (None if rows.development else scores["metrics"]),
        **count_parameters(model),
        "adapter": describe_adapter(model),
        "learning_rates": list_rates(model, settings),
        "dropouts": list_held_dropouts(model),
        "kernels": list_kernels(model),
        "clipped_share": max((row[CLIPPED_COLUMN] for row in record.read_log() if CLIPPED_COLUMN in row), default=None),
        "steps": trained["steps"],
        "batch": settings.describe_batch(),
        "train_loss": trained["train_loss"],
        "train_seconds": trained["train_seconds"],
        "tokens_per_second": trained["tokens"] / (trained["train_seconds"] or 1.0),
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "warnings": warnings,
        "data": {name: split.describe() for name, split in {"train": rows.train, **rows.scored}.items()},
    }
    if rows.validation:
        result["validation_loss"] = find_validation_loss(record, settings)
    if settings.init_from:
        result["init_weights"] = hash_file(find_init_weights(settings))
    if rows.development:
        result["development"] = next(iter(rows.development.values())).describe()
    return result


def keeps_best_loss(settings: Settings) -> bool:
    """Return whether the weights of the lowest validation loss are kept and scored."""
    return settings.task.checkpoint == "best_loss"


def find_validation_loss(record: Record, settings: Settings) -> float | None:
    """Return the loss on the validation rows of the weights that are scored; None if nothing was trained."""
    losses = [row[LOSS_COLUMN] for row in record.read_log() if LOSS_COLUMN in row]
    return (min(losses) if keeps_best_loss(settings) else losses[-1]) if losses else None


def build_best_epoch(settings: Settings, task: Task, log: LogCallback, measure: Callable) -> BestEpoch | None:
    """Return the callback that keeps the best epoch, if the task's protocol or early stopping asks for one."""
    patience = settings.train.early_stopping
    if settings.task.checkpoint != "best" and patience is None:
        return None
    rows = "development" if settings.eval.development_rows else "eval"
    return BestEpoch(measure, task.metric, log, task.is_lower_better(), patience, rows)


def train_and_save(trainer: RunTrainer, record: Record, settings: Settings) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one, and return the facts about training for the result.

    The weights are saved, and then `trained.json`, so that a later kill does not lose the training. If the last step is
    scored before that, its checkpoint holds the training until then (`RunTrainer.is_checkpoint_due`).
    """
    best = trainer.best
    with PeakMemory() as peak:
        done = trainer.fit_run(share_from_first(record.find_checkpoint))
    if best and best.scores_last:
        best.score_last()
    with STOP.defer(safe_point="as soon as the trained weights are saved"):
        if best:
            best.restore_best(trainer.model)
        trainer.check_weights()
        facts = {
            "steps": done.global_step,
            "train_loss": done.training_loss,
            "train_seconds": trainer.train_seconds,
            "tokens": trainer.state.num_input_tokens_seen,
            "peak_memory_bytes": max(trainer.earlier_peak, peak.peak),
            "best_epoch": best.epoch if best else None,
            "metrics_last_epoch": best.last if best and best.rows == "eval" else None,
        }
        facts = save_training(trainer, record, settings, facts)
    STOP.raise_if_asked()
    return facts


def save_training(trainer: RunTrainer, record: Record, settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """Save what was trained, sealed with `facts` and the log up to here, and return these."""
    facts, folder = facts | {"logged": record.read_log()}, record.get_weights_folder(settings)
    with translate_save_errors(record.folder):
        share_from_first(lambda: remove_path(folder))
        trainer.model.save_pretrained(folder, is_main_process=is_first_process())
        share_from_first(lambda: seal_folder(folder, record.folder / TRAINED_FILE, identity=record.name, **facts))
    return facts


def read_initial_scores(record: Record) -> dict[str, float] | None:
    """Return the scores before training if an earlier attempt of this run logged them."""
    for row in record.read_log():
        scores = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        if row["step"] == 0 and scores:
            return scores
    return None


def build_training_arguments(settings: Settings, record: Record) -> TrainingArguments:
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
        warmup_steps=task.warmup_ratio if task.warmup_steps is None else task.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        adam_epsilon=train.adam_epsilon or 1e-8,
        label_smoothing_factor=task.label_smoothing,
        optim="adamw_torch",
        bf16=settings.model.dtype == "bfloat16",
        fp16=settings.model.dtype == "float16" and cuda,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        torch_compile=bool(train.compile),
        seed=settings.seed,
        full_determinism=settings.deterministic,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,  # `ProgressBar` replaces it
    )
    found._n_gpu = min(found.n_gpu, 1)  # else one process would share every batch among all GPUs it sees
    return found
