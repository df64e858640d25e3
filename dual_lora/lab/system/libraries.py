"""Libraries that take seconds to import, print messages of their own, and change how torch computes unasked."""

import atexit
import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dual_lora.lab.config import paths
from dual_lora.lab.errors import UserError, get_first_line
from dual_lora.lab.system.signals import STOP


@contextmanager
def import_heavy_libraries() -> Iterator[None]:
    """A context for importing torch, transformers and PEFT. A stop waits until they are imported: an exception raised
    in the middle is lost where C code looks up a name, and ends the process where it crosses C++.

    Raises:
        Stopped: a stop was requested.
    """
    with STOP.defer(safe_point="as soon as the libraries are imported"), disable_first_collection():
        yield
    STOP.raise_if_asked()


@contextmanager
def disable_first_collection() -> Iterator[None]:
    """Turn garbage collection off if torch is not imported yet. It and the others create half a million permanent
    objects; collecting them would take a fifth of the import time, and half a second after each run and plan."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton counts what is left


OWN_CODE = (f"{paths.ROOT / 'tasks'}/", f"{Path(__file__).parents[2]}/")


def hide_foreign_warnings() -> None:
    """Keep warnings and log messages of third-party libraries off the screen; this project's own become one line each.

    Python's own filters, and so PYTHONWARNINGS, no longer matter: a warning never ends a command.
    """
    logging.disable(logging.ERROR)
    warnings.resetwarnings()
    warnings.simplefilter("default")
    warnings.showwarning = show_own_warning


def show_own_warning(message: Warning | str, *place: object, **more: object) -> None:
    """Print a warning that this project's code gave; the place that Python names may be a caller's."""
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename == warnings.__file__:
        frame = frame.f_back
    if frame and frame.f_code.co_filename.startswith(OWN_CODE):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def silence_libraries() -> None:
    """Turn off the progress bars and messages that libraries have switches for; errors still show.

    Raises:
        UserError: no bar of our own can be drawn.
    """
    import transformers
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    else:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported, which a plan never does
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # a bar with no switch of its own
    check_progress_bar()


def check_progress_bar() -> None:
    """Draw a progress bar to nowhere, because tqdm looks at some of its variables only while it draws.

    Raises:
        UserError: the environment's variables with which it cannot be drawn.
    """
    from tqdm.auto import tqdm

    named = [f"{name}={value[:80]}" for name, value in sorted(os.environ.items()) if name.startswith("TQDM_")]
    try:
        with tqdm([0], file=io.StringIO(), disable=False) as bar:
            list(bar)
    except Exception as error:  # whatever formatting with a wrong value raises
        reason = f"no progress bar can be drawn with it ({get_first_line(error)[:200]})"
        raise UserError(f"{', '.join(named)}: {reason}; unset it") from error


def allows_tf32(part: Any = None) -> bool:
    """Return whether a part of torch.backends may take float32 products in TF32. part: that of matrix products if None.

    From torch 2.9 on, parts may have settings of their own; then torch raises where an older name is read.
    """
    import torch

    part = part or torch.backends.cuda.matmul
    precision = getattr(part, "fp32_precision", None)
    return part.allow_tf32 if precision is None else precision == "tf32"


def describe_float32_products() -> dict[str, Any]:
    """Return what a record says of the precision of float32 products."""
    import torch

    cudnn = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # parts have settings of their own
        precision = torch.backends.fp32_precision
    return {
        "tf32": {"matmul": allows_tf32(), "cudnn": allows_tf32(cudnn)},
        "float32_matmul_precision": precision,
    }


@contextmanager
def keep_float32_products() -> Iterator[None]:
    """Restore, at the end, the precision of float32 products. Where a model is to be compiled, transformers and
    accelerate allow TF32 for the entire process, which no setting of a run says."""
    import torch

    parts = [torch.backends, torch.backends.cuda.matmul]
    matmul_allowed = allows_tf32()
    before = [getattr(part, "fp32_precision", None) for part in parts]
    try:
        yield
    finally:
        if before != [getattr(part, "fp32_precision", None) for part in parts] or matmul_allowed != allows_tf32():
            torch.backends.cuda.matmul.allow_tf32 = matmul_allowed
            for part, precision in zip(parts, before, strict=True):
                if precision is not None:
                    part.fp32_precision = precision
