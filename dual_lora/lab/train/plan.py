"""What a run would need, from the model's architecture alone: nothing is downloaded, no weight is loaded.

The run's own model, with the run's own method on it, is built on torch's meta device, where tensors have shapes but no
values. One step of a full batch at the task's longest length is taken there: torch's FlopCounterMode counts its
operations, and hooks on autograd measure what it keeps for backward, so the plan describes what this code really does.
Activations are those of full-length batches; hours assume such batches only, at an assumed fraction of peak speed. A
4-bit base counts the same parameters, operations and activations as an unquantized one: bitsandbytes dequantizes one
layer's weight at a time, which the reserve covers.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from dual_lora import paper
from dual_lora.lab.config.recorded import replace_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.adapt import check_named_modules, count_parameters
from dual_lora.lab.model.load import check_head_dropout, explain_unshardable, unwrap_adapter
from dual_lora.lab.model.nf4 import count_nf4_bytes, list_quantizable_layers
from dual_lora.lab.model.source import find_gguf_file
from dual_lora.lab.present.units import GB, MB
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.train.meta_step import attach_to_meta_model, build_meta_model, trace_step
from tasks import Task

UTILIZATION = 0.4  # fraction of the accelerator's peak that training reaches at best; assumed, not measured
COPY_BYTES = 2  # bytes of a number in 16 bits
RESERVE_SHARE = 0.1  # of the sum of all parts, for temporary tensors and fragmentation; assumed
ADAM_MOMENTS = 2  # AdamW's two moments, as large as the weight


@dataclass(frozen=True)
class Accelerator:
    """Memory in GB, peak in 1e12 operations a second without sparsity, as the vendor states them."""

    memory: float
    bfloat16: float
    float32: float


# NVIDIA's data sheets; float32 without TF32.
ACCELERATORS = {
    "a100-40gb": Accelerator(40, 312, 19.5),
    "a100-80gb": Accelerator(80, 312, 19.5),
    "h100-80gb": Accelerator(80, 989, 67),
    "h200-141gb": Accelerator(141, 989, 67),
    "l4-24gb": Accelerator(24, 121, 30.3),
    "rtx4090-24gb": Accelerator(24, 165, 82.6),
}


def make_plan(run: Run) -> dict[str, Any]:
    """Print the plan of a run, write it to plan.json in the run's folder, and return it.

    Raises:
        UserError: the accelerator or the model's architecture is not known.
    """
    settings, record = run.settings, run.record
    known = settings.hardware.accelerator in ACCELERATORS
    require(known, f"hardware.accelerator={settings.hardware.accelerator}: must be one of {', '.join(ACCELERATORS)}")
    silence_libraries()
    found = compute_plan(replace(settings, init_from=None))
    record.folder.mkdir(parents=True, exist_ok=True)
    record.write_file("plan.json", found)
    print(format_plan(found, record))
    return found


def compute_plan(settings: Settings) -> dict[str, Any]:
    """Return the plan: `modules`, `parameters`, `trainable_parameters`, `trainable_percent` (of all, the adapter's
    included), `memory` in bytes a device by part, `flops` of a step by part, `steps` and `hours`, both 0 where nothing
    trains, and `fewer_rows`: why these two may be less, or "".

    Raises:
        UserError: what a run would refuse of model, method and task, as far as no weight and no data is needed for it.
    """
    task = load_task(settings)
    model = attach_to_meta_model(settings, task)
    check_named_modules(model, settings, task.form)
    if task.form != "generation":
        check_head_dropout(unwrap_adapter(model), settings)
    unshardable_reason = explain_unshardable(settings, task, type(unwrap_adapter(model)))
    train, hardware = settings.train, settings.hardware
    device = ACCELERATORS[hardware.accelerator]
    step = trace_step(settings, task, count_layers(model), hardware.sharding == "full")
    memory, counts = plan_memory(settings, task, model, step["kept"]), count_parameters(model)
    rows, source, fewer = count_training_rows(settings, task)
    steps = settings.count_steps(rows) if counts["trainable_parameters"] else 0
    flops = {part: step[part] * train.accumulation for part in ("forward", "backward")}
    speed = device.float32 if settings.model.dtype == "float32" else device.bfloat16
    return {
        "model": settings.model.name,
        "task": settings.task.name,
        "method": settings.method.name,
        "modules": count_adapted_modules(model),
        **counts,
        "trainable_percent": 100 * counts["trainable_parameters"] / counts["parameters"],
        "published": find_published_parameters(settings),
        "memory": memory,
        "batch": settings.describe_batch(),
        "tokens_per_device_and_step": step["tokens"] * train.accumulation,
        "flops": {**flops, "step": sum(flops.values())},
        "train_rows": rows,
        "train_rows_from": source,
        "fewer_rows": "" if train.max_steps else fewer,
        "steps": steps,
        "hours": steps * sum(flops.values()) / (speed * 1e12 * UTILIZATION) / 3600,
        "cannot_shard": unshardable_reason,
        "hardware": {**asdict(hardware), "memory": device.memory * GB, "assumed_utilization": UTILIZATION},
    }


def plan_memory(settings: Settings, task: Task, model: torch.nn.Module, kept: int) -> dict[str, Any]:
    """Return `estimate_memory` of a run; its `size` also holds the bytes kept for backward by the options that
    `list_options` may propose. kept: those of the run itself."""
    sizes, hardware, layers = measure_sizes(model, settings, task), settings.hardware, count_layers(model)
    sharded = hardware.sharding == "full"
    differs_sharded = sizes["copies"] and not sharded
    sizes["kept_sharded"] = trace_step(settings, task, layers, sharded=True)["kept"] if differs_sharded else kept
    memory = estimate_memory(sizes, kept, hardware.devices, hardware.sharding, hardware.base)
    too_large = memory["peak"] > ACCELERATORS[hardware.accelerator].memory * GB
    if too_large and unwrap_adapter(model).supports_gradient_checkpointing:
        checkpointed = replace_settings(settings, {"train.gradient_checkpointing": True})
        sizes["kept_checkpointed"] = trace_step(checkpointed, task, layers, sharded)["kept"]
    return memory


def count_layers(model: torch.nn.Module) -> int:
    """Return the number of a model's transformer layers."""
    return unwrap_adapter(model).config.num_hidden_layers


def find_published_parameters(settings: Settings) -> list[dict[str, str]]:
    """Return the parameter counts that papers print for this model, method and rank, each with its table."""
    keys = {"model": settings.model.name, "method": settings.method.name, "rank": settings.method.rank}
    found = []
    for row in paper.find_rows(**keys):
        text = f"{row.values['params'].text} %" if "params" in row.values else row.keys.get("params")
        if text and {"params": text, "table": row.table} not in found:
            found.append({"params": text, "table": row.table})
    return found


def count_adapted_modules(model: torch.nn.Module) -> dict[str, int]:
    """Return how many modules the method changes, by the last part of their names."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            key = name.rpartition(".")[2]
            found[key] = found.get(key, 0) + 1
    return found


def count_training_rows(settings: Settings, task: Task) -> tuple[int, str, str]:
    """Return how many examples training sees an epoch, what says so, and why there may be fewer; "" if there are not.

    Raises:
        UserError: more rows are set apart than there are.
    """
    limit, default = settings.train.max_examples, settings.task.train_rows
    if default is None or settings.data_dir is not None:
        return len(load_split(task, "train", settings).rows), "the data", ""
    known, fewer = task.count_official_rows(default)
    apart = settings.eval.reserved_rows + settings.task.validation_size
    require(apart < known, f"plan: {apart:,} rows are to be set apart, {task.name} has {known:,}; set fewer apart")
    rest = known - apart
    return min(rest, limit or rest), "the task's configuration", "" if limit and limit < rest else fewer


def measure_sizes(model: torch.nn.Module, settings: Settings, task: Task) -> dict[str, int]:
    """Return sizes in bytes: frozen weights ("frozen"), the same with 4-bit layers ("frozen_nf4"), weights that train
    ("trained"), the 16-bit copies that autocast makes of float32 weights ("copies"), and what FSDP2 gathers at once
    ("gathered"): two layers, or everything outside the layers (embeddings, head), whichever is more."""
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    small = [layer.weight for layer in list_quantizable_layers(model, settings.model)]
    kind = getattr(torch, settings.model.dtype)
    one, two = (sum(p.numel() for p in build_meta_model(settings, task, count).parameters()) for count in (1, 2))
    copied = [
        m for m in model.modules() if type(m) in (torch.nn.Linear, Conv1D) and m.weight.dtype.itemsize > COPY_BYTES
    ]
    copies = COPY_BYTES * sum(p.numel() for module in copied for p in module.parameters())
    return {
        "frozen": frozen,
        "frozen_nf4": frozen - sum(w.nbytes - count_nf4_bytes(w.numel()) for w in small),
        "trained": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "copies": copies if settings.method.peft is None and kind.itemsize == COPY_BYTES else 0,
        "gathered": kind.itemsize * max(2 * (two - one), 2 * one - two),
    }


def estimate_memory(
    sizes: dict[str, int], kept: float, devices: int, sharding: str, base: str | None = None
) -> dict[str, float]:
    """Return bytes per device: weights, gradients, AdamW's moments, activations kept for backward, 16-bit copies,
    temporaries of AdamW's step beyond the freed activations (as large as what trains), a reserve, and the peak.

    DDP doubles the gradients: its buckets are copies of their total size unless `gradient_as_bucket_view` is set, as
    torch's documentation of DistributedDataParallel says, and it is not set here.

    kept: bytes kept for backward. Under FSDP2 (sharding "full") a device holds its share of the base model plus what it
    gathers at once (copies included), and the complete adapter.
    """
    full = sharding == "full"
    frozen, trained = sizes[f"frozen_{base}" if base else "frozen"], sizes["trained"]
    if full:
        frozen, trained = frozen / devices, trained if frozen else trained / devices
    copies = 0 if full else sizes["copies"]
    parts = {
        "weights": frozen + trained,
        "gradients": trained * (2 if sharding == "replicas" else 1),
        "optimizer": ADAM_MOMENTS * trained,
        "activations": kept,
        "copies": copies,
        "temporaries": max(0, trained - kept - copies),
        "gathered": sizes["gathered"] if full else 0,
    }
    reserve = RESERVE_SHARE * sum(parts.values())
    return {"size": sizes, **parts, "reserve": reserve, "peak": sum(parts.values()) + reserve}


class Option(NamedTuple):
    """Settings that a plan may propose: rows of a batch, devices, sharding, 4-bit base, gradient checkpointing."""

    batch: int
    devices: int
    sharding: str
    base: str | None
    checkpointed: bool


def check_fit(settings: Settings, found: dict[str, Any]) -> None:
    """Refuse a plan that needs more than the device has, saying what would fit.

    Raises:
        UserError: with those settings.
    """
    hardware, peak, room = settings.hardware, found["memory"]["peak"], found["hardware"]["memory"]
    reason = found["cannot_shard"]
    able = hardware.sharding != "full" or reason is None
    require(able, f"plan: hardware.sharding=full: {reason}; take hardware=ddp")
    if peak <= room:
        return
    chosen = [
        next((option for option in group if fits_memory(option, settings, found)), None)
        for group in list_options(settings, found)
    ]
    remedies = [format_option(option, settings) for option in chosen if option]
    raise UserError(
        f"plan: {settings.model.name} with {settings.method.name} needs {peak / GB:.1f} GB a device, "
        f"{hardware.accelerator} has {room / GB:.0f}; would fit: {', or '.join(remedies) or 'a larger accelerator'}"
    )


def list_options(settings: Settings, found: dict[str, Any]) -> tuple[list[Option], ...]:
    """Return groups of options, of each of which the first that fits is proposed: smaller batches, gradient
    checkpointing, a 4-bit base, and sharding over more devices."""
    train, hardware, sizes = settings.train, settings.hardware, found["memory"]["size"]
    can_shard = found["cannot_shard"] is None
    here = (hardware.devices, hardware.sharding)
    batches = [b for b in range(train.batch_size, 0, -1) if train.batch_size % b == 0]
    more = [2**i for i in range(1, 11) if 2**i > hardware.devices] if can_shard else []
    if hardware.sharding == "replicas" and can_shard:
        more = [hardware.devices, *more]
    free = hardware.base is None and find_gguf_file(settings) is None  # a GGUF file's weights are read whole
    # A smaller base in 4 bits means that the method has a frozen one.
    quantizes = free and hardware.sharding != "full" and sizes["frozen_nf4"] < sizes["frozen"]
    can_checkpoint = "kept_checkpointed" in sizes and not train.gradient_checkpointing
    sharded = [Option(train.batch_size, devices, "full", None, False) for devices in more if free]
    sharded += [Option(b, devices, "full", None, False) for devices in more for b in batches if free]
    return (
        [Option(b, *here, hardware.base, False) for b in batches],
        [Option(b, *here, hardware.base, True) for b in batches if can_checkpoint],
        [Option(b, *here, "nf4", False) for b in batches if quantizes],
        sharded,
    )


def fits_memory(option: Option, settings: Settings, found: dict[str, Any]) -> bool:
    """Return whether a run with an option's settings needs no more memory than the device has."""
    parts = found["memory"]
    kept = parts["size"]["kept_sharded"] if option.sharding == "full" else parts["activations"]
    kept = parts["size"]["kept_checkpointed"] if option.checkpointed else kept
    kept *= option.batch / settings.train.batch_size
    memory = estimate_memory(parts["size"], kept, option.devices, option.sharding, option.base)
    return memory["peak"] <= found["hardware"]["memory"]


def format_option(option: Option, settings: Settings) -> str:
    """Return the settings of an option that differ from the run's, as a command line has them."""
    train, hardware = settings.train, settings.hardware
    words = []
    if option.batch != train.batch_size:
        accumulation = train.accumulation * train.batch_size // option.batch
        words += [f"train.batch_size={option.batch} train.accumulation={accumulation}"]
    if option.checkpointed:
        words += ["train.gradient_checkpointing=true"]
    if option.base != hardware.base:
        words += [f"hardware.base={option.base}"]
    if (option.devices, option.sharding) != (hardware.devices, hardware.sharding):
        words += [f"hardware.sharding={option.sharding} hardware.devices={option.devices}"]
    if option.devices > hardware.devices:
        words += [f"(for {option.devices / hardware.devices:g} times as many examples a step)"]
    return " ".join(words)


def format_plan(found: dict[str, Any], record: Record) -> str:
    """Return the plan as a few lines."""
    parts, hardware = found["memory"], found["hardware"]
    modules = ", ".join(f"{count} {name}" for name, count in found["modules"].items())
    others = "all weights" if found["trainable_parameters"] == found["parameters"] else "no module"
    unit, unit_name = (GB, "GB") if parts["peak"] >= GB else (MB, "MB")
    at_most = "at most " if found["fewer_rows"] else ""
    held = ", ".join(
        f"{name} {size / unit:.2f}" for name, size in parts.items() if size and name not in ("size", "peak")
    )
    lines = {
        "plan": f"{found['model']} + {found['method']} on {found['task']}",
        "adapts": modules or others,
        "trains": f"{found['trainable_parameters']:,} of {found['parameters']:,} ({found['trainable_percent']:.2f} %), "
        f"{found['adapter_parameters']:,} of them the adapter's",
        "printed": ", ".join(f"{p['params']} ({p['table']})" for p in found["published"]),
        "memory": f"{parts['peak'] / unit:.2f} {unit_name} a device: {held}",
        "step": f"{found['batch']}; {found['tokens_per_device_and_step']:,} tokens and "
        f"{format_operations(found['flops']['step'])} a device",
        "rows": at_most and f"{at_most}{found['train_rows']:,}: {found['fewer_rows']}; give data_dir=DIR to count them",
        "time": f"{at_most}{found['steps']:,} steps, {format_hours(found['hours'])} of training on "
        f"{hardware['devices']} x {hardware['accelerator']} at {hardware['assumed_utilization']:.0%} of its peak, "
        "every row at full length",
        "written": f"{record.format_path()}/plan.json",
    }
    if not found["steps"]:
        lines |= {"step": "", "rows": "", "time": "none, nothing trains"}
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items() if text)


def format_hours(hours: float) -> str:
    """Return a duration in hours, or in the smaller unit that a short one fills."""
    if hours >= 1:
        return f"{hours:.2f} hours"
    return f"{60 * hours:.1f} min" if 60 * hours >= 1 else f"{3600 * hours:.2g} s"


def format_operations(number: float) -> str:
    """Return a number of operations in TFLOP, or in GFLOP if they are few."""
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e12 else f"{number / 1e9:.2f} GFLOP"
