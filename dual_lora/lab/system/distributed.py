"""Several processes that do one run together, one per device, as torchrun or accelerate start them.

The first process writes the record and prints; what only it can know (files, locks) it shares with the others. With one
process nothing here has any effect.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import Stopped, require

FIRST_PROCESS_SECONDS = 20.0  # how long the other processes wait for the first one to report an error
WARNINGS: ContextVar[list[str] | None] = ContextVar("WARNINGS", default=None)  # of the run in progress


def count_processes() -> int:
    """Return how many processes were started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def get_process_index() -> int:
    """Return this process's rank among all."""
    return int(os.environ.get("RANK") or 0) if has_several_processes() else 0


def is_first_process() -> bool:
    """Return whether this is the process that writes and prints."""
    return get_process_index() == 0


def print_warning(text: str) -> None:
    """Print a warning in the first process; within `collect_warnings` only once."""
    collected = WARNINGS.get()
    if collected is not None:
        if text in collected:
            return
        collected.append(text)
    if is_first_process():
        print(f"warning: {text}", file=sys.stderr)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that takes in what `print_warning` prints inside the context, for a run's record."""
    found: list[str] = []
    token = WARNINGS.set(found)
    try:
        yield found
    finally:
        WARNINGS.reset(token)


def has_several_processes() -> bool:
    """Return whether this process is one of several."""
    return count_processes() > 1


def wait_for_first_process_error() -> None:
    """Let the first process say why it ends before this one does. The launcher stops all processes as soon as one has
    ended, and most errors occur in each of them, so the first one reports for all. If it does not fail soon, or
    somebody presses Ctrl-C meanwhile, this one reports its own error.

    Raises:
        Stopped: the others have ended.
    """
    if is_first_process():
        return
    try:
        time.sleep(FIRST_PROCESS_SECONDS)
    except Stopped as stopped:
        if stopped.by != "SIGINT":
            raise


def check_process_count(settings: Settings) -> None:
    """Refuse a run that was started with more or fewer processes than it has devices.

    Raises:
        UserError: with the command that starts it correctly.
    """
    devices, found = settings.hardware.devices, count_processes()
    remedy = f"start it with torchrun --nproc-per-node {devices} train.py ..."
    if devices == 1:
        remedy = f"add hardware=ddp or hardware=fsdp2 and hardware.devices={found}"
    require(devices == found, f"hardware.devices={devices}: started as {found} process(es); {remedy}")


def join_processes() -> None:
    """Join the group of processes; the first call waits for all of them."""
    if has_several_processes():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def share_from_first(make: Callable[[], Any]) -> Any:
    """Return in all processes what the first one makes.

    Raises:
        Exception: what was raised there, in all of them.
    """
    if not has_several_processes():
        return make()
    from accelerate.utils import broadcast_object_list

    made_or_raised: list[Any] = [None, None]
    if is_first_process():
        try:
            made_or_raised[0] = make()
        except Exception as error:
            made_or_raised[1] = error
    made, error = broadcast_object_list(made_or_raised)
    if error:
        raise error
    return made


def gather_items(items: list[Any]) -> list[Any]:
    """Return the items of all processes, in all of them."""
    if not has_several_processes():
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def is_true_in_any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return any(gather_items([bool(flag)]))


def wait_for_everyone() -> None:
    """Wait until all processes have reached this point."""
    gather_items([None])


@contextmanager
def run_first_process_first() -> Iterator[None]:
    """Let the first process do something before the others do it, for example fill a cache."""
    if not has_several_processes():
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield
