"""What only a GPU can show, in one command of at most ten minutes, part by part.

    make gpu                                  all parts that this card has not finished today
    python -m tools.gpu_check PART ...        these parts
    python -m tools.gpu_check --device cpu    the same parts in small on a CPU, to try the command itself

Each part runs in a process of its own with a time limit. Its result is written to benchmarks/DATE-CARD.json as soon as
it ends, next to the tables of `python -m dual_lora.bench`, so that a call that was cut off resumes with the next part.

    kernels     Triton against plain autograd, outputs and every gradient, in float32 and bfloat16
    layers      bench at LLaMA-3-8B's attention width, 512 to 8192 tokens, against LoRA, DoRA and LoHa
    step        training steps of SmolLM2 in bfloat16, every kernel: seconds and loss
    fsdp2       one step under FSDP2 on only this device: the loss and gradients of the unsharded model
    memory      the peak of a step of SmolLM2 against what autograd keeps in it by `plan=true`'s way of counting
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dual_lora import DualLoraConfig, functional, set_update_scale
from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.bench.__main__ import main as run_bench
from dual_lora.bench.measure import measure_peak_bytes
from dual_lora.bench.record import create_record, get_record_path, write_record
from dual_lora.kernels import choose_ops, dual_linear

ROOT = Path(__file__).resolve().parents[1]
# The width of q and o; bench layers are square.
LLAMA_WIDTH, LLAMA_TOKENS = 4096, (512, 2048, 8192)
# Largest relative error of a Triton result to float64 autograd on the same rounded inputs.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
SECONDS = {"kernels": 90, "layers": 210, "step": 120, "fsdp2": 60, "memory": 90}  # 570 in all


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Return the largest relative error of output and gradients by dtype.

    Raises:
        RuntimeError: Triton is missing, or an error is too large.
    """
    if (ops := choose_ops("triton", device)) is choose_ops("recompute", device):
        raise RuntimeError("no Triton here; on a CPU set TRITON_INTERPRET=1")
    size = 1024 if device.type == "cuda" else 64
    found = {name: compare_kernel(getattr(torch, name), size, ops, device) for name in TOLERANCE}
    wrong = [name for name, error in found.items() if not error < TOLERANCE[name]]
    if wrong:
        raise RuntimeError(f"relative errors {found}: too large in {', '.join(wrong)}")
    return found


def compare_kernel(dtype: torch.dtype, size: int, ops: Any, device: torch.device) -> float:
    """Return the largest relative error of y, dL/dx and the factors' gradients of one square layer."""
    draw = torch.Generator(device).manual_seed(0)

    def draw_normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    # Multiples of 1/256 with a standard deviation of 0.05: float32 adds up their products exactly. Otherwise rounding
    # may flip one sign among a million, and a right kernel would fail.
    factors = [(12.8 * draw_normal(*shape)).round() / 256 for shape in ((8, size), (size, 8), (8, size), (size, 8))]
    x, weight, g = (
        draw_normal(size, size).to(dtype),
        (draw_normal(size, size) / size**0.5).to(dtype),
        draw_normal(size, size).to(dtype),
    )
    scale = torch.tensor(2.0, device=device)

    def compute_gradients(dtype: torch.dtype, compute: Callable) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
        y = compute(*leaves)
        return [t.double() for t in (y, *torch.autograd.grad(y, leaves, g.to(y.dtype)))]

    def compute_readable(x: Tensor, *factors: Tensor) -> Tensor:
        return x @ (weight.double() + functional.delta_weight(*factors, scale.double())).T

    def compute_triton(x: Tensor, *factors: Tensor) -> Tensor:
        return dual_linear(x.to(dtype), *factors, scale, weight=weight, ops=ops)

    exact = compute_gradients(torch.float64, compute_readable)
    found = compute_gradients(torch.float32, compute_triton)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def measure_layers(device: torch.device) -> dict[str, Any]:
    """Measure layers, which the benchmark writes itself, and return their sizes."""
    width, tokens = (LLAMA_WIDTH, LLAMA_TOKENS) if device.type == "cuda" else (64, (32,))
    sizes = ["--width", str(width), "--tokens", *map(str, tokens), "--repeats", "7", "--device", device.type]
    for dtype in ("bfloat16", "float32"):
        run_bench([*sizes, "--dtype", dtype, "--out", str(get_folder())])
    return {"width": width, "tokens": list(tokens)}


def build_model(device: torch.device, **options: Any) -> torch.nn.Module:
    """Return SmolLM2-135M's architecture with random weights in bfloat16 (in small on a CPU) and Dual LoRA on it."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    small = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**(sizes if device.type == "cuda" else small), **heads))
    config = DualLoraConfig(r=16, target_modules="all-linear", **options)
    model = get_peft_model(base.to(device, torch.bfloat16), config).train()
    set_update_scale(model, 1.0)
    return model


def draw_batch(device: torch.device, rows: int = 8, tokens: int = 512) -> Tensor:
    """Return token ids, rows x tokens; few and short on a CPU."""
    shape = (rows, tokens) if device.type == "cuda" else (2, 16)
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(device)


def take_step(model: torch.nn.Module, ids: Tensor) -> float:
    """Forward and backward; return the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def measure_steps(device: torch.device) -> dict[str, Any]:
    """Return the median seconds and the last loss of five optimizer steps with every kernel."""
    found, ids = {}, draw_batch(device)
    for kernel in ("eager", "recompute", "triton"):
        model = build_model(device, kernel=kernel)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = take_step(model, ids)  # reads the loss, and so waits for the device
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        found[kernel] = {"seconds": sorted(seconds[1:])[2], "loss": loss}
    return found


def check_fsdp2(device: torch.device) -> dict[str, Any]:
    """Return the loss and the largest relative difference of a gradient between FSDP2 on one device and none.

    Raises:
        RuntimeError: they differ.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded, ids = build_model(device), build_model(device), draw_batch(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        for layer in sharded.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses = take_step(plain, ids), take_step(sharded, ids)
        pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
        gradients = [(p.grad, s.grad.full_tensor()) for p, s in pairs if p.grad is not None]
    finally:
        dist.destroy_process_group()
    difference = max(float((s - p).norm() / p.norm().clamp(min=1e-12)) for p, s in gradients)
    if difference > 1e-2 or abs(losses[0] - losses[1]) > 1e-2:
        raise RuntimeError(f"losses {losses}, gradients differ by {difference:.1e}")
    return {"losses": losses, "difference": difference}


def compare_memory(device: torch.device) -> dict[str, Any]:
    """Return bytes that autograd keeps in a step as a meta device counts them, and the measured peak of the step."""
    model, ids = build_model(device), draw_batch(device)
    empty, shapes = build_model(device).to("meta"), ids.to("meta")
    counted = measure_kept_bytes(empty, lambda: empty(input_ids=shapes, labels=shapes).loss.backward)
    peak = measure_peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward, device)
    return {"counted_kept_bytes": counted, "measured_peak_bytes": peak, "ratio": peak / counted}


PARTS = {
    "kernels": check_kernels,
    "layers": measure_layers,
    "step": measure_steps,
    "fsdp2": check_fsdp2,
    "memory": compare_memory,
}


def get_folder() -> Path:
    """Return where results go: benchmarks/, or the folder that DUAL_LORA_BENCHMARKS names."""
    return Path(os.environ.get("DUAL_LORA_BENCHMARKS", ROOT / "benchmarks"))


def run_part(name: str, device: str) -> dict[str, Any]:
    """Run one part in a process of its own and return its result, or why there is none."""
    command = [sys.executable, "-m", "tools.gpu_check", "--device", device, "--inside", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS[name])
    except subprocess.TimeoutExpired:
        return {"part": name, "failed": f"took over {SECONDS[name]} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    result = {"result": json.loads(lines[-1])} if done.returncode == 0 else {"failed": lines[-1]}
    return {"part": name, "seconds": round(time.perf_counter() - start, 1), **result}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that have no result yet; return how many failed.

    Raises:
        SystemExit: an unknown part.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    if given.inside:
        print(json.dumps(PARTS[given.inside](torch.device(given.device))))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here, so nothing was measured; --device cpu tries the command itself in small")
        return 0
    return run_missing_parts(given.parts or list(PARTS), given.device)


def run_missing_parts(parts: list[str], device: str) -> int:
    """Run each part that is missing from today's file of this card and write it at once; return how many failed."""
    record = create_record(torch.device(device))
    path, failed = get_record_path(record, get_folder()), 0
    for part in parts:
        known = json.loads(path.read_text("utf-8")).get("checks", {}) if path.exists() else {}
        if "result" not in known.get(part, {}):
            known[part] = run_part(part, device)
            write_record(record | {"checks": known}, get_folder())
        failed += "result" not in known[part]
        outcome = known[part].get("result") or known[part]["failed"]
        print(f"| {part} | {known[part].get('seconds', '–')} s | {outcome} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
