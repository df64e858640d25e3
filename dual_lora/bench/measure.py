"""Measures each contender on a case.

A step is forward and backward, without an optimizer. The methods take turns, so that a slow moment of the machine meets
all of them; times are medians of the ratio to LoRA's step of the same turn. Operations are counted by torch's
FlopCounterMode. "Kept" is what autograd holds for backward between the two, each storage once, parameters left out;
"peak" is the most a step has allocated at once, its output and gradients included.

`floor` is what this way of computing Dual LoRA must take, not a bound on every way, in units of 2 N out in operations:
3 + 4 (r1 + r2) / N with the fused weight, 4 and 5 for 3 in 16 bits and with dropout (see
`dual_lora.kernels.recompute`); for a model, LoRA's count with its thin products exchanged for those.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import DualLoraConfig, set_update_scale
from ..analysis.memory import measure_kept_bytes
from .cases import LORA, Case, Contender, has_fast_bfloat16, list_contenders, round_input_gradients


@dataclass
class Row:
    """One method's cost: times in seconds, sizes in bytes, flops in operations.

    step_ratio: to LoRA's step; quartiles: of the same ratio over the turns. peer_ratio: to the step of the LoRA that
    has the same dropout and the same type of dL/dx.
    """

    method: str
    step_ratio: float
    step_seconds: float
    flops: int
    flops_over_floor: float | None
    kept_bytes: int
    peak_bytes: int
    adapter_bytes: int
    merge_seconds: float
    quartiles: tuple[float, float] | None = None  # None in files from before these were kept
    peer_ratio: float | None = None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clear_gradients(case: Case, model: nn.Module) -> None:
    """Drop the gradients of an earlier step."""
    model.zero_grad(set_to_none=True)
    for x in case.inputs:
        x.grad = None


def time_step(step: Callable, device: torch.device) -> float:
    """Return the seconds of a step and of the backward pass that it returns."""
    synchronize(device)
    start = time.perf_counter()
    step()()
    synchronize(device)
    return time.perf_counter() - start


def measure_peak_bytes(step: Callable, device: torch.device) -> int:
    """Return the most bytes that a step allocates beyond those before it. Clear all gradients first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        highest = max(highest, held)
    return highest


def count_operations(step: Callable) -> int:
    """Return the floating-point operations of a step and of the backward pass that it returns."""
    with FlopCounterMode(display=False) as counter:
        step()()
    return counter.get_total_flops()


def measure_merge_seconds(model: nn.Module, device: torch.device) -> float:
    """Return the seconds of one merge into the base weights, and undo it."""
    synchronize(device)
    start = time.perf_counter()
    model.merge_adapter()
    synchronize(device)
    taken = time.perf_counter() - start
    model.unmerge_adapter()
    return taken


def count_floor_operations(model: nn.Module, step: Callable, counted: int, rank: int, rest: int) -> int:
    """Return the floor of a Dual LoRA step in operations.

    model, step: LoRA's. counted: the operations of that step. rest: units beyond LoRA's 2.
    """
    thin = own = 0

    def add(layer: nn.Module, inputs: tuple) -> None:
        nonlocal thin, own
        x, n_in, n_out = inputs[0], layer.in_features, layer.out_features
        n = x.numel() // n_in
        thin += 2 * n * rank * (3 * (n_in + n_out) - (0 if x.requires_grad else n_in))
        # Where x needs no gradient, neither does dropout's copy of it.
        units = rest if x.requires_grad else min(rest, 2)
        own += 2 * n * n_in * n_out * units + 8 * rank * n_in * n_out

    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return counted - thin + own


def measure_case(case: Case, rank: int, repeats: int, device: torch.device) -> list[Row]:
    """Return a row for every method that can adapt the case; the others are left out with a line that says why."""
    contenders = list_contenders(rank, case.dropout, has_fast_bfloat16(case.dtype, device))
    adapted = {name: attach_contender(case, name, contender, device) for name, contender in contenders.items()}
    models = {name: model for name, model in adapted.items() if model is not None}
    steps = {name: case.step(model) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            clear_gradients(case, model)
            seconds = time_step(steps[name], device)
            if turn >= 2:  # the first turns warm caches and allocators
                taken[name].append(seconds)
    lora_flops = count_operations(steps[LORA])
    rows = []
    for name, model in models.items():
        clear_gradients(case, model)
        peak = measure_peak_bytes(steps[name], device)
        flops = count_operations(steps[name])
        floor = None
        if contenders[name].recomputes:
            units = 3 if "dropout" in name else 1 if case.dtype == torch.float32 else 2
            floor = count_floor_operations(models[LORA], steps[LORA], lora_flops, rank, units)
        ratios = compare_turns(taken[name], taken[LORA])
        rows.append(
            Row(
                method=name,
                step_ratio=statistics.median(ratios),
                step_seconds=statistics.median(taken[name]),
                flops=flops,
                flops_over_floor=flops / floor if floor else None,
                kept_bytes=measure_kept_bytes(model, steps[name]),
                peak_bytes=peak,
                adapter_bytes=sum(t.nbytes for t in get_peft_model_state_dict(model).values()),
                merge_seconds=measure_merge_seconds(model, device),
                quartiles=find_quartiles(ratios),
                peer_ratio=statistics.median(compare_turns(taken[name], taken[contenders[name].peer])),
            )
        )
    return rows


def attach_contender(case: Case, name: str, contender: Contender, device: torch.device) -> nn.Module | None:
    """Return the case's base with the contender's method on it, tried once; None, after a line that says why, if that
    fails."""
    contender.config.target_modules = case.targets
    torch.manual_seed(0)
    try:
        base = round_input_gradients(case.base()) if contender.rounds_base else case.base()
        model = get_peft_model(base, contender.config).train()
        if isinstance(contender.config, DualLoraConfig):
            set_update_scale(model, 1.0)
        time_step(case.step(model), device)
    except (ValueError, TypeError) as error:
        print(f"{name} left out: {str(error).splitlines()[0]}")
        return None
    return model


def compare_turns(taken: list[float], other: list[float]) -> list[float]:
    """Return the ratio of each turn's times."""
    return [a / b for a, b in zip(taken, other, strict=True)]


def find_quartiles(values: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of a single value, itself twice."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, high
