"""What an adapter costs: LoRA, DoRA, LoHa and Dual LoRA side by side in one run.

    python -m dual_lora.bench                                   single layers
    python -m dual_lora.bench --model DIR --batch 32x32         a whole model, on random tokens
    python -m dual_lora.bench --show benchmarks/FILE.json       the tables of a finished run

A step is forward and backward, without an optimizer. The methods take turns, so that a slow moment of the machine meets
all of them; times are medians of the ratio to LoRA's step of the same turn. Operations are counted by torch's
FlopCounterMode. "Kept" is what autograd holds for backward between the two, each storage once, parameters left out;
"peak" is the most a step has allocated at once, its output and gradients included.

Every method has the parameters of LoRA at the given rank: Dual LoRA r1 + r2 = rank, LoHa rank / 2. `floor` is what
this way of computing Dual LoRA must take, not a bound on every way, in units of 2 N out in operations: 3 + 4 (r1 + r2)
/ N with the fused weight, 4 and 5 for 3 in 16 bits and with dropout (see `dual_lora.kernels.recompute`); for a model,
LoRA's count with its thin products exchanged for those.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import peft
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import DualLoraConfig, set_update_scale

DROPOUT = 0.1


def configs(rank: int, dropout: bool) -> dict[str, PeftConfig]:
    """The contenders, each of LoRA's parameter count at this rank."""
    half = rank // 2
    plain = {
        "LoRA": LoraConfig(r=rank),
        "DoRA": LoraConfig(r=rank, use_dora=True),
        "LoHa": LoHaConfig(r=half, alpha=half, init_weights=False),
        "Dual LoRA, naive": DualLoraConfig(r=rank, kernel="eager", init_weights=False),
        "Dual LoRA": DualLoraConfig(r=rank, init_weights=False),
    }
    dropped = {
        "LoRA, dropout": LoraConfig(r=rank, lora_dropout=DROPOUT),
        "DoRA, dropout": LoraConfig(r=rank, use_dora=True, lora_dropout=DROPOUT),
        "Dual LoRA, dropout": DualLoraConfig(r=rank, lora_dropout=DROPOUT, init_weights=False),
    }
    return {**plain, **(dropped if dropout else {})}


@dataclass
class Row:
    """One method's cost: times in seconds, sizes in bytes, flops in operations."""

    method: str
    step_ratio: float
    step_seconds: float
    flops: int
    flops_over_floor: float | None
    kept_bytes: int
    peak_bytes: int
    adapter_bytes: int
    merge_seconds: float


class Layer(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Case:
    """Something to adapt: its name, the base, the adapted modules, and a step of the adapted model."""

    name: str
    base: Callable[[], nn.Module]
    targets: list[str] | str
    step: Callable[[nn.Module], Callable[[], None]]
    dropout: bool
    inputs: tuple[Tensor, ...] = ()


def layer_case(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    g = torch.randn(tokens, width, device=device, dtype=dtype)

    def step(model: nn.Module) -> Callable[[], None]:
        def forward_and_backward():
            y = model(x)
            return lambda: y.backward(g)

        return forward_and_backward

    name = f"layer {width} x {width}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: Layer(width, dtype).to(device), ["layer"], step, True, (x,))


def model_case(path: str, batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    known = AutoConfig.from_pretrained(path, trust_remote_code=False)
    causal = known.architectures and known.architectures[0].endswith(("CausalLM", "LMHeadModel"))
    cls = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    ids = torch.randint(10, known.vocab_size - 10, batch, device=device)
    labels = ids if causal else torch.zeros(batch[0], dtype=torch.long, device=device)

    def step(model: nn.Module) -> Callable[[], None]:
        def forward_and_backward():
            loss = model(input_ids=ids, labels=labels).loss
            return lambda: loss.backward()

        return forward_and_backward

    def base() -> nn.Module:
        return cls.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device)

    name = f"{Path(path).name}, batch {batch[0]} x {batch[1]}, {str(dtype).removeprefix('torch.')}"
    return Case(name, base, "all-linear", step, False)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget(case: Case, model: nn.Module) -> None:
    """Drop the gradients of an earlier step."""
    model.zero_grad(set_to_none=True)
    for x in case.inputs:
        x.grad = None


def timed(step: Callable, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    step()()
    synchronise(device)
    return time.perf_counter() - start


class Held:
    """A tensor as autograd holds it: it dies with the graph that holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model: nn.Module, step: Callable) -> int:
    """Return what autograd holds between `step` and the backward it returns; on the meta device, too."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor.detach())
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        backward = step()
        while gc.collect():  # a dropped graph may wait for it, and hold another
            pass
        storages = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in held}
    found = sum(size for storage, size in storages.items() if storage not in parameters)
    backward()
    return found


def peak_bytes(step: Callable, device: torch.device) -> int:
    """Return the most a step holds beyond what is there before it; no gradients may be there."""
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


def count(step: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        step()()
    return counter.get_total_flops()


def merge_seconds(model: nn.Module, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    model.merge_adapter()
    synchronise(device)
    taken = time.perf_counter() - start
    model.unmerge_adapter()
    return taken


def floor_of(model: nn.Module, step: Callable, counted: int, rank: int, rest: int) -> int:
    """The floor of a Dual LoRA step where LoRA, this model, counts so many operations; rest: units beyond LoRA's 2."""
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


def measure(case: Case, rank: int, repeats: int, device: torch.device) -> list[Row]:
    """Return a row for every method that can adapt the case; the others are left out with a line that says why."""
    models, steps = {}, {}
    for name, config in configs(rank, case.dropout).items():
        config.target_modules = case.targets
        torch.manual_seed(0)
        try:
            models[name] = get_peft_model(case.base(), config).train()
            if isinstance(config, DualLoraConfig):
                set_update_scale(models[name], 1.0)
            steps[name] = case.step(models[name])
            timed(steps[name], device)
        except (ValueError, TypeError) as error:
            print(f"{name} left out: {str(error).splitlines()[0]}")
            models.pop(name, None)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            forget(case, model)
            seconds = timed(steps[name], device)
            if turn >= 2:  # the first turns warm caches and allocators
                taken[name].append(seconds)
    dtype = next(models["LoRA"].parameters()).dtype
    lora_flops = count(steps["LoRA"])
    rows = []
    for name, model in models.items():
        forget(case, model)
        peak = peak_bytes(steps[name], device)
        flops = count(steps[name])
        units = {"Dual LoRA": 1 if dtype == torch.float32 else 2, "Dual LoRA, dropout": 3}.get(name)
        floor = floor_of(models["LoRA"], steps["LoRA"], lora_flops, rank, units) if units else None
        rows.append(
            Row(
                method=name,
                step_ratio=statistics.median(a / b for a, b in zip(taken[name], taken["LoRA"], strict=True)),
                step_seconds=statistics.median(taken[name]),
                flops=flops,
                flops_over_floor=flops / floor if floor else None,
                kept_bytes=kept_bytes(model, steps[name]),
                peak_bytes=peak,
                adapter_bytes=sum(t.nbytes for t in get_peft_model_state_dict(model).values()),
                merge_seconds=merge_seconds(model, device),
            )
        )
    return rows


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


COLUMNS = ("step / LoRA", "operations / LoRA", "over floor", "kept, MiB", "peak, MiB", "adapter, MiB", "merge, ms")


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table; sizes in MiB."""
    lora = next(row for row in rows if row.method == "LoRA")
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for row in rows:
        ratios = f"{row.step_ratio:.2f}", f"{row.flops / lora.flops:.2f}"
        over = "–" if row.flops_over_floor is None else f"{row.flops_over_floor:.3f}"
        sizes = (f"{n / 2**20:.2f}" for n in (row.kept_bytes, row.peak_bytes, row.adapter_bytes))
        cells = row.method, *ratios, over, *sizes, f"{row.merge_seconds * 1e3:.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(record: dict) -> str:
    """Return a finished benchmark as Markdown."""
    parts = [f"{record['hardware']}, {record['date']}"]
    for name, case in record["cases"].items():
        parts.append(f"{name}; rank {case['rank']}, torch {case['torch']}, PEFT {case['peft']}")
        parts.append(table([Row(**row) for row in case["rows"]]))
    return "\n\n".join(parts)


def batch_shape(text: str) -> tuple[int, int]:
    """Return the rows and tokens of a batch from ROWSxTOKENS.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    try:
        rows, tokens = (int(n) for n in text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxTOKENS, such as 32x32") from error
    return rows, tokens


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m dual_lora.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, nargs="*", default=[1024, 2048], help="in = out of a layer")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096], help="rows of a layer's input")
    parser.add_argument("--model", nargs="*", default=[], help="folders of models; no layers are measured then")
    parser.add_argument("--batch", type=batch_shape, nargs="*", default=[(8, 64)], help="ROWSxTOKENS, one a model")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's rank, Dual LoRA's r1 + r2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base weights")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    parser.add_argument("--out", type=Path, help="write a JSON file to this folder, or add to the one it has of today")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file and measure nothing")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure what the arguments ask for, print the tables, and write a JSON file if `--out` is given.

    Raises:
        SystemExit: an argument is wrong.
    """
    given = parser().parse_args(arguments)
    if given.show:
        print(shown(json.loads(given.show.read_text())))
        return
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    if given.model:
        if len(given.batch) not in (1, len(given.model)):
            raise SystemExit(f"--batch: give one shape, or one for each of the {len(given.model)} models")
        if odd := [folder for folder in given.model if not (Path(folder) / "config.json").is_file()]:
            raise SystemExit(f"--model {odd[0]}: no config.json there; give the folder of a saved Hugging Face model")
        shapes = given.batch * len(given.model) if len(given.batch) == 1 else given.batch
        cases = [model_case(path, shape, dtype, device) for path, shape in zip(given.model, shapes, strict=True)]
    else:
        cases = [layer_case(width, tokens, dtype, device) for width in given.width for tokens in given.tokens]
    record = {"hardware": hardware(device), "date": date.today().isoformat(), "cases": {}}
    print(f"{record['hardware']}\n", flush=True)
    for case in cases:
        conditions = {"rank": given.rank, "repeats": given.repeats, "load_before": os.getloadavg()[0]}
        conditions |= {"torch": torch.__version__, "peft": peft.__version__}
        rows = measure(case, given.rank, given.repeats, device)
        record["cases"][case.name] = {**conditions, "rows": [asdict(row) for row in rows]}
        print(f"{case.name}\n\n{table(rows)}\n", flush=True)
        if given.out:
            write(record, given.out)


def write(record: dict, folder: Path) -> None:
    """Write the record, keeping the other cases a file of the same day and hardware already has."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in record["hardware"].lower()).split())
    path = folder / f"{record['date']}-{slug}.json"
    earlier = json.loads(path.read_text())["cases"] if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "cases": {**earlier, **record["cases"]}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
