"""Methods: attaching a PEFT adapter configuration to a model, and the learning rate of each group of weights.

No method is known here by name: a PEFT method needs only its YAML in conf/method/. What does not fit the model or the
task is refused before training.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PromptLearningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from dual_lora.lab.config.compatibility import trains_nothing
from dual_lora.lab.config.outside.models import ALL_LINEAR
from dual_lora.lab.config.paths import find_choices
from dual_lora.lab.config.schema import FILLED_FIELDS, TYPES_OF_OTHER_MODULES, Settings
from dual_lora.lab.errors import (
    UserError,
    get_first_line,
    is_out_of_memory,
    require,
    suggest_name,
    translate_read_errors,
)
from dual_lora.lab.inputs.adapter_files import check_saved_adapter, read_adapter_config, read_method_fields
from dual_lora.lab.model.load import (
    autocast_products,
    build_module_pattern,
    build_target_pattern,
    cast_trained_to_float32,
    is_sharded,
    load_model,
    switch_mode,
    unwrap_adapter,
)
from dual_lora.lab.model.nf4 import count_entries
from dual_lora.lab.record.init_from import find_init_weights
from dual_lora.lab.system.distributed import print_warning
from dual_lora.tuner.warmup import list_factors
from tasks import Task

RATIO_TOLERANCE = 0.005  # up to which a ratio of ranks is the one asked for
TASK_TYPES = {
    "classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
    "generation": TaskType.CAUSAL_LM,
}
# Starts that PEFT computes from activations or gradients on training data. Without those it silently starts as plain
# LoRA.
DATA_STARTS = {"eva": "activations", "lora_ga": "gradients"}
# Fields of PEFT's with which it leaves a part of the method to its caller, and why that part is missing here.
FIELDS_FOR_THE_CALLER = {
    "alora_invocation_tokens": "acts after these tokens only, whose places PEFT cannot see when answers are scored",
    "kasa_config": "needs terms in the loss that training does not add",
    "monteclora_config": "needs terms in the loss that training does not add",
}
PROBE_TOKENS = 4  # length of the text on which `check_forward` tries a method


def draw_initial_model(
    settings: Settings, task: Task, rows: int | None = None
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Return the model as training starts with it, the method attached, and its tokenizer.

    The same run gives the same weights. rows: see `build_adapter_config`.

    Raises:
        UserError: the model cannot be loaded, or the method does not fit it.
    """
    set_seed(settings.seed)
    base, tokenizer = load_model(settings, task)
    set_seed(settings.seed)  # loading may have drawn random numbers; the adapter's must not depend on that
    return attach_method(base, settings, task.form, rows), tokenizer


def check_method(settings: Settings, form: str) -> None:
    """Refuse, before data and model are loaded, what PEFT does not take, and an adapter to start from whose
    configuration is another.

    Raises:
        UserError: with the field of PEFT's.
    """
    if settings.method.peft is None:
        return
    adapter = build_adapter_config(settings, form)
    if settings.init_from:
        check_saved_adapter(find_init_weights(settings).parent, adapter.to_dict(), settings)


def build_adapter_config(settings: Settings, form: str, rows: int | None = None) -> PeftConfig:
    """Return the PEFT configuration of an adapter method for a task of `form`.

    What the YAML leaves open or null (`FILLED_FIELDS`) is filled in where the type has such a field: the modules of the
    roles in `model.adapt`, and the heads that train along with the adapter. rows: how many examples training sees an
    epoch, which the length of a ramp may depend on; None where it does not matter.

    Raises:
        UserError: PEFT has no such type, refuses a field, or the type does not fit this harness or this task.
    """
    values: dict[str, Any] = copy.deepcopy(settings.method.peft)  # PEFT extends lists that it is given
    values = {key: value for key, value in values.items() if value is not None or key not in FILLED_FIELDS}
    peft_type = values.pop("peft_type")
    resolve_ramp(settings, values, rows)
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        hint = suggest_name(peft_type, [k.value for k in PEFT_TYPE_TO_CONFIG_MAPPING])
        raise UserError(f"method.peft.peft_type={peft_type}: PEFT has no such method.{hint}")
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    known = {field.name for field in fields(config_type)}
    check_peft_type(settings, peft_type, known, form)
    refuse_unknown_fields(settings, values.keys() - known, known)
    check_decided_fields(values, form)
    values.setdefault("task_type", TASK_TYPES[form])
    if "target_modules" in known and peft_type not in TYPES_OF_OTHER_MODULES:
        values.setdefault("target_modules", build_target_pattern(settings))
        if values["target_modules"] == ALL_LINEAR and "exclude_modules" in known:
            values.setdefault("exclude_modules", rf"(?:.*\.)?(?:{'|'.join(sorted(settings.model.heads))})(?:\..*)?")
    trains_head = form != "generation" and not trains_nothing(settings.method)
    if settings.model.head and trains_head and "modules_to_save" in known:
        # Beside modules that the YAML names: a head is drawn at random.
        values["modules_to_save"] = list(dict.fromkeys([*values.get("modules_to_save", []), *settings.model.head]))
    try:
        return config_type(**values)
    except Exception as error:  # whatever PEFT raises over fields it is given
        raise UserError(f"method.peft ({settings.method.name}): {get_first_line(error)}") from error


def refuse_unknown_fields(settings: Settings, unknown: set[str], known: set[str]) -> None:
    """Refuse fields that a PEFT type's configuration does not have. known: those that it has.

    Raises:
        UserError: with the first unknown field, the file that it is in, if it is in one, and the nearest known field.
    """
    method, file = settings.method, find_choices("method").get(settings.method.name)
    for field in sorted(unknown):
        written = file is not None and field in read_method_fields(file)
        where = f"{file}: peft.{field}" if written else f"method.peft.{field}"
        hint = suggest_name(field, sorted(known)) or " Drop it."
        raise UserError(f"{where}: {method.peft['peft_type']} has no such field.{hint}")


def check_decided_fields(values: dict[str, Any], form: str) -> None:
    """Refuse PEFT fields that would leave something untrained that the task needs trained.

    Raises:
        UserError: with the field.
    """
    own = TASK_TYPES[form].value
    given = values.get("task_type", own)
    # Without a task type PEFT trains no head: right only for an adapter on no module, the method "none".
    fits = given == own or (given is None and values.get("target_modules") == DUMMY_TARGET_MODULES)
    shown = "null" if given is None else given
    require(fits, f"method.peft.task_type={shown}: the task decides it, here {own}; drop it")
    trains = not values.get("inference_mode")
    require(trains, "method.peft.inference_mode=true: nothing of the adapter would train; drop it")


def check_peft_type(settings: Settings, peft_type: str, known: set[str], form: str) -> None:
    """Refuse PEFT types that this harness cannot train as intended. known: the fields of the type's configuration.

    Raises:
        UserError: with the reason and the remedy.
    """
    where, tuner = f"method={settings.method.name} ({peft_type})", PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    prompts = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], PromptLearningConfig)
    require(
        not prompts,
        f"{where}: puts virtual tokens before the text, which decoding and the scoring of answers do not expect; take "
        "a method that changes weights",
    )
    # AdaLoRA always, AdaMSS where its YAML says so: without these calls it would train as something else.
    scheduled = hasattr(tuner, "update_and_allocate") and settings.method.peft.get("use_asa", "use_asa" not in known)
    require(
        not scheduled,
        f"{where}: its ranks follow a schedule that needs a call after every step, which training does not make; take "
        "a method of fixed rank",
    )
    start = settings.method.peft.get("init_lora_weights")
    require(
        start not in DATA_STARTS,
        f"{where}: init_lora_weights={start} starts from {DATA_STARTS.get(start)} on training data, which are not "
        "computed here; take pissa or olora",
    )
    for field, reason in FIELDS_FOR_THE_CALLER.items():
        require(settings.method.peft.get(field) is None, f"{where}: method.peft.{field}: {reason}; drop it")
    require(
        "n_tasks" not in known,
        f"{where}: mixes adapters by the number of the task that each row belongs to, which rows here do not have; "
        "take a method with one adapter",
    )
    headless = form != "generation" and "modules_to_save" not in known
    require(
        not headless,
        f"{where}: cannot train a head along with it, and {settings.task.name} needs one; take another method, or a "
        "task that generates text",
    )


def resolve_ramp(settings: Settings, values: dict[str, Any], rows: int | None) -> None:
    """Fill in the length of an update's ramp in optimizer steps, where the method has one and its settings give none.
    If the number of rows is not known, it is the method's own default."""
    if values.get("scale_warmup_steps", 0) is not None:
        return
    del values["scale_warmup_steps"]
    if rows is not None:
        values["scale_warmup_steps"] = ceil((settings.method.ramp_share or 0) * settings.count_steps(rows))


def attach_method(model: PreTrainedModel, settings: Settings, form: str, rows: int | None = None) -> torch.nn.Module:
    """Return the model with the method attached and only the method's weights trainable. rows: see
    `build_adapter_config`.

    Raises:
        UserError: the method refuses its settings, finds nothing to adapt, or computes no output on this model.
    """
    if settings.method.peft is None:
        if settings.init_from:
            load_init_weights(model, settings)
        return model.requires_grad_(True)
    adapter = build_adapter_config(settings, form, rows)
    if model.device.type == "meta" and isinstance(getattr(adapter, "init_lora_weights", None), str):
        adapter.init_lora_weights = True  # a start made from the base weights needs their values; shapes are the same
    with translate_method_errors(settings):
        adapted = get_peft_model(model, adapter)
        cast_trained_to_float32(adapted)
        check_forward(adapted, settings, form)
    trains = any(weight.requires_grad for weight in adapted.parameters())
    require(
        trains or settings.method.peft.get("modules_to_save") == [],  # which says that nothing is to train
        f"method={settings.method.name}: nothing would train, because {settings.task.name} has no head of its own; "
        "take another method, or method=none to score the model as it is",
    )
    if settings.init_from:
        load_init_weights(adapted, settings)
    return adapted


def check_named_modules(model: torch.nn.Module, settings: Settings, form: str) -> None:
    """Refuse names and patterns of modules in the settings that match nothing in the model with its method, and biases
    to train that it does not have: they would have no effect, which neither transformers nor PEFT reports.

    Raises:
        UserError: with the name, and those that there are.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [name for name, _ in base.named_modules() if name]
    for head in settings.model.head if form != "generation" else ():
        found = any(name.endswith(head) for name in modules)
        require(found, f"model.head: {settings.model.name} has no module {head!r}; {suggest_modules(head, modules)}")
    adapted = getattr(getattr(model, "base_model", None), "targeted_module_names", [])
    if adapted:
        check_adapted_roles(model, settings)
    if isinstance(model, PeftModel):
        check_trained_biases(model, settings)
    for key, value in (settings.method.peft or {}).items() if adapted else ():
        known = modules if key in ("exclude_modules", "modules_to_save") else adapted
        known = model.base_model.targeted_parameter_names if key == "target_parameters" else known
        for pattern in list_patterns(key, value):
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in known)
            require(found, f"method.peft.{key}: {pattern!r} matches no module; {suggest_modules(pattern, known)}")


def check_adapted_roles(model: PeftModel, settings: Settings) -> None:
    """Refuse an adapted role whose modules the model does not have: the method would adapt fewer layers than it says.
    Methods that choose their own modules know no roles.

    Raises:
        UserError: with the role, its pattern, and the modules that there are.
    """
    if getattr(model.active_peft_config, "target_modules", None) != build_target_pattern(settings):
        return
    layers = (torch.nn.Linear, torch.nn.Embedding, Conv1D, BaseTunerLayer)
    named = [name for name, module in model.get_base_model().named_modules() if isinstance(module, layers)]
    inner = tuple(f"{name}." for name in model.base_model.targeted_module_names)
    named = [name for name in named if not name.startswith(inner)]
    for role in settings.model.adapt:
        pattern = settings.roles[role]
        found = any(re.fullmatch(build_module_pattern([pattern]), name) for name in named)
        require(found, f"model.roles.{role}: {pattern!r} matches no module; {suggest_modules(pattern, named)}")


def check_trained_biases(model: PeftModel, settings: Settings) -> None:
    """Refuse to train biases along with an adapter where the model, or the layers that are adapted, have none.

    Raises:
        UserError: with the setting.
    """
    peft_type, asked = settings.method.peft["peft_type"], settings.method.peft.get("bias") or "none"
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and name.endswith(".bias")]
    found = any(is_base_weight(name, peft_type) and "modules_to_save" not in name.split(".") for name in trained)
    require(found or asked == "none", f"method.peft.bias={asked}: {settings.model.name} has no such bias; drop it")


def list_patterns(key: str, value: Any) -> list[str]:
    """Return the names and regular expressions of modules, or weights, that a field of PEFT's holds; [] for other
    fields."""
    if key.endswith("_pattern") and isinstance(value, dict):
        return list(value)
    if key == "layers_to_transform" and value is not None:
        return [rf"{layer}\..*" for layer in (value if isinstance(value, list) else [value])]
    if key == "exclude_modules" and isinstance(value, str):
        return [value]
    named = key.endswith("_modules") or key in ("modules_to_save", "target_parameters")
    return value if isinstance(value, list) and named else []


def suggest_modules(name: str, modules: list[str]) -> str:
    """Return the remedy for a name that matches none of the modules."""
    parts = sorted({module.rpartition(".")[2] for module in modules})
    shown = [part for part in parts if part in modules] or parts  # the outer ones of a model, all of those adapted
    return f"drop it, or name another, such as {', '.join(shown)}.{suggest_name(name, parts)}"


@contextmanager
def translate_method_errors(settings: Settings) -> Iterator[None]:
    """Turn whatever PEFT raises over a model or a configuration into one line.

    Raises:
        UserError: with the method, the model and what PEFT said.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        where = f"method={settings.method.name} on model={settings.model.name}"
        reads = "DTensor" in str(error)
        message = (
            "it starts from the base weights, which are sharded; take hardware=ddp" if reads else get_first_line(error)
        )
        raise UserError(f"{where}: {message}") from error


@torch.no_grad()
def check_forward(model: PeftModel, settings: Settings, form: str) -> None:
    """Run one short text, with products as training takes them and as evaluation does, so that a method that needs
    unusual inputs fails here and not later. Skipped for models that are sharded, on the meta device, or in float16,
    which CPUs support only in part.
    """
    if is_sharded(model) or model.device.type == "meta" or model.dtype == torch.float16:
        return
    ids = torch.arange(2, 2 + PROBE_TOKENS, device=model.device)[None]
    devices = [model.device] if model.device.type == "cuda" else []
    dtype, ways = getattr(torch, settings.model.dtype), [autocast_products(model, settings, form)]
    if dtype.itemsize < 4:  # in float32 both are the same
        ways.append(torch.autocast(model.device.type, dtype))
    for products in ways:
        with torch.random.fork_rng(devices), products, switch_mode(model, training=True):  # dropout draws numbers
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


def load_init_weights(model: torch.nn.Module, settings: Settings) -> None:
    """Give the model the weights of the run or the adapter that `init_from` names. Heads stay fresh.

    Raises:
        UserError: the weights do not fit, or are an adapter's that computes something else with them.
    """
    file = find_init_weights(settings)
    with translate_read_errors(f"init_from={settings.init_from}: cannot read {file.name}", "take another run"):
        weights = load_file(file)
    heads = settings.model.heads
    own = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    shared = {name for name in getattr(model, "_tied_weights_keys", None) or () if name not in weights}
    own = {name: t for name, t in own.items() if name not in shared}  # a file holds tied weights once
    chosen = {name: t if heads & set(name.split(".")) else weights.pop(name, None) for name, t in own.items()}
    left = [name for name in weights if not heads & set(name.split("."))]
    other = left + [name for name, t in chosen.items() if t is None or t.shape != own[name].shape]
    require(
        not other,
        f"init_from={settings.init_from}: does not fit at {other[:1]}; take the modules and ranks it was trained with",
    )
    if not isinstance(model, PeftModel):
        model.load_state_dict(chosen, strict=not shared)
        return
    check_init_adapter(model, file.parent, settings)
    set_peft_model_state_dict(model, chosen)
    for factors in list_factors(model):  # trained factors are at full scale, whatever the length of this run's ramp
        factors.set_update_scale(1.0, ramp=False)


def check_init_adapter(model: PeftModel, folder: Path, settings: Settings) -> None:
    """Refuse a saved adapter whose configuration gives its weights another meaning than this run's, now that PEFT has
    filled that in; print a warning if it was trained on a model of another name.

    Raises:
        UserError: with the first field that differs.
    """
    check_saved_adapter(folder, model.active_peft_config.to_dict(), settings, complete=True)
    saved, where = read_adapter_config(folder), f"init_from={settings.init_from}"
    base, known = Path(saved.get("base_model_name_or_path") or "").name, model.get_base_model().name_or_path
    if base and base != Path(known).name:
        print_warning(f"{where}: trained on a model named {base}, this run's is {Path(known).name}")


@torch.no_grad()
def start_ramp(model: torch.nn.Module) -> None:
    """Take the first step of every ramp that has not begun, so that the first optimizer step already trains the
    factors: at f = 0 they have no gradient."""
    for factors in list_factors(model):
        if int(factors.step) == 0:
            factors.advance_ramp()


def describe_incomplete_ramp(model: torch.nn.Module) -> list[str]:
    """Return a warning where training ended before an update was at its full scale; none otherwise."""
    reached = min((float(factors.update_scale) for factors in list_factors(model)), default=1.0)
    if reached >= 1:
        return []
    return [f"the update only reached {reached:.2g} of its full scale; train longer or lower method.ramp_share"]


def describe_rounded_ratio(model: torch.nn.Module, settings: Settings) -> list[str]:
    """Return a warning where Dual LoRA's ranks have another ratio than was asked for, so that runs of several ratios
    are the same; none otherwise."""
    asked = settings.method.magnitude_ratio
    if asked is None or not list_factors(model):
        return []
    rank = model.active_peft_config.r
    r1, r2 = model.active_peft_config.split(rank)
    warning = f"method.magnitude_ratio={asked:g}: the ranks are {r1} and {r2}, a ratio of {r1 / rank:.3g}"
    return [warning] if abs(r1 / rank - asked) > RATIO_TOLERANCE else []


def describe_untouched_experts(model: torch.nn.Module, settings: Settings) -> list[str]:
    """Return a warning where "all linear layers" leaves out most of a mixture of experts: transformers holds the
    experts of a layer as one weight of three dimensions, which belongs to no linear layer."""
    if not isinstance(model, PeftModel) or build_target_pattern(settings) != ALL_LINEAR:
        return []
    modules = unwrap_adapter(model).named_modules()
    stacks = {name: count_stacked_weights(module) for name, module in modules if "base_layer" not in name.split(".")}
    names = [name for name, entries in stacks.items() if entries]
    if not names:
        return []
    share = sum(stacks.values()) / count_parameters(model)["parameters"]
    return [
        f"{share:.0%} of the weights are stacks of matrices, as in {names[0]}; these are not linear layers, so the "
        "method does not adapt them"
    ]


def count_stacked_weights(module: torch.nn.Module) -> int:
    """Return how many entries a module's own frozen stacks of matrices have. Weights of convolutions are none."""
    if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
        return 0
    held = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
    return sum(p.numel() for p in held if p.ndim == 3 and p.shape[0] > 1)


def find_group_and_rate(name: str, settings: Settings) -> tuple[str, float]:
    """Return the group a trained weight belongs to, and that group's learning rate: heads train at `train.head_lr`, the
    B matrices of LoRA+ at `method.lr_ratio` times the rate of the rest (arXiv 2402.12354), everything else at
    `train.lr`: the adapter, and weights of the base model."""
    rate, parts, method = settings.train.lr, set(name.split(".")), settings.method
    if settings.model.heads & parts:
        return "head", settings.train.head_lr or rate
    if method.lr_ratio is not None and "lora_B" in parts:
        return "B", rate * method.lr_ratio
    return ("weights" if method.peft is None or is_base_weight(name, method.peft["peft_type"]) else "adapter"), rate


def is_base_weight(name: str, peft_type: str) -> bool:
    """Return whether a weight that a PEFT type trains is one of the base model, in a copied module or a bias, and not
    the adapter's."""
    parts, prefix = name.split("."), PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]
    return "modules_to_save" in parts or (parts[-1] == "bias" and not any(part.startswith(prefix) for part in parts))


def split_by_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module, settings: Settings) -> None:
    """Split the groups of a fresh optimizer by learning rate, where there is more than one."""
    if settings.train.head_lr is None and settings.method.lr_ratio is None:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name, rate = find_group_and_rate(names[parameter], settings)
            found.setdefault((number, name), {**group, "params": [], "lr": rate})["params"].append(parameter)
    optimizer.param_groups[:] = sorted(found.values(), key=lambda group: group["lr"] != settings.train.lr)


def list_rates(model: torch.nn.Module, settings: Settings) -> dict[str, float]:
    """Return the learning rate of every group of trained weights, by its name."""
    return dict(find_group_and_rate(name, settings) for name, p in model.named_parameters() if p.requires_grad)


def list_kernels(model: torch.nn.Module) -> list[str]:
    """Return the kernels that compute the Dual LoRA adapters; empty for other methods."""
    return sorted({factors.kernel_used for factors in list_factors(model)})


def describe_adapter(model: torch.nn.Module) -> str:
    """Return the classes of the adapted modules as they are in the model, each with how many there are."""
    found = Counter(
        f"{type(m).__module__.removeprefix('peft.tuners.')}.{type(m).__name__}"
        for m in model.modules()
        if isinstance(m, BaseTunerLayer)
    )
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "no adapter"


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Return how many weights there are, how many train, and how many of those are the adapter's (without heads)."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    heads = sum(n for name, n in trained.items() if "modules_to_save" in name)
    return {
        # PEFT keeps the original next to a head that trains
        "parameters": sum(count_entries(p) for name, p in model.named_parameters() if ".original_module." not in name),
        "trainable_parameters": sum(trained.values()),
        "adapter_parameters": sum(trained.values()) - heads if hasattr(model, "peft_config") else 0,
    }
