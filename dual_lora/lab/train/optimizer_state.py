"""The state of the optimizer, its schedule and all random generators, as safetensors and JSON.

The Trainer would write pickles. Numbers are restored bit for bit: Python writes a float to JSON as the shortest text
that reads back as the same float.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

OPTIMIZER_FILE, SCHEDULE_FILE = "optimizer.safetensors", "schedule.json"


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Write the optimizer's tensors, named by the index of their weight, and everything else in one JSON file."""
    held = optimizer.state_dict()
    tensors = {f"{i}.{name}": t.contiguous() for i, state in held["state"].items() for name, t in state.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)
    schedule = {"groups": held["param_groups"], "schedule": scheduler.state_dict()}
    (folder / SCHEDULE_FILE).write_text(json.dumps(schedule), "utf-8")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Give a fresh optimizer and its schedule the state that `save_optimizer` wrote."""
    held = json.loads((folder / SCHEDULE_FILE).read_text("utf-8"))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER_FILE).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": held["groups"]})
    scheduler.load_state_dict(held["schedule"])


def save_random_state(path: Path, **more: float) -> None:
    """Write the state of every source of random numbers of this process, and `more` of its own next to it."""
    kind, numbers, *rest = np.random.get_state()
    device = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []  # only this process's own GPU
    held = {
        "python": random.getstate(),
        "numpy": [kind, numbers.tolist(), *rest],
        "torch": [state.tolist() for state in (torch.get_rng_state(), *device)],
        **more,
    }
    path.write_text(json.dumps(held), "utf-8")


def load_random_state(path: Path) -> None:
    """Restore what `save_random_state` wrote, so that resumed training draws the same random numbers."""
    held = json.loads(path.read_text("utf-8"))
    version, numbers, spare = held["python"]
    random.setstate((version, tuple(numbers), spare))
    np.random.set_state(tuple(held["numpy"]))
    cpu, *device = (torch.tensor(state, dtype=torch.uint8) for state in held["torch"])
    torch.set_rng_state(cpu)
    for state in device:
        torch.cuda.set_rng_state(state)
