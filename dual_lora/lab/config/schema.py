"""The types of every setting; their values live in conf/ alone.

`Settings` is the schema Hydra composes against, so an unknown key or a wrong type is refused while the command line is
read. Checks that need more than a type are in `__post_init__`; they raise `UserError` with the culprit and the mend.
Importing this module loads neither torch nor transformers.
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from dual_lora.lab.errors import UserError, require, suggest_name

# Of whole numbers, as of seeds; and of what multiplies weights, whose float32 would overflow.
MAX_INTEGER, MAX_MULTIPLIER = 2**32, 1e6


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    hint = suggest_name(value, choices)
    require(value in choices, f"{key}={value}: not one of {', '.join(choices)}.{hint}")


def check_positive(group: str, values: object, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        require(value is None or value > 0, f"{group}.{name}={value}: must be positive")


def check_range(group: str, values: object, least: float, below: float, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        told = f"must be in [{least}, {below})" if below < math.inf else "must not be negative"
        require(value is None or least <= value < below, f"{group}.{name}={value}: {told}")


def check_file_name(key: str, value: str, what: str) -> None:
    """Refuse what names no file or folder, or one that lies elsewhere."""
    clean = value and all(c.isascii() and c.isalnum() or c in "-_." for c in value) and not value.startswith(".")
    short = len(value.encode(errors="replace")) <= 60
    require(bool(clean) and short, f"{key}={value[:80]}: only letters, digits, '-', '_' and '.', at most 60; {what}")


def iterate_leaves(values: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full name and value of every setting that holds no others."""
    for field in fields(values):
        value = getattr(values, field.name)
        if is_dataclass(value):
            yield from iterate_leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def check_values(values: object) -> None:
    """Refuse texts that are empty or hold what no terminal shows, and numbers that are none."""
    for key, value in iterate_leaves(values):
        if isinstance(value, str):
            require(value != "", f"{key}=: empty; give a value, or null for none")
            require(value.isprintable() and len(value) < 4000, f"{key}={value[:80]!r}: not a line of text")
        if isinstance(value, float):
            require(math.isfinite(value), f"{key}={value}: must be a finite number")
        if isinstance(value, int):
            require(abs(value) < MAX_INTEGER, f"{key}={str(value)[:30]}: must be below 2**32")


@dataclass(frozen=True)
class Model:
    """A base model and the names of its parts.

    `roles` maps q, k, v, o, gate, up, down to a regular expression that ends a module's name; `adapt` lists the roles
    a method changes; `head` names modules trained in full beside it because the base model does not bring them.
    `generates` tells whether the model writes text (a causal language model), `chat` whether prompts are put into its
    tokenizer's chat template instead of being given as they are. `architecture` is its configuration as far as it
    differs from transformers' defaults, for plans made without a download.
    """

    name: str
    hub: str | None
    revision: str | None
    path: str | None
    bundled: bool
    dtype: str
    generates: bool
    chat: bool
    roles: dict[str, str]
    adapt: list[str]
    head: list[str]
    architecture: dict[str, Any]

    @property
    def heads(self) -> set[str]:
        """The names of modules that are a task's own head."""
        return {"classifier", "score", *self.head}

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_file_name("model.name", self.name, "it names the run's folder")
        for role, pattern in self.roles.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"model.roles.{role}={pattern}: no regular expression ({error})") from error
        for role in self.adapt:
            require(
                role in self.roles,
                f"model.adapt: {self.name} has no role {role!r}; its roles are {', '.join(self.roles)}",
            )


@dataclass(frozen=True)
class Task:
    """The protocol of a task, the same for every method; `options` are the task's own (see its module in tasks/).

    `stop` are texts that end an output where they are one token of the model's vocabulary. `train_rows` is the official
    number of training examples, for plans made without the data.
    """

    name: str
    epochs: float
    batch_size: int
    max_length: int
    warmup_ratio: float
    checkpoint: str
    loss_on_prompt: bool
    label_smoothing: float
    max_new_tokens: int
    num_beams: int
    length_penalty: float
    no_repeat_ngram: int
    stop: list[str]
    options: dict[str, Any]
    train_rows: int | None

    def __post_init__(self) -> None:
        for part in self.name.split("/"):
            check_file_name("task.name", part, "it names the run's folder")
        check_choice("task.checkpoint", self.checkpoint, ("last", "best"))
        check_positive("task", self, "epochs", "batch_size", "max_length", "num_beams", "train_rows")
        check_range("task", self, 0, math.inf, "max_new_tokens", "no_repeat_ngram")
        check_range("task", self, 0, 1, "warmup_ratio", "label_smoothing")
        check_range("task", self, 0, MAX_MULTIPLIER, "epochs")
        check_range("task", self, -100, 100, "length_penalty")


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    `rank` is the parameter budget in LoRA's unit: Dual LoRA at rank r trains as many weights as LoRA of rank r. `peft`
    is the adapter configuration as PEFT stores it (`peft_type` and the fields of that type's config class); null
    trains every weight of the model. `lr_ratio` is LoRA+'s rate of the B matrices over that of A (arXiv 2402.12354).
    `ramp_share` is the share of all optimizer steps over which an update's ramp goes from 0 to 1; an explicit
    `peft.scale_warmup_steps` goes before it.
    """

    name: str
    lr: float
    rank: int | None
    alpha: float | None
    dropout: float | None
    magnitude_ratio: float | None
    r1: int | None
    r2: int | None
    lr_ratio: float | None
    ramp_share: float | None
    peft: dict[str, Any] | None

    def __post_init__(self) -> None:
        check_file_name("method.name", self.name, "it names the run's folder")
        check_positive("method", self, "lr", "alpha", "magnitude_ratio", "r1", "r2", "lr_ratio")
        check_range("method", self, 0, 1, "dropout", "magnitude_ratio", "ramp_share")
        check_range("method", self, 0, MAX_MULTIPLIER, "lr", "lr_ratio")
        for key in ("rank", "alpha", "dropout", "magnitude_ratio", "r1", "r2"):
            value = getattr(self, key)
            used = self.peft is not None and value is not None
            require(value is None or used, f"method.{key}: method {self.name} has no adapter, so no {key}")
        if self.peft is not None:
            require("peft_type" in self.peft, f"method.peft: {self.name} names no peft_type")
            for key in ("magnitude_ratio", "r1", "r2"):
                require(
                    getattr(self, key) is None or key in self.peft, f"method.{key}: method {self.name} has no {key}"
                )
        require(self.rank is None or self.rank >= 1, f"method.rank={self.rank}: must be at least 1")
        require((self.r1 is None) == (self.r2 is None), "method.r1 and method.r2: give both or neither")


@dataclass(frozen=True)
class Train:
    """How long and how fast to train.

    A checkpoint is kept every `save_steps` steps, and at the end of a step `save_minutes` after the newest; null: none
    for that. `group_by_length` true puts examples of like length into a batch, which saves padding but cost quality
    where it was measured (runs/LOG.md); null draws at random.
    `loss_scale` multiplies the loss before backward and divides every gradient after it, as fp16 training does: it
    changes nothing but what bends gradients on the way, as the clip of Dual LoRA's Sign.
    `head_lr` is the learning rate of a task's head, under every method the same; null: that of everything else.
    `adam_epsilon` is the term in the denominator of AdamW's step; null: 1e-8.
    """

    lr: float
    epochs: float
    max_steps: int | None
    batch_size: int
    accumulation: int
    weight_decay: float
    schedule: str
    max_grad_norm: float
    save_steps: int | None
    save_minutes: float | None
    log_steps: int
    max_examples: int | None
    group_by_length: bool | None
    loss_scale: float | None
    head_lr: float | None
    adam_epsilon: float | None

    def __post_init__(self) -> None:
        check_choice("train.schedule", self.schedule, ("linear", "cosine", "constant", "constant_with_warmup"))
        check_positive("train", self, "lr", "epochs", "max_steps", "batch_size", "accumulation")
        check_positive("train", self, "save_steps", "save_minutes", "log_steps", "max_examples", "loss_scale")
        check_positive("train", self, "head_lr", "adam_epsilon")
        check_range("train", self, 0, math.inf, "weight_decay", "max_grad_norm")
        check_range("train", self, 0, MAX_MULTIPLIER, "lr", "epochs", "head_lr")


@dataclass(frozen=True)
class Evaluate:
    """Rows at a time, whether the base is scored before training, rows of each split at most (null: all).

    `holdout` sets so many training rows apart, the same for every run, and evaluates on them instead of on the task's
    own splits: to choose settings by, without looking at what is reported.
    """

    batch_size: int
    before: bool
    max_examples: int | None
    holdout: int | None

    def __post_init__(self) -> None:
        check_positive("eval", self, "batch_size", "max_examples", "holdout")


@dataclass(frozen=True)
class Wandb:
    """The mirror of the local record; never read back. job_type: what its runs are for; tags: more than their names."""

    mode: str
    project: str
    entity: str | None
    job_type: str
    tags: list[str]

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass(frozen=True)
class Hardware:
    """What a run is done on. `accelerator`: what plans take it for. `devices`: how many, each with its own process.
    `sharding`: none, replicas (every device holds all: DDP) or full (every device its part: FSDP2). `base`: null, or
    nf4, the form the frozen base is held in."""

    name: str
    accelerator: str
    devices: int
    sharding: str
    base: str | None

    def __post_init__(self) -> None:
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
        """Refuse a base that this environment cannot hold; plans need not hold it."""
        here = self.base is None or importlib.util.find_spec("bitsandbytes") is not None
        require(here, f"hardware.base={self.base}: needs bitsandbytes; pip install -e '.[quantised]'")


@dataclass(frozen=True)
class Settings:
    """One run. `study` names the folder below runs/; `force` runs again what is finished; `init_from` is the folder of
    a finished run of the same method, whose adapter (but not its head) training starts from; `plan` says what the run
    would take instead of doing it."""

    model: Model
    task: Task
    method: Method
    train: Train
    eval: Evaluate
    wandb: Wandb
    hardware: Hardware
    seed: int
    study: str
    data_dir: str | None
    init_from: str | None
    deterministic: bool
    force: bool
    plan: bool

    def count_steps(self, rows: int) -> int:
        """Return the optimizer steps of training on so many examples an epoch."""
        train = self.train
        an_epoch = math.ceil(rows / (train.batch_size * train.accumulation * self.hardware.devices))
        return train.max_steps or math.ceil(an_epoch * train.epochs)

    def __post_init__(self) -> None:
        check_values(self)
        idle = self.method.peft is not None and not self.model.adapt
        require(not idle, f"model.adapt=[]: nothing for {self.method.name} to adapt; name roles, such as [q,v]")
        base, frozen = self.hardware.base, self.method.peft is not None
        kept = self.hardware.sharding != "full" or frozen or not self.train.save_steps
        require(kept, "train.save_steps: no checkpoints of a model that is sharded and trained in full; drop it")
        whole = self.hardware.sharding != "full" and base is None
        packed = (self.model.path or "").lower().endswith(".gguf")
        require(whole or not packed, f"model.path={self.model.path}: a GGUF file is read whole; take hardware=single")
        require(frozen or not base, f"hardware.base={base}: method {self.method.name} trains the base; take an adapter")
        require(self.seed >= 0, f"seed={self.seed}: must not be negative")
        check_file_name("study", self.study, "it names a folder below runs/")
