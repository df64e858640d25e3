"""The types of every setting and the line that explains it; their values live only in conf/.

`Settings` is the schema that a command line is composed against, so an unknown key or a wrong type is refused while it
is read. Checks that need more than a type are in `__post_init__`; they raise `UserError` with the culprit and the
remedy. `python train.py --help` and docs/settings.md are made from the lines here. Importing this module loads neither
torch nor transformers nor Hydra.
"""

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from dual_lora.lab.errors import UserError, require, suggest_name

# Limit of whole numbers (a seed has 32 bits), and of factors that multiply weights, which would overflow float32.
MAX_INTEGER, MAX_MULTIPLIER = 2**32, 1e6
# Characters of a name in folders' names, and of one on the hub.
MAX_NAME, MAX_HUB_NAME = 60, 96
# No known model has more; a plan builds every layer.
MAX_LAYERS = 1000
# The groups whose settings come from a file in conf/ that a command line chooses by name.
GROUPS = ("model", "task", "method", "hardware")
# The settings of a method that only an adapter has.
METHOD_SETTINGS = ("rank", "alpha", "dropout", "magnitude_ratio", "r1", "r2")
# Fields of method.peft that model/adapt.py fills in where they are null, as where they are not given.
FILLED_FIELDS = ("target_modules", "exclude_modules", "modules_to_save")
# PEFT types that adapt norms, embedding rows or whole blocks instead of linear layers. Unless the YAML names modules,
# PEFT chooses them: on the linear layers of `model.adapt` these types would not be the method that their name says.
TYPES_OF_OTHER_MODULES = {"LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW"}
# Values of PEFT's `init_lora_weights` that change no base weight.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")
# Defaults of task.checkpoint=best_loss, those of LLM-Adapters' and DoRA's scripts.
VALIDATION_ROWS, VALIDATION_STEPS = 120, 80
WANDB_MODES = ("online", "offline", "disabled")


def setting(about: str) -> Any:
    """Declare a setting with the line that --help and docs/settings.md print for it."""
    return field(metadata={"about": about})


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of a setting's choices, naming the nearest.

    Raises:
        UserError: with the setting and its value.
    """
    hint = suggest_name(value, choices)
    require(value in choices, f"{key}={value}: not one of {', '.join(choices)}.{hint}")


def check_positive(group: str, values: object, *names: str) -> None:
    """Refuse settings that are not above 0; null is taken.

    Raises:
        UserError: with the setting and its value.
    """
    for name in names:
        value = getattr(values, name)
        require(value is None or value > 0, f"{group}.{name}={value}: must be positive")


def check_range(group: str, values: object, least: float, below: float, *names: str) -> None:
    """Refuse settings outside of [least, below); null is taken.

    Raises:
        UserError: with the setting and its value.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{group}.{name}={value}: must be a finite number")
        bounds = f"must be in [{least}, {below})" if below < math.inf else "must not be negative"
        require(value is None or least <= value < below, f"{group}.{name}={value}: {bounds}")


def is_file_name(value: str, longest: int) -> bool:
    """Return whether a value names a file or folder on any system, and none that lies elsewhere."""
    clean = value and all(c.isascii() and c.isalnum() or c in "-_." for c in value) and not value.startswith(".")
    return bool(clean) and len(value) <= longest


def check_file_name(key: str, value: str, what: str) -> None:
    """Refuse what names no file or folder, or one that lies elsewhere.

    Raises:
        UserError: with the setting and its value.
    """
    allowed = f"only letters, digits, '-', '_' and '.', at most {MAX_NAME}"
    require(is_file_name(value, MAX_NAME), f"{key}={value[:80]}: {allowed}; {what}")


def is_hub_id(value: str) -> bool:
    """Return whether a value has the form of a hub id, ORG/NAME."""
    parts = value.split("/")
    return len(parts) == 2 and all(is_file_name(part, MAX_HUB_NAME) for part in parts)


def iterate_leaves(values: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full name and value of every setting that holds no others, also those within dictionaries and lists."""
    if is_dataclass(values):
        parts = [(field.name, getattr(values, field.name)) for field in fields(values)]
    elif isinstance(values, dict):
        parts = list(values.items())
    elif isinstance(values, list):
        parts = list(enumerate(values))
    else:
        yield prefix, values
        return
    for name, value in parts:
        yield from iterate_leaves(value, f"{prefix}.{name}" if prefix else str(name))


def check_values(prefix: str, values: object) -> None:
    """Refuse texts that are empty or hold what no terminal shows, and numbers that are infinite, NaN or too large.

    Raises:
        UserError: with the setting and its value.
    """
    for key, value in iterate_leaves(values, prefix):
        if isinstance(value, str) and not key.startswith(("task.options", "task.stop")):
            require(value != "", f"{key}=: empty; give a value, or null for none")
            require(value.isprintable() and len(value) < 4000, f"{key}={value[:80]!r}: not a line of text")
        if isinstance(value, float):
            require(math.isfinite(value), f"{key}={value}: must be a finite number")
        if isinstance(value, int):
            require(abs(value) < MAX_INTEGER, f"{key}={str(value)[:30]}: must be below 2**32")


@dataclass(frozen=True)
class Model:
    """A base model and the names of its parts."""

    name: str = setting("name of the model, also in the names of its runs' folders; ORG/NAME is a hub id")
    hub: str | None = setting("its id on the Hugging Face hub, used unless model.path is given")
    revision: str | None = setting("commit on the hub that pins the weights")
    path: str | None = setting("folder of a saved Hugging Face model, or a GGUF file, instead of the hub")
    bundled: bool = setting("true: the model is part of this repository")
    dtype: str = setting("float32, bfloat16 or float16: type of the frozen weights and of matrix products")
    generates: bool = setting("true: a causal language model, which can write text")
    chat: bool = setting("true: prompts are put into the tokenizer's chat template")
    roles: dict[str, str] = setting("for q, k, v, o, gate, up, down: regular expression for the end of a module's name")
    adapt: list[str] = setting("the roles that an adapter changes")
    split: list[str] = setting(
        "roles of one fused weight, in the order of its blocks (GPT-2: [q,k,v]), each loaded as its own layer"
    )
    dropout: float | None = setting("dropout inside the base model while it trains; null: as its config.json says")
    head: list[str] = setting(
        "modules that are not in the base model (the task's head), trained in full along with the adapter"
    )
    architecture: dict[str, Any] = setting("the model's configuration, for plans without a download")

    @property
    def heads(self) -> set[str]:
        """The names of modules that are a task's own head."""
        return {"classifier", "score", *self.head}

    @property
    def split_roles(self) -> dict[str, str]:
        """The regular expressions of `roles` where `split` has made a layer of each of its roles."""
        return {role: rf"{name}\.{role}" if role in self.split else name for role, name in self.roles.items()}

    def check_split(self) -> None:
        """Refuse to split what is not one weight.

        Raises:
            UserError: with `model.split` and the roles that share a weight.
        """
        shared = {name: [r for r, other in self.roles.items() if other == name] for name in self.roles.values()}
        fused = [f"[{','.join(roles)}]" for roles in shared.values() if len(roles) > 1]
        require(
            not self.split or sorted(self.split) in map(sorted, shared.values()) and len(self.split) > 1,
            f"model.split={self.split}: not the roles of one weight; {self.name} has "
            f"{', '.join(fused) or 'no weight of several roles'}",
        )

    def __post_init__(self) -> None:
        check_values("model", self)
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if not is_hub_id(self.name):
            check_file_name("model.name", self.name, "it names the run's folder")
        for role, pattern in self.roles.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"model.roles.{role}={pattern}: not a regular expression ({error}); fix it") from error
        for role in self.adapt:
            require(
                role in self.roles,
                f"model.adapt: {self.name} has no role {role!r}; its roles are {', '.join(self.roles)}",
            )
        self.check_split()
        check_range("model", self, 0, 1, "dropout")
        layers = self.architecture.get("num_hidden_layers", 1)
        is_count = isinstance(layers, int) and 0 < layers <= MAX_LAYERS
        require(
            is_count, f"model.architecture.num_hidden_layers={layers}: must be a whole number from 1 to {MAX_LAYERS:,}"
        )


@dataclass(frozen=True)
class Task:
    """The protocol of a task, the same for every method."""

    name: str = setting("name of the task, file/subset below tasks/")
    epochs: float = setting("epochs of the task's protocol, the default of train.epochs")
    batch_size: int = setting("batch size of the task's protocol, the default of train.batch_size")
    max_length: int = setting("maximum tokens of an example; longer ones are truncated")
    warmup_ratio: float = setting("fraction of all steps over which the learning rate rises; not the adapter's ramp")
    warmup_steps: int | None = setting("steps over which the learning rate rises, instead of task.warmup_ratio")
    head_dropout: float | None = setting("dropout before the task's head; null: the model's own")
    checkpoint: str = setting(
        "weights that are scored: last (step), best (epoch by score) or best_loss (lowest loss on the validation rows)"
    )
    validation_rows: int | None = setting(
        "set this many training rows apart and log their loss; null: 120 for task.checkpoint=best_loss, else none"
    )
    validation_steps: int | None = setting("steps between two losses on the validation rows; null: 80")
    loss_on_prompt: bool = setting("true: the loss covers the prompt as well as the target")
    label_smoothing: float = setting("fraction of the target's probability that is spread over all classes or tokens")
    max_new_tokens: int = setting("maximum length of generated text, in tokens")
    num_beams: int = setting("beams of beam search; 1: greedy decoding")
    search: str | None = setting("null: transformers' beam search; gpt2_beam: that of LoRA's experiments on GPT-2")
    length_penalty: float = setting("exponent p: beams are ranked by log-probability / length ** p")
    no_repeat_ngram: int = setting("n: no n-gram of the output is generated twice; 0: no limit")
    stop: list[str] = setting("strings that end an output, which is judged up to the first of them")
    options: dict[str, Any] = setting("the task's own options, see its file in tasks/")
    train_rows: int | None = setting("official number of training examples, for plans without the data")

    def __post_init__(self) -> None:
        check_values("task", self)
        for part in self.name.split("/"):
            check_file_name("task.name", part, "it names the run's folder")
        check_choice("task.checkpoint", self.checkpoint, ("last", "best", "best_loss"))
        if self.search is not None:
            check_choice("task.search", self.search, ("gpt2_beam",))
        check_positive("task", self, "epochs", "batch_size", "max_length", "num_beams", "train_rows")
        check_positive("task", self, "validation_rows", "validation_steps")
        both = self.checkpoint == "best" and self.validation_rows
        require(not both, f"task.validation_rows={self.validation_rows}: not with task.checkpoint=best; drop one")
        check_range("task", self, 0, math.inf, "max_new_tokens", "no_repeat_ngram", "warmup_steps")
        check_range("task", self, 0, 1, "warmup_ratio", "label_smoothing", "head_dropout")
        check_range("task", self, 0, MAX_MULTIPLIER, "epochs")
        check_range("task", self, -100, 100, "length_penalty")

    @property
    def validation_size(self) -> int:
        """How many training rows are set apart to log their loss; 0: none."""
        return self.validation_rows or (VALIDATION_ROWS if self.checkpoint == "best_loss" else 0)

    @property
    def validation_interval(self) -> int:
        """Steps between two losses on these rows."""
        return self.validation_steps or VALIDATION_STEPS


@dataclass(frozen=True)
class Method:
    """A way to adapt a model."""

    name: str = setting("name of the method, also in the names of its runs' folders")
    lr: float = setting("the method's usual learning rate, the default of train.lr")
    rank: int | None = setting("parameter budget in LoRA's unit: LoRA's r, r1 + r2 of Dual LoRA")
    alpha: float | None = setting("numerator of the update's scale: alpha / rank, in Dual LoRA alpha / sqrt(r1 r2)")
    dropout: float | None = setting("dropout on the adapter's input")
    magnitude_ratio: float | None = setting("r1 / (r1 + r2): the magnitude group's share of Dual LoRA's rank")
    r1: int | None = setting("rank of the magnitude group, with r2 instead of rank and magnitude_ratio")
    r2: int | None = setting("rank of the direction group, with r1")
    lr_ratio: float | None = setting("LoRA+ (arXiv 2402.12354): ratio of B's learning rate to A's")
    ramp_share: float | None = setting("fraction of all steps over which Dual LoRA's update is ramped up from 0")
    peft: dict[str, Any] | None = setting(
        "the adapter's configuration as PEFT stores it; null: every weight is trained"
    )

    def __post_init__(self) -> None:
        check_values("method", self)
        check_file_name("method.name", self.name, "it names the run's folder")
        check_positive("method", self, "lr", "alpha", "magnitude_ratio", "r1", "r2", "lr_ratio")
        check_range("method", self, 0, 1, "dropout", "magnitude_ratio", "ramp_share")
        check_range("method", self, 0, MAX_MULTIPLIER, "lr", "lr_ratio", "alpha")
        for key in METHOD_SETTINGS:
            value = getattr(self, key)
            require(
                value is None or self.peft is not None,
                f"method.{key}={value}: method {self.name} has no adapter, so no {key}; drop it",
            )
        if self.peft is not None:
            named = isinstance(self.peft.get("peft_type"), str)
            require(named, f"method.peft: {self.name} names no peft_type; give one, such as LORA")
            for key in ("magnitude_ratio", "r1", "r2"):
                value = getattr(self, key)
                known = value is None or key in self.peft
                require(known, f"method.{key}={value}: method {self.name} has no {key}; drop it")
        require(self.rank is None or self.rank >= 1, f"method.rank={self.rank}: must be at least 1")
        shared = self.rank is not None and "magnitude_ratio" in (self.peft or {})
        require(
            not shared or self.rank >= 2,
            f"method.rank={self.rank}: {self.name} shares it between two groups of at least 1 each; take 2 or more",
        )
        require((self.r1 is None) == (self.r2 is None), "method.r1 and method.r2: give both or neither")


@dataclass(frozen=True)
class Train:
    """How long and how fast to train."""

    lr: float = setting("learning rate")
    epochs: float = setting("passes over the training examples, unless max_steps is given")
    max_steps: int | None = setting("optimizer steps, instead of epochs")
    batch_size: int = setting("examples per device and batch")
    accumulation: int = setting("batches per optimizer step (gradient accumulation)")
    weight_decay: float = setting("AdamW's weight decay; biases and norms have none")
    schedule: str = setting("learning rate over time: linear, cosine, constant or constant_with_warmup")
    max_grad_norm: float = setting("gradients are clipped to this norm; 0: no clipping")
    log_zeros: bool | None = setting("true: also log the share of exact zeros in the update (train/zeros)")
    save_steps: int | None = setting("steps between checkpoints; null: only by time")
    save_minutes: float | None = setting("minutes between checkpoints; null: only by steps")
    log_steps: int = setting("steps between two rows of metrics.jsonl")
    max_examples: int | None = setting("train on this many examples only, for a quick test")
    group_by_length: bool | None = setting("true: batch examples of similar length; made results worse (runs/LOG.md)")
    loss_scale: float | None = setting(
        "factor on the loss, divided out of the gradients, as in fp16; changes what Dual LoRA's sign gradient clips"
    )
    head_lr: float | None = setting("learning rate of the task's head, the same under every method; null: train.lr")
    adam_epsilon: float | None = setting("AdamW's epsilon; null: 1e-8")
    gradient_checkpointing: bool | None = setting(
        "true: keep only each layer's input for backward and recompute the rest; less memory, more time"
    )
    compile: bool | None = setting(
        "true: train with torch.compile; minutes to compile, then faster; needs a C++ compiler"
    )
    packing: bool | None = setting("true: the texts of a batch share rows, without attention between them or padding")
    early_stopping: int | None = setting(
        "stop after this many epochs without a better score on eval.development_rows, and keep the best epoch"
    )

    def __post_init__(self) -> None:
        check_values("train", self)
        check_choice("train.schedule", self.schedule, ("linear", "cosine", "constant", "constant_with_warmup"))
        check_positive("train", self, "lr", "epochs", "max_steps", "batch_size", "accumulation")
        check_positive("train", self, "save_steps", "save_minutes", "log_steps", "max_examples", "loss_scale")
        check_positive("train", self, "head_lr", "adam_epsilon", "early_stopping")
        check_range("train", self, 0, math.inf, "weight_decay", "max_grad_norm")
        check_range("train", self, 0, MAX_MULTIPLIER, "lr", "epochs", "head_lr")


@dataclass(frozen=True)
class Evaluate:
    """What is scored, and how."""

    batch_size: int = setting(
        "rows scored at a time; in 16 bits rounding, which padding changes, may change a score a little"
    )
    before: bool = setting("true: the base model is scored before training")
    max_examples: int | None = setting("score this many rows of each split only, for a quick test")
    holdout: int | None = setting("score this many held-out training rows instead of the task's own splits")
    holdout_skip: int | None = setting("also leave out this many training rows, on which other runs are scored")
    development_rows: int | None = setting(
        "set this many training rows apart to compare epochs on, instead of the rows whose scores are reported"
    )

    def __post_init__(self) -> None:
        check_values("eval", self)
        check_positive("eval", self, "batch_size", "max_examples", "holdout", "holdout_skip", "development_rows")
        apart = self.holdout is not None or self.holdout_skip is None
        require(apart, f"eval.holdout_skip={self.holdout_skip}: needs eval.holdout, the rows after those skipped")

    @property
    def reserved_rows(self) -> int:
        """How many training rows are left out of training: held out, skipped and development rows."""
        return (self.holdout or 0) + (self.holdout_skip or 0) + (self.development_rows or 0)


@dataclass(frozen=True)
class Wandb:
    """The mirror of the local record in Weights & Biases; never read back."""

    mode: str = setting("online, offline or disabled")
    project: str = setting("the project in W&B")
    entity: str | None = setting("the team in W&B; null: your own")
    job_type: str = setting("W&B job type; tune for runs that choose a learning rate")
    tags: list[str] = setting("tags in addition to model, task and method")

    def __post_init__(self) -> None:
        check_values("wandb", self)
        check_choice("wandb.mode", self.mode, WANDB_MODES)


@dataclass(frozen=True)
class Hardware:
    """What a run is done on."""

    name: str = setting("name of the choice")
    accelerator: str = setting("device that plans assume, e.g. h100-80gb")
    devices: int = setting("number of devices, with one process each")
    sharding: str = setting("none, replicas (every device holds all: DDP) or full (every device holds its part: FSDP2)")
    base: str | None = setting("null, or nf4: the frozen base is held in 4 bits (QLoRA)")

    def __post_init__(self) -> None:
        check_values("hardware", self)
        check_choice("hardware.sharding", self.sharding, ("none", "replicas", "full"))
        if self.base is not None:
            check_choice("hardware.base", self.base, ("nf4",))
        check_positive("hardware", self, "devices")
        require(
            (self.devices == 1) == (self.sharding == "none"),
            f"hardware.devices={self.devices} with hardware.sharding={self.sharding}: several devices need replicas or "
            "full, one device none",
        )
        split = self.base and self.sharding == "full"
        require(not split, f"hardware.base={self.base}: cannot be sharded in full; take hardware.sharding=replicas")

    def check_installed(self) -> None:
        """Refuse a 4-bit base if bitsandbytes is not installed. Plans do not need it.

        Raises:
            UserError: with what is to be installed.
        """
        is_installed = self.base is None or importlib.util.find_spec("bitsandbytes") is not None
        require(is_installed, f"hardware.base={self.base}: needs bitsandbytes; pip install -e '.[quantised]'")


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: Model = setting("the base model")
    task: Task = setting("the task and its protocol, the same for every method")
    method: Method = setting("how the model is adapted")
    train: Train = setting("how long and how fast to train")
    eval: Evaluate = setting("what is scored")
    wandb: Wandb = setting("the copy of the record in Weights & Biases")
    hardware: Hardware = setting("what the run is done on")
    seed: int = setting("seed of the adapter's initial weights, the order of examples and dropout")
    study: str = setting("folder below runs/ for the run's record")
    data_dir: str | None = setting("folder of your own tables, or of the task's official files instead of the hub")
    init_from: str | None = setting(
        "finished run or saved adapter (a folder or its name on the hub) of the same method to start from"
    )
    tensorboard: bool = setting("true: also write the log as TensorBoard files, to the run's folder tensorboard/")
    deterministic: bool = setting("true: only deterministic kernels, which may be slower")
    force: bool = setting("true: run a finished run again, and replace it once the new one is complete")
    plan: bool = setting("true: print parameters, memory, steps and time instead of running; loads no weights")

    @property
    def splits_layers(self) -> bool:
        """Whether fused layers are split: for an adapter. Full tuning trains their full weight either way."""
        return bool(self.model.split) and self.method.peft is not None

    @property
    def roles(self) -> dict[str, str]:
        """For each role of the model: regular expression for the end of a module's name, as the model is loaded."""
        return self.model.split_roles if self.splits_layers else self.model.roles

    def check_installed(self) -> None:
        """Refuse what needs an optional package that is not installed. Plans do not need it.

        Raises:
            UserError: with what is to be installed.
        """
        self.hardware.check_installed()
        compiler = os.environ.get("CXX") or "g++"
        has_compiler = not self.train.compile or shutil.which(compiler) is not None
        require(
            has_compiler,
            f"train.compile=true: needs a C++ compiler, and there is no {compiler}; install it, or drop it",
        )
        is_installed = not self.tensorboard or importlib.util.find_spec("tensorboard") is not None
        require(is_installed, "tensorboard=true: not installed; pip install -e '.[tensorboard]'")

    def count_steps(self, rows: int) -> int:
        """Return the optimizer steps of training on `rows` examples an epoch."""
        return self.train.max_steps or math.ceil(self.count_epoch_steps(rows) * self.train.epochs)

    def count_epoch_steps(self, rows: int) -> int:
        """Return the optimizer steps of an epoch of `rows` examples."""
        return math.ceil(rows / self.examples_per_step)

    @property
    def examples_per_step(self) -> int:
        """The global batch: how many examples an optimizer step sees, on all devices."""
        return self.train.batch_size * self.train.accumulation * self.hardware.devices

    def describe_batch(self) -> str:
        """Return the global batch and, where it is not one device's batch, what it consists of."""
        size, accumulation, devices = self.train.batch_size, self.train.accumulation, self.hardware.devices
        parts = [f"{size} a batch", f"{accumulation} accumulated"] + ([f"{devices} devices"] if devices > 1 else [])
        split = f" ({' x '.join(parts)})" if self.examples_per_step != size else ""
        return f"{self.examples_per_step} examples{split}"

    def __post_init__(self) -> None:
        for own in fields(self):
            if not is_dataclass(own.type):  # a group has checked its own
                check_values(own.name, getattr(self, own.name))
        idle = self.method.peft is not None and not self.model.adapt
        require(not idle, f"model.adapt=[]: nothing for {self.method.name} to adapt; name roles, such as [q,v]")
        base, frozen = self.hardware.base, self.method.peft is not None
        patience, development = self.train.early_stopping, self.eval.development_rows
        can_judge = patience is None or development is not None
        require(
            can_judge, f"train.early_stopping={patience}: needs eval.development_rows=N, training rows to judge it by"
        )
        other = "task.validation_rows" if self.task.validation_rows else "task.checkpoint=best_loss"
        watches_loss = patience and self.task.validation_size
        require(
            not watches_loss, f"train.early_stopping={patience}: not with {other}, which watches the loss; drop one"
        )
        sharded = self.hardware.sharding == "full"
        hides_zeros = sharded and self.train.log_zeros
        remedy = "not with hardware.sharding=full, where no device holds an update; drop it"
        require(not hides_zeros, f"train.log_zeros=true: {remedy}")
        cannot_save = sharded and not frozen and self.train.save_steps
        require(
            not cannot_save, "train.save_steps: no checkpoints of a model that is sharded and trained in full; drop it"
        )
        plain = not sharded and base is None  # the layers are as transformers makes them
        is_gguf = (self.model.path or "").lower().endswith(".gguf")
        require(
            plain or not is_gguf,
            f"model.path={self.model.path}: a GGUF file is read in full; take hardware=single",
        )
        where = f"hardware.base={base}" if base else "hardware.sharding=full"
        require(plain or not self.splits_layers, f"{where}: its layers cannot be split; take model.split=[]")
        require(frozen or not base, f"hardware.base={base}: method {self.method.name} trains the base; take an adapter")
        require(self.seed >= 0, f"seed={self.seed}: must not be negative")
        check_file_name("study", self.study, "it names a folder below runs/")


def format_typed_value(value: Any) -> str:
    """Return a setting's value as on a command line."""
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def find_type(key: str) -> Any:
    """Return the type that a setting is declared with, by its full name; None if there is no such setting."""
    kind: Any = Settings
    for part in key.split("."):
        kind = {own.name: own.type for own in fields(kind)}.get(part) if is_dataclass(kind) else None
    return kind


def get_setting(settings: Settings, key: str) -> object:
    """Return the value of a setting by its full name, e.g. "train.lr"; None where a method does not have it."""
    value: object = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value
