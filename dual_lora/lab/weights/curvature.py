"""The curvature of the loss at a run's start: the largest Hessian eigenvalue of what trains at `train.lr`.

The model is drawn as training draws it, in evaluation mode (no dropout), on a fixed sample of its training rows. Heads,
which have a rate of their own that is the same for every method, are constants; a group of weights that trains at a
multiple of `train.lr` counts with that multiple. An update with a ramp is at full scale, f = 1: at f = 0 it has no
gradient, and so no curvature.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.trainer_pt_utils import LabelSmoother

from dual_lora.analysis.curvature import TOLERANCE, compute_curvature
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import require
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.adapt import draw_initial_model, find_group_and_rate
from dual_lora.lab.model.encode import build_collator, encode_rows
from dual_lora.lab.record.record import CURVATURE_FILE, Record
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.tuner.warmup import list_factors
from tasks import Task

ROWS, ROWS_SEED = 64, 2512
HEAD = "head"  # the group of a head's weights


def measure_curvature(settings: Settings, record: Record) -> None:
    """Measure the curvature at a finished run's start and write it into its folder. Its weights are not needed.

    Raises:
        UserError: the model or the rows cannot be loaded, the weights are not in float32, or nothing but a head trains.
    """
    silence_libraries()
    dtype = settings.model.dtype
    require(dtype == "float32", f"run={record.format_path()}: model.dtype={dtype}: curvature is measured in float32")
    task = load_task(settings)
    train = load_split(task, "train", settings)
    model, tokenizer = draw_initial_model(settings, task, len(train.rows))
    model.eval()
    for factors in list_factors(model):
        factors.set_update_scale(1.0, ramp=False)
    rows = train.rows.shuffle(seed=ROWS_SEED).select(range(min(ROWS, len(train.rows))))
    examples = encode_rows(rows, task, tokenizer, settings)
    batch = build_collator(task, tokenizer)(list(examples))
    parameters, multipliers = select_parameters(model, settings)
    require(bool(parameters), f"run={record.format_path()}: nothing but a head trains; leave it out of the experiment")
    with sdpa_kernel(SDPBackend.MATH):  # the fast ones differentiate once
        found = compute_curvature(lambda: compute_loss(model, batch, settings, task), parameters, multipliers)
    content = {
        "run": record.name,
        "eigenvalue": found.eigenvalue,
        "loss": found.loss,
        "products": found.products,
        "tolerance": TOLERANCE,
        "rows": len(rows),
        "parameters": sum(p.numel() for p in parameters),
    }
    record.write_sealed(CURVATURE_FILE, content)


def compute_loss(model: torch.nn.Module, batch: dict, settings: Settings, task: Task) -> torch.Tensor:
    """Return the loss that training minimizes, with its label smoothing: the Trainer's."""
    output = model(**batch)
    if not settings.task.label_smoothing:
        return output.loss
    return LabelSmoother(settings.task.label_smoothing)(output, batch["labels"], shift_labels=task.form == "generation")


def select_parameters(model: torch.nn.Module, settings: Settings) -> tuple[list[torch.nn.Parameter], list[float]]:
    """Return what trains in addition to the heads, and the multiple of `train.lr` at which each does."""
    found = [
        (parameter, rate / settings.train.lr)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for group, rate in [find_group_and_rate(name, settings)]
        if group != HEAD
    ]
    return [parameter for parameter, _ in found], [multiple for _, multiple in found]
