"""How many threads, and how they should wait: one step of Dual LoRA under each choice, with and without a busy
neighbour, a process of this module's own that keeps one core busy.

OpenMP reads its variables when torch is imported, so each choice has a process of its own. The processes take turns,
so that a slow moment of the machine meets all of them, and sleep between their turns.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

# The harness's entry points set the first, where the environment says nothing else; torch by itself does the last.
CHOICES = {
    "all, sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one": {"OMP_NUM_THREADS": "1"},
    "all, spinning": {},
}
MACHINES = ("no neighbour", "busy neighbour")
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_NUM")


def measure_threads(width: int, tokens: int, turns: int) -> dict:
    """Return seconds a step, medians over the turns, by neighbour and choice.

    width: of the layer, in and out; tokens: rows of its input, float32.
    """
    with contextlib.ExitStack() as stack:
        workers = {choice: stack.enter_context(start_worker(choice, width, tokens)) for choice in CHOICES}
        seconds = {machine: time_in_turns(machine, workers, turns) for machine in MACHINES}
    step = f"A layer of {width} x {width}, {tokens} tokens, float32"
    return {"step": step, "cores": count_cores(), "turns": turns, "load_before": os.getloadavg()[0], "seconds": seconds}


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def time_in_turns(machine: str, workers: dict[str, subprocess.Popen], turns: int) -> dict[str, float]:
    """Return each worker's seconds a step; the first turn does not count."""
    taken: dict[str, list[float]] = {choice: [] for choice in workers}
    with keep_a_core_busy() if machine == MACHINES[1] else contextlib.nullcontext():
        for _ in range(turns + 1):
            for choice, worker in workers.items():
                taken[choice].append(request_step(worker))
    return {choice: statistics.median(times[1:]) for choice, times in taken.items()}


@contextlib.contextmanager
def start_worker(choice: str, width: int, tokens: int) -> Iterator[subprocess.Popen]:
    """Run a process that takes a step for each line it reads, under one of CHOICES."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    command = [sys.executable, "-m", __name__, str(width), str(tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with stop_at_end(subprocess.Popen(command, env={**inherited, **CHOICES[choice]}, **pipes)) as worker:
        yield worker


@contextlib.contextmanager
def keep_a_core_busy() -> Iterator[None]:
    """Run a process that computes without pause, on whichever core the system gives it."""
    with stop_at_end(subprocess.Popen([sys.executable, "-c", "while True: pass"])):
        yield


@contextlib.contextmanager
def stop_at_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill the process when the block ends."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def request_step(worker: subprocess.Popen) -> float:
    """Let a worker take a step and return its seconds.

    Raises:
        RuntimeError: it has ended.
    """
    worker.stdin.write("step\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that measures threads ended with {worker.wait()}")
    return json.loads(line)


def serve_steps(width: int, tokens: int) -> None:
    """Take a step of Dual LoRA for each line of the input and print its seconds; the first is taken beforehand."""
    import torch

    from .cases import LORA, build_layer_case, list_contenders
    from .measure import attach_contender, clear_gradients

    device = torch.device("cpu")
    case = build_layer_case(width, tokens, torch.float32, device)
    contender = list_contenders(16, dropout=False, bfloat16=False)[f"Dual {LORA}"]
    model = attach_contender(case, LORA, contender, device)
    step = case.step(model)
    for _ in sys.stdin:
        clear_gradients(case, model)
        start = time.perf_counter()
        step()()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve_steps(*map(int, sys.argv[1:]))
